"""Verify raises no alarm on good GGUF files, of eight families, ours or made another way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, save_tiny, save_wide, tiny_model
from packaging.requirements import Requirement
from sentencepiece_for_tests import train_pieces, train_unigram
from test_exporting_gguf import VARIANTS, save_variant
from test_merging_forms import our_adapter
from test_merging_peft import peft_adapter
from test_proof_faults import TOKENIZER, failures
from typer.testing import CliRunner

import tsugiki
from tsugiki.adapters.joined import join
from tsugiki.cli import app
from tsugiki.demo.show import ship
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.exporting.gguf_lora import plan_lora, write_lora
from tsugiki.formats.llama_cpp import process
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.formats.quantise import quantise_file
from tsugiki.merging import plan_merge, write_merged
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.checks import Check, Proof, Report, run_steps
from tsugiki.proof.gguf.artefact import GgufArtefact, gguf_paths, open_gguf_artefact
from tsugiki.proof.gguf.verify import verify_gguf
from tsugiki.proving import prove
from tsugiki.shipping import export_gguf
from tsugiki.terminal import Terminal

PAIRS = ("f32", "bf16, merged before", "q8_0", "q4_k_m of an f16", "beside its base")


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaCpp]:
    with LlamaCpp(1) as process:
        yield process


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's base and adapter, made once."""
    root = tmp_path_factory.mktemp("gguf-pairs")

    @cache
    def make(family: str) -> Path:
        base = save_wide(family, root / family / "base", TOKENIZER)
        peft_adapter(base, root / family / "adapter")
        return root / family

    return make


def good_file(pair: str, home: Path, folder: Path) -> str:
    """A file that is right, as `verify` takes it."""
    plan = plan_export(join(home / "base", home / "adapter"), "x")
    if pair == "bf16, merged before":
        write_merged(plan_merge(home / "adapter", home / "base", dtype="bf16"), folder / "merged")
        plan = plan_export(join(folder / "merged", None), "x")
        return str(write_gguf(plan, "bf16", folder / "x.gguf").path)
    if pair == "q4_k_m of an f16":  # a number rounded to 16 bits first gets other bytes
        write_gguf(plan, "f16", folder / "f16.gguf")
        return str(quantise_file(folder / "f16.gguf", folder / "x.gguf", "q4_k_m", 1).path)
    if pair == "beside its base":
        base = write_gguf(plan_export(join(home / "base", None), "x"), "q8_0", folder / "b.gguf")
        plan = plan_lora(join(home / "base", home / "adapter", untie=True), "x")
        write_lora(plan, folder / "lora.gguf")
        return f"{base.path}+{folder / 'lora.gguf'}"
    return str(write_gguf(plan, pair, folder / "x.gguf").path)


def opened(given: str) -> GgufArtefact:
    files = gguf_paths(given)
    assert files is not None
    return open_gguf_artefact(given, *files)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_alarm_on_good_pairs(
    family: str, pair: str, place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    """Forty of them: five for each of eight families."""
    home = place(family)
    adapter = open_artefact(str(home / "adapter"), str(home / "base"))
    report = verify_gguf(adapter, opened(good_file(pair, home, tmp_path)), llama)
    assert report.ok, failures(report)
    assert any(check.step == "5 logits" for check in report.checks)


@pytest.mark.parametrize("save", [save_tiny, save_wide])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pairs_would_show_a_fault(
    family: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    """Logits that spread by 2, which the adapter moves by 1, and somewhere by their whole spread."""
    adapted = peft_adapter(save(family, tmp_path / "base", TOKENIZER), tmp_path / "adapter").eval()
    ids = torch.randint(4, len(TOKENIZER), (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = adapted(ids).logits
        with adapted.disable_adapter():  # type: ignore[operator]
            plain = adapted(ids).logits
    moved, spread = logits - plain, float(plain.std())
    assert spread >= 2
    assert float(moved.square().mean().sqrt()) >= 1
    assert float(moved.abs().max()) >= spread


def test_two_files_and_the_finer_is_the_reference(
    place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    home = place("llama")
    names = {}
    for pair in PAIRS:
        (tmp_path / pair).mkdir()
        names[pair] = good_file(pair, home, tmp_path / pair)
    for a, b in ((0, 2), (2, 0), (0, 4), (2, 3), (3, 1)):
        report = verify_gguf(opened(names[PAIRS[a]]), opened(names[PAIRS[b]]), llama)
        assert report.ok, (a, b, failures(report))
        assert any("is the reference" in note for note in report.notes) == (
            (a, b) in ((2, 0), (3, 1))
        )
    report = verify_gguf(
        opened(names["f32"]), opened(names["beside its base"].split("+")[0]), llama
    )
    assert not report.ok, "without its adapter it is another model"


@pytest.mark.parametrize("name", VARIANTS)
def test_other_settings_of_the_families(name: str, llama: LlamaCpp, tmp_path: Path) -> None:
    base = save_variant(name, tmp_path / "base")
    file = write_gguf(plan_export(join(base, None), "x"), "q8_0", tmp_path / "x.gguf").path
    report = verify_gguf(open_artefact(str(base)), opened(str(file)), llama)
    assert report.ok, failures(report)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json alone", "unigram"])
def test_sentencepiece(kind: str, llama: LlamaCpp, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if kind == "unigram":
        tiny_model("gpt2", 0, train_unigram(folder)).save_pretrained(folder)
    else:
        rows = train_pieces(folder, special=("<|user|>", "<|end|>"), user=("<tool>",))
        tiny_model("llama", 0, rows).save_pretrained(folder)
        if "alone" in kind:
            (folder / "tokenizer.model").unlink()
    file = write_gguf(plan_export(join(folder, None), "x"), "f32", tmp_path / "x.gguf").path
    report = verify_gguf(open_artefact(str(folder)), opened(str(file)), llama)
    assert report.ok, failures(report)


def test_the_verb(place: Callable[[str], Path], tmp_path: Path) -> None:
    """The table, --json, the exit code, and limits that can be changed."""
    home = place("qwen3")
    file = good_file("q8_0", home, tmp_path)
    base = str(home / "base")
    runner = CliRunner()
    arguments = ["verify", str(home / "adapter"), file, "--model", base]
    good = runner.invoke(app, [*arguments, "--dtype", "q8_0"])
    assert good.exit_code == 0, good.output
    assert "quantised again" in good.output
    assert "equal in all" in good.output
    for more in (
        ["--max-error", "1e-6"],
        ["--max-kl", "1e-12"],
        ["--max-ratio", "-2"],
        ["--dtype", "q4_k_m"],
    ):
        bad = runner.invoke(app, [*arguments, *more, "--json"])
        assert bad.exit_code == 1, bad.output
        assert json.loads(bad.output.splitlines()[-1])["ok"] is False
    other = runner.invoke(app, ["verify", base, file, "--json"])
    assert other.exit_code == 1
    verdict = json.loads(other.output.splitlines()[-1])
    assert "quantised again" in verdict["failed"]


def test_bad_names(place: Callable[[str], Path], tmp_path: Path) -> None:
    home = place("qwen3")
    write_lora(
        plan_lora(join(home / "base", home / "adapter", untie=True), "x"), tmp_path / "lora.gguf"
    )
    (tmp_path / "text.gguf").write_text("not a model")
    runner = CliRunner()
    for given, words in (
        (str(tmp_path / "none.gguf"), "none.gguf"),
        (str(tmp_path / "text.gguf"), "not a whole GGUF file"),
        (str(tmp_path / "lora.gguf"), "is an adapter"),
        (f"{tmp_path / 'lora.gguf'}+{tmp_path / 'lora.gguf'}", "is an adapter"),
    ):
        done = runner.invoke(app, ["verify", str(home / "base"), given])
        assert done.exit_code != 0
        assert words in str(done.exception), done.exception


def with_the_extra_alone(folder: Path) -> Path:
    """A Python whose environment holds what tsugiki[gguf] asks for, and nothing else."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "tsugiki.pth").write_text(str(Path(tsugiki.__file__).parent.parent))
    wanted, seen = [("tsugiki", "gguf")], set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found = distribution(name)
        for asked in map(Requirement, found.requires or ()):
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                wanted += [(asked.name, more) for more in ("", *asked.extras)]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not top.startswith("__editable__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).absolute())
    return folder / "bin" / "python"


def test_it_needs_no_llama_cpp_python(place: Callable[[str], Path], tmp_path: Path) -> None:
    """Every step, in an environment that has the extra [gguf] and none of the others."""
    home = place("llama")
    file = good_file("q4_k_m of an f16", home, tmp_path)
    python = str(with_the_extra_alone(tmp_path / "env"))
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = partial(subprocess.run, capture_output=True, text=True, check=False, env=own)
    for absent in ("llama_cpp", "peft", "pytest"):
        assert f"No module named '{absent}'" in run([python, "-c", f"import {absent}"]).stderr
    verify = ["-m", "tsugiki", "verify", str(home / "adapter"), file, "--json"]
    done = run([python, *verify, "--model", str(home / "base")])
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout.splitlines()[-2])["checks"]
    assert {check["step"][0] for check in checks} == set("12345")
    assert all(check["proven"] for check in checks)


def test_a_head_apart_or_tied(llama: LlamaCpp, tmp_path: Path) -> None:
    for family in ("gpt2", "gemma3"):
        base = save_tiny(family, tmp_path / family / "base", TOKENIZER)
        file = write_gguf(
            plan_export(join(base, None), "x"), "f16", tmp_path / f"{family}.gguf"
        ).path
        report = verify_gguf(open_artefact(str(base)), opened(str(file)), llama)
        assert report.ok, failures(report)


def test_an_export_proves_itself(place: Callable[[str], Path], tmp_path: Path) -> None:
    home = place("qwen3")
    source = [str(home / "adapter"), "--model", str(home / "base")]
    for flags in (["--gguf", "f16,q4_k_m"], ["--gguf-lora"]):
        done = CliRunner().invoke(app, ["export", *source, *flags, "--output", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert "each is what it was made of" in done.output
    # a file that is not what it should be: told, and an exit code
    shipped = export_gguf(str(home / "base"), ["q8_0"], tmp_path / "base", Terminal())
    assert prove(source[0], shipped, Terminal(), model=source[2]) is Proof.WRONG


def test_without_llama_cpp_the_rest_is_proven_and_what_is_not_is_said(
    place: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    home = place("qwen3")
    source, model = str(home / "adapter"), str(home / "base")
    shipped = export_gguf(source, ["f16", "q8_0"], tmp_path / "out", Terminal(), model=model)
    assert prove(source, shipped, Terminal(), model=model) is Proof.UNPROVEN
    told = " ".join(capsys.readouterr().out.split())
    assert "% equal" not in told, "every number was compared, none differs"
    assert "not proven without llama.cpp" in told
    assert "pip install 'tsugiki[gguf]'" in told
    assert "not proven: each is what it was made of as far as it can be told" in told
    shipped = export_gguf(model, ["q8_0"], tmp_path / "base", Terminal())
    found = prove(source, shipped, Terminal(), model=model)
    assert found is Proof.WRONG, "numbers need no llama.cpp"


@pytest.mark.parametrize(
    ("lack", "flags", "code"),
    [
        ("llama.cpp", ["--gguf", "f16"], 3),
        ("llama.cpp", ["--gguf-lora"], 3),
        ("disk", ["--gguf-lora"], 3),
        ("llama.cpp and disk", ["--portable"], 0),
    ],
)
def test_what_could_not_be_proven_ends_with_its_own_exit_code(
    lack: str,
    flags: list[str],
    code: int,
    place: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3, and 0 only for what was proven whole or with --no-verify; the file is there either way."""
    home = place("llama")
    if "llama.cpp" in lack:
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
    if "disk" in lack:  # room for an adapter, not for its base
        monkeypatch.setattr("tsugiki.files.free_bytes", lambda path: 1_500_000)
        assert (home / "base" / "model.safetensors").stat().st_size > 1_500_000
    source = ["export", str(home / "adapter"), "--model", str(home / "base"), *flags]
    done = CliRunner().invoke(app, [*source, "--output", str(tmp_path / "a"), "--json"])
    assert done.exit_code == code, done.output
    lines = [json.loads(line) for line in done.output.splitlines()]
    said = next(line for line in lines if line["kind"] in ("proven", "verdict"))
    assert (said["ok"], said["whole"]) == (True, code == 0)
    assert list((tmp_path / "a").iterdir())
    assert not list(tmp_path.rglob("*.tmp"))
    bare = CliRunner().invoke(app, [*source, "--output", str(tmp_path / "b"), "--no-verify"])
    assert bare.exit_code == 0, bare.output


def test_too_little_memory_proves_nothing_and_fails_nothing(
    place: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3, with the reason and what to do; a fault outweighs it."""
    home = place("qwen3")
    source = [str(home / "adapter"), "--model", str(home / "base")]
    monkeypatch.setattr(process, "memory_left", lambda: 30 << 20)  # a full machine
    monkeypatch.setattr(process, "LEAST_MEMORY", 30 << 20)
    done = CliRunner().invoke(app, ["export", *source, "--gguf", "q8_0", "--output", str(tmp_path)])
    assert done.exit_code == 3, done.output
    told = " ".join(done.output.split())
    assert "the memory does not suffice for llama.cpp" in told
    assert "end other programs, then run it again" in told
    assert "not proven: each is what it was made of as far as it can be told" in told
    (file,) = map(str, tmp_path.glob("*.gguf"))
    done = CliRunner().invoke(app, ["verify", source[0], file, *source[1:], "--json"])
    assert done.exit_code == 3, done.output
    report, verdict = (json.loads(line) for line in done.output.splitlines()[-2:])
    assert (verdict["ok"], verdict["whole"], verdict["failed"]) == (True, False, [])
    unproven = [check["step"] for check in report["checks"] if not check["proven"]]
    assert "5 logits" in unproven
    assert any(check["proven"] for check in report["checks"])
    bad = CliRunner().invoke(app, ["verify", *source, file, "--dtype", "q6_k"])
    assert bad.exit_code == 1, "a fault outweighs it"


def test_a_step_without_memory_is_not_proven(tmp_path: Path) -> None:
    """Torch's and numpy's own words for it; another error of theirs is a bug and stays one."""

    def asked(ask: Callable[[int], object]) -> list[Check]:
        return [Check("2 tensors", "x", "", "", ask(1 << 50) is None)]

    for ask in (lambda n: torch.empty(n, dtype=torch.uint8), lambda n: np.empty(n, np.uint8)):
        (check,) = run_steps([("5 logits", partial(asked, ask))])
        assert (check.ok, check.proven) == (True, False)
        assert any("--layer-by-layer" in line for line in check.details)
        assert Report("a", "b", (check,)).proof is Proof.UNPROVEN
    with pytest.raises(RuntimeError):
        run_steps([("5 logits", partial(asked, lambda _: torch.ones(2) @ torch.ones(3)))])


def test_verify_without_llama_cpp_ends_with_that_code_too(
    place: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = place("qwen3")
    file = good_file("q8_0", home, tmp_path)
    arguments = ["verify", str(home / "adapter"), file, "--model", str(home / "base")]
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3, done.output
    assert "not proven" in done.output
    wrong = CliRunner().invoke(app, [*arguments, "--dtype", "q6_k"])
    assert wrong.exit_code == 1, "a fault outweighs it"


def test_the_demo_goes_on_without_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    our_adapter(save_tiny("llama", tmp_path / "base", TOKENIZER), tmp_path / "run" / "adapter")
    ship(tmp_path / "run" / "adapter", "a text to read " * 20, Terminal())
    assert "not proven" in capsys.readouterr().out
    assert list((tmp_path / "run" / "gguf").glob("*.gguf"))
