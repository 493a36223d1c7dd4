"""Verify finds and names each fault of a GGUF file, in F32 and in quantised types."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_wide
from gguf_edit import Tensors, edit
from test_exporting_gguf import LLAMA3, rows_in_pairs
from test_merging_peft import peft_adapter
from test_proof_faults import TOKENIZER, failures

from tsugiki.adapters.joined import join
from tsugiki.errors import TsugikiError
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.exporting.gguf_lora import plan_lora, write_lora
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.formats.quantise import quantise_file
from tsugiki.merging import plan_merge, write_merged
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.checks import Report
from tsugiki.proof.gguf.artefact import open_gguf_artefact
from tsugiki.proof.gguf.form import form_of
from tsugiki.proof.gguf.verify import verify_gguf

TESTED = ("llama", "qwen3", "gemma3", "gpt2")
ADDED = "<|接ぎ木|>"
HEADS, GROUPS = 4, 2


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaCpp]:
    with LlamaCpp(1) as process:
        yield process


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's base, adapter, F32 file, and the file of the base alone; made once."""
    root = tmp_path_factory.mktemp("gguf-faults")

    @cache
    def make(family: str) -> Path:
        home = root / family
        more = {"rope_parameters": LLAMA3} if family == "llama" else {}
        base = save_wide(family, home / "base", TOKENIZER, **more)
        peft_adapter(base, home / "adapter")
        write_gguf(plan_export(join(base, home / "adapter"), "x"), "f32", home / "f32.gguf")
        write_gguf(plan_export(join(base, None), "x"), "f32", home / "base.gguf")
        write_lora(plan_lora(join(base, home / "adapter", untie=True), "x"), home / "lora.gguf")
        return home

    return make


def compare(
    home: Path, file: Path, llama: LlamaCpp, lora: Path | None = None, **how: Any
) -> Report:
    adapter = open_artefact(str(home / "adapter"), str(home / "base"))
    other = open_gguf_artefact(file.name, file, lora)
    return verify_gguf(adapter, other, llama, **{"logits": False, **how})


def numbers(home: Path, changed: bool = True) -> Tensors:
    """Every tensor as the file has it, with the adapter's part or without, from the reference."""
    adapter = open_artefact(str(home / "adapter"), str(home / "base"))
    return {n: t.whole(changed).numpy() for n, t in form_of(adapter).tensors.items() if t.changed}


def key(file: Path, end: str) -> dict[str, Any]:
    """The one key with that end, and its value."""
    known = open_gguf(file).metadata
    (name,) = (k for k in known if k.endswith(end))
    return {name: known[name]}


def norm_epsilon(home: Path, bad: Path) -> None:
    edit(home / "f32.gguf", bad, {k: v * 10 for k, v in key(home / "f32.gguf", "epsilon").items()})


def rope_base(home: Path, bad: Path) -> None:
    found = key(home / "f32.gguf", "rope.freq_base")
    edit(home / "f32.gguf", bad, {k: v * 2 for k, v in found.items()})


def untouched_tensor(home: Path, bad: Path) -> None:
    values = open_gguf(home / "f32.gguf").values("token_embd.weight")
    edit(home / "f32.gguf", bad, tensors={"token_embd.weight": values * np.float32(1.01)})


def changed_tensor(home: Path, bad: Path) -> None:
    values = open_gguf(home / "f32.gguf").values("blk.1.ffn_down.weight")
    edit(home / "f32.gguf", bad, tensors={"blk.1.ffn_down.weight": values * np.float32(1.01)})


def merged_in_bf16(home: Path, bad: Path) -> None:
    merged = write_merged(
        plan_merge(home / "adapter", home / "base", dtype="bf16"), bad.parent / "low"
    )
    write_gguf(plan_export(join(merged.folder, None), "x"), "f32", bad)


def rows_of_k(home: Path, bad: Path) -> None:
    """As the checkpoint has them; in families that keep that order, as Llama's would be."""
    values = open_gguf(home / "f32.gguf").values("blk.0.attn_k.weight")
    pairs = rows_in_pairs(values, GROUPS)
    if home.name == "llama":  # back again: the inverse of the permutation
        order = np.argsort(rows_in_pairs(np.arange(len(values))[:, None], GROUPS)[:, 0])
        pairs = values[order]
    edit(home / "f32.gguf", bad, tensors={"blk.0.attn_k.weight": pairs})


def dropped_rope_freqs(home: Path, bad: Path) -> None:
    edit(home / "f32.gguf", bad, tensors={"rope_freqs.weight": None})


def untransposed(home: Path, bad: Path) -> None:
    values = open_gguf(home / "f32.gguf").values("blk.0.attn_output.weight")
    edit(home / "f32.gguf", bad, tensors={"blk.0.attn_output.weight": values.T})


def swapped_halves(home: Path, bad: Path) -> None:
    """B·A merged as (B·A)ᵀ, which the shapes of a square projection allow."""
    name = "blk.0.attn_output.weight"
    whole, base = numbers(home)[name], numbers(home, changed=False)[name]
    edit(home / "f32.gguf", bad, tensors={name: base + (whole - base).T})


def scale_twice(home: Path, bad: Path) -> None:
    whole, base = numbers(home), numbers(home, changed=False)
    edit(home / "f32.gguf", bad, tensors={n: base[n] + 2 * (whole[n] - base[n]) for n in whole})


def other_template(home: Path, bad: Path) -> None:
    found = key(home / "f32.gguf", "chat_template")
    edit(
        home / "f32.gguf",
        bad,
        {k: v.replace("<|im_end|>\n", "<|im_end|>") for k, v in found.items()},
    )


def missing_token(home: Path, bad: Path) -> None:
    tokens = key(home / "f32.gguf", "ggml.tokens")["tokenizer.ggml.tokens"]
    at = tokens.index(ADDED)
    tokens[at] = f"[PAD{at}]"
    edit(home / "f32.gguf", bad, {"tokenizer.ggml.tokens": tokens})


def other_stop(home: Path, bad: Path) -> None:
    edit(home / "f32.gguf", bad, {"tokenizer.ggml.eos_token_id": 7})


# fault: (the step that must see it, words of its name)
FAULTS: dict[Callable[[Path, Path], None], tuple[str, str]] = {
    norm_epsilon: ("1 settings", "epsilon"),
    rope_base: ("1 settings", "rope.freq_base"),
    other_stop: ("1 settings", "eos_token_id"),
    untouched_tensor: ("2 tensors", "coefficient 1.01"),
    changed_tensor: ("2 tensors", "coefficient 1.0"),
    merged_in_bf16: ("2 tensors", "rounded to bfloat16"),
    rows_of_k: ("2 tensors", "blk.0.attn_k.weight"),
    dropped_rope_freqs: ("2 tensors", "rope_freqs.weight: missing"),
    untransposed: ("2 tensors", "blk.0.attn_output.weight"),
    swapped_halves: ("2 tensors", "the adapter's part"),
    scale_twice: ("2 tensors", "the scale was applied twice"),
    other_template: ("4 template", "other ids from position"),
    missing_token: ("3 token ids", ADDED),
}
ONLY = {
    rope_base: ("llama", "qwen3", "gemma3"),
    rows_of_k: ("llama", "qwen3", "gemma3"),
    dropped_rope_freqs: ("llama",),
    untransposed: ("gpt2",),
}
CASES = [(f, fault) for f in TESTED for fault in FAULTS if f in ONLY.get(fault, TESTED)]


@pytest.mark.parametrize(
    ("family", "fault"), CASES, ids=[f"{f}-{fault.__name__}" for f, fault in CASES]
)
def test_each_fault_is_found_and_named(
    family: str,
    fault: Callable[[Path, Path], None],
    place: Callable[[str], Path],
    llama: LlamaCpp,
    tmp_path: Path,
) -> None:
    fault(place(family), tmp_path / "bad.gguf")
    found = failures(compare(place(family), tmp_path / "bad.gguf", llama))
    step, words = FAULTS[fault]
    assert any(line.startswith(step) and words in line for line in found), found
    others = {line.split(":")[0] for line in found} - {step}
    assert not others, "one fault, one step"


def test_an_unpermuted_k_is_called_so(
    place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    rows_of_k(place("llama"), tmp_path / "bad.gguf")
    found = failures(compare(place("llama"), tmp_path / "bad.gguf", llama))
    assert any("not permuted" in line for line in found), found


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "q4_k_m") for family in TESTED), ("llama", "q8_0")]
)
def test_faults_of_quantised_tensors(
    family: str, kind: str, place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    """Quantised from a file with a fault: a tensor × 1.01, the scale twice, halves swapped."""
    for fault, words in (
        (untouched_tensor, "token_embd.weight"),
        (changed_tensor, "blk.1.ffn_down.weight"),
        (scale_twice, "the scale was applied twice"),
        (swapped_halves, "the adapter's part"),
    ):
        fault(place(family), tmp_path / f"{fault.__name__}.gguf")
        bad = tmp_path / f"{fault.__name__}-{kind}.gguf"
        quantise_file(tmp_path / f"{fault.__name__}.gguf", bad, kind, 1)
        found = failures(compare(place(family), bad, llama))
        assert any("2 tensors" in line and words in line for line in found), (words, found)
    good = tmp_path / "good.gguf"
    quantise_file(place(family) / "f32.gguf", good, kind, 1)
    assert compare(place(family), good, llama).ok


def test_a_lower_type_than_was_asked(
    place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    home = place("llama")
    plan = plan_export(join(home / "base", home / "adapter"), "x")
    bad = write_gguf(plan, "bf16", tmp_path / "bad.gguf").path
    assert compare(home, bad, llama).ok
    found = failures(compare(home, bad, llama, dtype="f32"))
    assert any("the file says bf16, f32 was asked" in line for line in found), found


@pytest.mark.parametrize("family", TESTED)
def test_faults_of_an_adapter_beside_its_base(
    family: str, place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    home = place(family)
    lora = open_gguf(home / "lora.gguf")
    name = "blk.0.attn_output.weight"
    a, b = (lora.values(f"{name}.{half}") for half in ("lora_a", "lora_b"))
    cases = {
        "the scale was applied twice": {f"{name}.lora_b": b * np.float32(2)},
        "does not fit": {f"{name}.lora_a": b, f"{name}.lora_b": a},
        "the adapter's part is missing": {f"{name}.lora_a": None, f"{name}.lora_b": None},
        "of another adapter, or swapped": {f"{name}.lora_a": b.T, f"{name}.lora_b": a.T},
    }
    for words, tensors in cases.items():
        bad = edit(home / "lora.gguf", tmp_path / "bad.gguf", tensors=tensors)
        found = failures(compare(home, home / "base.gguf", llama, bad))
        assert any(words in line for line in found), (words, found)
    assert compare(home, home / "base.gguf", llama, home / "lora.gguf").ok


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "q4_k_m") for family in TESTED), ("gemma3", "f32"), ("gpt2", "q8_0")],
)
def test_a_flipped_byte_is_found_and_named_wherever_it_is(
    family: str, kind: str, place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    """In the numbers, the tokens, the merges and the settings; not in what a file is called."""
    home, good = place(family), tmp_path / "good.gguf"
    plan = plan_export(join(home / "base", home / "adapter"), "x")
    if kind == "q4_k_m":
        quantise_file(home / "f32.gguf", good, kind, 1)
    else:
        write_gguf(plan, kind, good)
    content, file, chance = good.read_bytes(), open_gguf(good), random.Random(kind)
    spots = [
        ((info.name,), chance.randrange(info.begin, info.end))
        for info in chance.choices(list(file.tensors.values()), k=4)
    ]
    for name in ("tokens", "merges"):
        begin = content.index(f"tokenizer.ggml.{name}".encode())
        named = ("3 token ids", f"'tokenizer.ggml.{name}'")  # read otherwise, or not at all
        spots.append((named, chance.randrange(begin + 100, begin + 1000)))
    for end in ("block_count", "epsilon"):
        (name,) = key(good, end)
        spots.append(((name,), content.index(name.encode()) + len(name) + 6))  # inside the value
    for words, at in spots:
        bad = bytearray(content)
        bad[at] ^= 1 << chance.randrange(8)
        (tmp_path / "bad.gguf").write_bytes(bad)
        try:
            found = failures(compare(home, tmp_path / "bad.gguf", llama))
        except TsugikiError as error:
            found = [str(error)]
        assert any(word in line for word in words for line in found), (words, at, found)


@pytest.mark.parametrize("family", TESTED)
def test_a_truncated_file_is_named(
    family: str, place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    content = (place(family) / "f32.gguf").read_bytes()
    for left in (0, 5, 3000, 100_000, -1):
        (tmp_path / "bad.gguf").write_bytes(content[:left])
        with pytest.raises(TsugikiError, match=r"bad\.gguf"):
            compare(place(family), tmp_path / "bad.gguf", llama)


def test_a_fault_in_the_arithmetic_shows_in_the_logits_too(
    place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    for fault in (dropped_rope_freqs, rows_of_k, scale_twice):
        fault(place("llama"), tmp_path / f"{fault.__name__}.gguf")
        report = compare(place("llama"), tmp_path / f"{fault.__name__}.gguf", llama, logits=True)
        assert any(line.startswith("5 logits") for line in failures(report)), fault


def test_nan_in_a_tensor(place: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path) -> None:
    values = open_gguf(place("qwen3") / "f32.gguf").values("blk.0.ffn_up.weight").copy()
    values[3, 5] = torch.nan
    bad = edit(
        place("qwen3") / "f32.gguf", tmp_path / "b.gguf", tensors={"blk.0.ffn_up.weight": values}
    )
    found = failures(compare(place("qwen3"), bad, llama))
    assert any("NaN" in line for line in found), found
