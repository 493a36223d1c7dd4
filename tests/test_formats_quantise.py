"""Quantised files: the mixes and bytes of llama.cpp, whole or absent, and read back."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_hostile import KINDS as MALFORMED
from gguf_tiny import NUMBERS, Tiny, data_digest, mix_cases, types_digest, write_outline, write_tiny

from tsugiki.errors import DiskError, ModelError, RunError, TsugikiError, UsageError
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.mixes import KINDS, choose_types
from tsugiki.formats.quantise import dequantise_file, quantise_file

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "quantise_mix.json"
ASKED = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


@cache
def oracle() -> dict[str, Any]:
    """What llama-cpp-python wrote when `benchmarks/quantise_mix.py` last ran."""
    found: dict[str, Any] = json.loads(RESULT.read_text())
    return found


@pytest.mark.parametrize("case", mix_cases())
def test_each_tensor_gets_the_type_that_llama_cpp_gives_it(case: str, tmp_path: Path) -> None:
    """For every file type; recorded from `llama_model_quantize` on the same shapes."""
    path = tmp_path / "model.gguf"
    write_outline(path, mix_cases()[case])
    file = open_gguf(path)
    for name, kind in KINDS.items():
        types = {tensor: t.name for tensor, t in choose_types(file, kind).items()}
        assert types_digest(types) == oracle()["types"][case][name], f"{case} in {name}"


@pytest.mark.parametrize("kind", ASKED)
def test_the_bytes_are_llama_cpps(kind: str, tmp_path: Path) -> None:
    """Recorded from `llama_model_quantize` on the same numbers; and the report is the file's."""
    if platform.machine() != "x86_64":
        pytest.skip("recorded on x86-64; other processors round some scales otherwise")
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    write_tiny(source, NUMBERS)
    report = quantise_file(source, target, kind, threads=2)
    file = open_gguf(target)
    assert data_digest(file) == oracle()["numbers"][kind]
    assert report.types == {name: info.type.name for name, info in file.tensors.items()}
    assert sum(report.counts.values()) == len(report.types)
    assert report.bytes_after == sum(info.nbytes for info in file.tensors.values())
    assert report.bytes_before == sum(info.nbytes for info in open_gguf(source).tensors.values())


def test_metadata_stays_and_says_the_new_type(tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    write_tiny(source, Tiny(), extra={"general.file_type": 0, "tsugiki.mark": 7})
    quantise_file(source, target, "Q4_K_M", threads=1)
    before, after = open_gguf(source).metadata, open_gguf(target).metadata
    assert (after["general.file_type"], after["general.quantization_version"]) == (15, 2)
    for key in before:
        if key != "general.file_type":
            assert after.raw(key) == before.raw(key)
    assert set(after) == {*before, "general.quantization_version"}


def test_bytes_do_not_depend_on_threads_and_may_be_watched(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    write_tiny(source, Tiny(hidden=288, inner=2048, layers=1, dtype="BF16"))
    seen: list[tuple[int, int]] = []
    for threads in (1, 3):
        quantise_file(source, tmp_path / f"{threads}.gguf", "q5_k_m", threads=threads,
                      progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()
    total = sum(info.nbytes for info in open_gguf(source).tensors.values())
    assert seen[-1] == (total, total)
    assert len(seen) >= 10


def test_what_has_its_type_is_copied_and_nothing_is_quantised_twice(tmp_path: Path) -> None:
    source, eight = tmp_path / "source.gguf", tmp_path / "eight.gguf"
    write_tiny(source, Tiny(dtype="F16"))
    quantise_file(source, eight, "q8_0", threads=1)
    quantise_file(eight, tmp_path / "again.gguf", "q8_0", threads=1)
    assert (tmp_path / "again.gguf").read_bytes() == eight.read_bytes()
    with pytest.raises(ModelError, match=r"token_embd\.weight is Q8_0"):
        quantise_file(eight, tmp_path / "four.gguf", "q4_0", threads=1)
    quantise_file(source, tmp_path / "whole.gguf", "f32", threads=1)
    half, whole = open_gguf(source), open_gguf(tmp_path / "whole.gguf")
    for name in half.tensors:
        np.testing.assert_array_equal(half.values(name), whole.values(name))


def test_numbers_come_back_as_f32(tmp_path: Path) -> None:
    """Dequantised by ggml as gguf-py reads them; a second time nothing changes."""
    source = tmp_path / "source.gguf"
    write_tiny(source, Tiny(hidden=256, inner=288, layers=1))
    for kind in ("q2_k", "q3_k_m", "bf16"):
        small, wide = tmp_path / f"{kind}.gguf", tmp_path / f"{kind}.f32.gguf"
        quantise_file(source, small, kind, threads=1)
        dequantise_file(small, wide, threads=1)
        file, back = open_gguf(small), open_gguf(wide)
        assert {info.type.name for info in back.tensors.values()} == {"F32"}
        for name in file.tensors:
            np.testing.assert_array_equal(file.values(name), back.values(name))


def spoil(path: Path, name: str, value: float) -> None:
    """Write one number into the midst of an F32 tensor."""
    info = open_gguf(path).tensors[name]
    with open(path, "r+b") as stream:
        stream.seek(info.begin + info.nbytes // 8 * 4)
        stream.write(np.float32(value).tobytes())


def test_bad_input_is_one_clear_error_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "out" / "target.gguf"

    def refused(kind: str, words: str, error: type[TsugikiError] = ModelError) -> None:
        with pytest.raises(error, match=words):
            quantise_file(source, target, kind, threads=1)
        assert not target.exists()
        assert not target.parent.exists() or not any(target.parent.iterdir())

    write_tiny(source, Tiny())
    refused("q4_k_n", "did you mean q4_k", UsageError)
    for value in (np.nan, np.inf):
        spoil(source, "blk.1.ffn_up.weight", value)
        refused("q8_0", "blk.1.ffn_up.weight in .* not finite")
    spoil(source, "blk.1.ffn_up.weight", 65520.0)
    refused("f16", "blk.1.ffn_up.weight has numbers that the type written cannot hold\n.*bf16")
    quantise_file(source, tmp_path / "wide.gguf", "bf16", threads=1)
    with pytest.raises(RunError, match="exists already"):
        quantise_file(source, tmp_path / "wide.gguf", "bf16", threads=1)
    monkeypatch.setattr("tsugiki.files.free_bytes", lambda _: 1000)
    refused("q8_0", "(?s)too little disk space.*1.0 KB free.*needed", DiskError)
    monkeypatch.undo()
    for extra, words in (
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 2}, "one of 2 parts"),
    ):
        write_tiny(source, Tiny(), extra=extra)
        refused("q8_0", words)
    write_tiny(source, Tiny("gpt2"))
    source.write_bytes(source.read_bytes().replace(b"gpt2", b"gptz"))
    refused("q8_0", "(?s)architecture is not known here.*gptz.*llama, qwen2")
    for content, words_ in MALFORMED.values():
        source.write_bytes(content)
        refused("q8_0", (words_ and "GGUF") or "architecture")


def test_a_killed_run_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    """kill −9 of the parent in the midst; the same command then works."""
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    write_tiny(source, Tiny(hidden=512, inner=2560, layers=1, dtype="F16"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom tsugiki.formats.quantise import quantise_file\n"
        "def say(done, total): print(done, flush=True)\n"
        "quantise_file(Path(sys.argv[1]), Path(sys.argv[2]), 'q4_k_m', 1, progress=say)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not target.exists()
    time.sleep(0.2)
    assert quantise_file(source, target, "q4_k_m", threads=2).counts["Q4_K"] > 4
