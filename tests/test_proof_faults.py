"""Verify finds and names each fault of a merged folder, and raises no alarm on good pairs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_merging_peft import merged_by_peft, peft_adapter
from tokenizers import AddedToken
from tokenizers_for_tests import CHATML, tiny_tokenizer
from typer.testing import CliRunner

from tsugiki.adapters.algebra import LowRank, read_changes
from tsugiki.cli import app
from tsugiki.errors import TsugikiError
from tsugiki.merging import plan_merge, write_merged
from tsugiki.models.shards import open_model
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.checks import Bounds, Report
from tsugiki.proof.verify import verify

TOKENIZER = tiny_tokenizer(CHATML)
TOKENIZER.add_tokens(
    [AddedToken("<|接ぎ木|>", special=False), AddedToken("<|tool|>", special=True)]
)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's base, PEFT adapter and merged folder, made once."""
    root = tmp_path_factory.mktemp("faults")

    @cache
    def make(family: str) -> Path:
        base = save_tiny(family, root / family / "base", TOKENIZER)
        peft_adapter(base, root / family / "adapter")
        write_merged(plan_merge(root / family / "adapter", base), root / family / "merged")
        return root / family

    return make


def settings(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)


def changes_of(folder: Path) -> dict[str, LowRank]:
    base = open_model(folder.parent / "base")
    return read_changes(folder.parent / "adapter", base).by_name


def norm_epsilon(folder: Path) -> None:
    def change(config: dict) -> None:
        key = "layer_norm_epsilon" if "layer_norm_epsilon" in config else "rms_norm_eps"
        config[key] = 10 * config[key]

    settings(folder, change)


def rope_base(folder: Path) -> None:
    def change(config: dict) -> None:
        rope = config["rope_parameters"]
        parts = [rope] if "rope_theta" in rope else list(rope.values())
        for part in parts:
            part["rope_theta"] *= 2

    settings(folder, change)


def untouched_tensor(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        untouched = sorted(set(tensors) - set(changes_of(folder)))
        tensors[next(name for name in untouched if tensors[name].any())] *= 1.01

    weights(folder, change)


def changed_tensor(folder: Path) -> None:
    weights(folder, lambda tensors: tensors[next(iter(changes_of(folder)))].mul_(1.01))


def lower_type(folder: Path) -> None:
    weights(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))


def hidden_lower_type(folder: Path) -> None:
    weights(folder, lambda t: t.update({k: v.bfloat16().float() for k, v in t.items()}))


def swapped_halves(folder: Path) -> None:
    """B·A merged as (B·A)ᵀ, which the shapes of a square projection allow."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name, found = next(
            (n, c)
            for n, c in changes_of(folder).items()
            if tensors[n].shape[0] == tensors[n].shape[1]
        )
        delta = found.scale * found.b @ found.a
        tensors[name] += (delta.T - delta).T if found.transposed else delta.T - delta

    weights(folder, change)


def scale_twice(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, found in changes_of(folder).items():
            delta = found.scale * (found.scale - 1) * found.b @ found.a
            tensors[name] += delta.T if found.transposed else delta

    weights(folder, change)


def not_merged(folder: Path) -> None:
    name = next(iter(changes_of(folder)))
    base = load_file(folder.parent / "base" / WEIGHTS)
    weights(folder, lambda tensors: tensors.update({name: base[name]}))


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>"))


def missing_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|接ぎ木|>"]
    path.write_text(json.dumps(content))
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    for key in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
        content.pop(key, None)
    config.write_text(json.dumps(content))


def other_stop(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 7}))


def missing_tensor(folder: Path) -> None:
    weights(folder, lambda tensors: tensors.pop(sorted(tensors)[3]))


def not_a_number(folder: Path) -> None:
    weights(folder, lambda tensors: tensors[sorted(tensors)[3]].view(-1)[0].fill_(float("nan")))


TESTED = ("llama", "qwen3", "gemma3", "gpt2")
# fault: (the step that must see it, words of its name)
FAULTS: dict[Callable[[Path], None], tuple[str, str]] = {
    norm_epsilon: ("1 settings", "eps"),
    rope_base: ("1 settings", "rope_theta"),
    other_stop: ("1 settings", "eos_token_id"),
    untouched_tensor: ("2 tensors", "coefficient 1.0100"),
    changed_tensor: ("2 tensors", "coefficient 1.0100"),
    lower_type: ("2 tensors", "stored as bfloat16, float32 was asked"),
    hidden_lower_type: ("2 tensors", "rounded to bfloat16"),
    swapped_halves: ("2 tensors", "the adapter's part"),
    scale_twice: ("2 tensors", "the scale was applied twice"),
    not_merged: ("2 tensors", "the adapter's part 0.000 times"),
    missing_tensor: ("2 tensors", "missing"),
    not_a_number: ("2 tensors", "NaN"),
    other_template: ("4 template", "other ids from position"),
    missing_token: ("3 token ids", "<|接ぎ木|>"),
}


def compare(folder: Path, *, logits: bool = True) -> Report:
    base = str(folder.parent / "base")
    adapter = open_artefact(str(folder.parent / "adapter"), base)
    return verify(adapter, open_artefact(str(folder)), logits=logits)


def failures(report: Report) -> list[str]:
    return [
        f"{c.step}: {line}" for c in report.checks if not c.ok for line in (*c.details, c.figure)
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", TESTED)
def test_each_fault_is_found_and_named(
    family: str, fault: Callable[[Path], None], place: Callable[[str], Path]
) -> None:
    if fault is rope_base and family == "gpt2":
        pytest.skip("GPT-2 has no rotary positions")
    good, bad = place(family) / "merged", place(family) / "bad"
    shutil.copytree(good, bad)
    try:
        (bad / "tsugiki.json").unlink()  # else the digests alone would tell
        fault(bad)
        step, words = FAULTS[fault]
        found = failures(compare(bad, logits=False))
        assert any(line.startswith(step) and words in line for line in found), found
    finally:
        shutil.rmtree(bad)


def test_a_fault_in_the_arithmetic_shows_in_the_logits_too(place: Callable[[str], Path]) -> None:
    bad = place("llama") / "bad"
    shutil.copytree(place("llama") / "merged", bad)
    try:
        scale_twice(bad)
        found = failures(compare(bad))
        assert {line.split(":")[0] for line in found} >= {"0 files", "2 tensors", "5 logits"}
    finally:
        shutil.rmtree(bad)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_byte_is_found_wherever_it_is(seed: int, place: Callable[[str], Path]) -> None:
    home = place(TESTED[seed % len(TESTED)])
    good, bad = home / "merged", home / "bad"
    shutil.copytree(good, bad)
    try:
        chance = random.Random(seed)
        names = sorted(p.name for p in bad.iterdir() if p.name != "tsugiki.json")
        path = bad / (WEIGHTS if seed < 5 else chance.choice(names))
        content = bytearray(path.read_bytes())
        at = (
            chance.randrange(9000, len(content))
            if path.name == WEIGHTS
            else chance.randrange(len(content))
        )
        content[at] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            found = failures(compare(bad, logits=False))
        except TsugikiError as error:  # a config that is no JSON any more
            found = [str(error)]
        assert any(path.name in line for line in found), found
    finally:
        shutil.rmtree(bad)


@pytest.mark.parametrize("family", TESTED)
def test_a_truncated_file_is_named(family: str, place: Callable[[str], Path]) -> None:
    bad = place(family) / "bad"
    shutil.copytree(place(family) / "merged", bad)
    try:
        content = (bad / WEIGHTS).read_bytes()
        for left in (0, 5, 100, 20000, -1):
            (bad / WEIGHTS).write_bytes(content[:left])
            with pytest.raises(TsugikiError, match="not a whole safetensors file") as error:
                compare(bad)
            assert WEIGHTS in str(error.value)
    finally:
        shutil.rmtree(bad)


@pytest.mark.parametrize("pair", ["f32", "bf16", "f16", "peft", "itself"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_alarm_on_good_pairs(
    family: str, pair: str, place: Callable[[str], Path], tmp_path: Path
) -> None:
    """Forty of them: five for each of eight families."""
    home = place(family)
    adapter = open_artefact(str(home / "adapter"), str(home / "base"))
    if pair == "peft":
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
        merged_by_peft(peft.PeftModel.from_pretrained(base, home / "adapter"), tmp_path / "theirs")
        TOKENIZER.save_pretrained(tmp_path / "theirs")
        report = verify(adapter, open_artefact(str(tmp_path / "theirs")))
    elif pair == "itself":
        report = verify(adapter, adapter)
    elif pair == "f32":
        report = verify(open_artefact(str(home / "merged")), adapter)
    else:
        plan = plan_merge(home / "adapter", home / "base", dtype=pair)
        write_merged(plan, tmp_path / "low")
        report = verify(adapter, open_artefact(str(tmp_path / "low")))
    assert report.ok, failures(report)
    assert any(check.step == "5 logits" for check in report.checks)


def test_the_verdict_is_an_exit_code(place: Callable[[str], Path], tmp_path: Path) -> None:
    home = place("qwen3")
    merged, base = str(home / "merged"), str(home / "base")
    text = tmp_path / "text.txt"
    text.write_text("名前はまだ無い。" * 9)
    runner = CliRunner()
    good = runner.invoke(app, ["verify", merged, merged, "--json", "--text", str(text)])
    bad = runner.invoke(app, ["verify", merged, base, "--json", "--layer-by-layer"])
    assert (good.exit_code, bad.exit_code) == (0, 1), (good.output, bad.output)
    verdicts = [json.loads(run.output.splitlines()[-1]) for run in (good, bad)]
    assert [verdict["ok"] for verdict in verdicts] == [True, False]
    assert "numbers" in verdicts[1]["failed"]
    arguments = ["merge", str(home / "adapter"), "--model", base, "--output", str(tmp_path / "out")]
    done = runner.invoke(app, [*arguments, "--dtype", "bf16"])
    assert done.exit_code == 0, done.output
    assert "equal in all" in done.output


def test_limits_can_be_changed(place: Callable[[str], Path], tmp_path: Path) -> None:
    home = place("qwen3")
    adapter = open_artefact(str(home / "adapter"), str(home / "base"))
    write_merged(plan_merge(home / "adapter", home / "base", dtype="bf16"), tmp_path / "low")
    low = open_artefact(str(tmp_path / "low"))
    report = verify(adapter, low, bounds=Bounds(1e-4, 1e-9))
    assert [check.step for check in report.checks if not check.ok] == ["5 logits", "5 logits"]


def test_the_merged_file_has_the_same_tensors_in_the_same_order(
    place: Callable[[str], Path],
) -> None:
    home = place("llama")
    orders = []
    for name in ("base", "merged"):
        with safe_open(home / name / WEIGHTS, "pt") as file:
            orders.append((list(file.offset_keys()), file.metadata()))
    assert orders[0] == orders[1]
