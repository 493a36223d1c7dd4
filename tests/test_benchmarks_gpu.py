"""The GPU benchmark's road with the plain bodies: options, every part, table, JSON, failures told."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from benchmarks import gpu, gpu_contestants, record

TINY = [
    "--device", "cpu", "--shape", "tiny", "--rows", "1", "--length", "24", "--rounds", "1",
    "--steps", "1", "--budget", "0.001", "--ours", "ours,ours-dry,ours-fp16",
    "--against", "peft,peft-nf4",
]  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts run in this process, which has the imports."""

    def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
        return gpu_contestants.run(argparse.Namespace(**{**vars(options), "worker": name}))

    monkeypatch.setattr(gpu, "_worker", run)


def test_every_part_runs_on_a_cpu(here: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu.main([*TINY, "--json"])
    report = json.loads(capsys.readouterr().out)
    figures = gpu.figures_of(report)
    assert code == 0, report["gates"]
    assert figures["kernels wrong"] == figures["gates failed"] == 0
    assert set(report["products"]["rows"]) == {"64x64", "32x64", "160x64", "64x160", "300x64"}
    for name in ("ours", "ours-dry", "ours-fp16", "peft"):
        row = report["rows"][name]
        assert 0 < row["share_of_peak"] < 1, name
        assert row["tokens_per_second"] == pytest.approx(24 / row["step"])
    foreign = report["rows"]["peft-nf4"]  # where bitsandbytes is not installed, it says so
    assert "step" in foreign or "bitsandbytes" in foreign["failed"]
    ratio = report["rows"]["peft"]["step"] / report["rows"]["ours"]["step"]
    assert report["ratios"]["peft/ours"] == ratio
    assert "TFLOP/s" in gpu.table(report)


def test_without_a_gpu_it_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "machine", lambda: {"gpu": None})
    with pytest.raises(SystemExit, match="--device cpu --shape tiny"):
        gpu.main([])
    with pytest.raises(SystemExit, match="unknown contestant theirs: one of ours"):
        gpu.main(["--against", "theirs"])


def test_a_part_that_dies_is_a_row_and_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_worker", lambda name, options: {"failed": f"{name} died"})
    assert gpu.main(TINY) == 1
    said = capsys.readouterr().out
    assert "peft-nf4     did not run: peft-nf4 died" in said
    assert "kernels: kernels died" in said
