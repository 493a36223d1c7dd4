"""Runs that cannot go on: a full disk at every operation of a save, signals inside evaluations."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import tiny_model
from runs import forked, in_process, make_place, result
from safetensors import SafetensorError

from tsugiki.adapters.attach import attach
from tsugiki.adapters.storage import save_adapter
from tsugiki.config import LoraConfig
from tsugiki.errors import DiskError, Interrupted
from tsugiki.training import checkpoint, loop, metrics
from tsugiki.training.checkpoint import newest_whole, save_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and an uninterrupted run to compare with."""
    folder = tmp_path_factory.mktemp("runs")
    make_place(folder, forked)
    return folder


class FullDisk:
    """Counts what is asked of the disk; the chosen one fails with ENOSPC, a write half-way."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.failed = ""
        self.arm(0)
        for name in ("mkdir", "fsync", "rename", "replace"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        for name in ("write_text", "write_bytes"):
            patch.setattr(Path, name, self._wrapped("write", getattr(Path, name), half))
        patch.setattr(
            checkpoint, "save_file", self._wrapped("tensors", checkpoint.save_file, half_tensors)
        )

    def arm(self, fail_at: int, kind: str | None = None) -> None:
        """The n-th operation (of a kind) from now on fails; 0: none."""
        self.fail_at, self.kind, self.seen = fail_at, kind, []

    def _wrapped(
        self, name: str, real: Callable[..., object], torn: Callable[..., None] | None = None
    ) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            self.seen.append(name)
            counted = [one for one in self.seen if self.kind in (None, one)]
            if self.kind not in (None, name) or len(counted) != self.fail_at:
                return real(*arguments, **named)
            self.fail_at, self.failed = 0, name
            if torn is not None:
                torn(real, *arguments)
            raise OSError(errno.ENOSPC, "No space left on device")

        return call


def half(real: Callable[..., object], path: Path, content: str | bytes) -> None:
    real(path, content[: len(content) // 2])


def half_tensors(_: Callable[..., object], tensors: object, path: Path) -> None:
    with open(path, "wb") as stream:
        stream.write(b"torn")
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """A disk that can be made full."""
    return FullDisk(monkeypatch)


def every_failure(disk: FullDisk, save: Callable[[], object]) -> Iterator[str | None]:
    """Do a save with each of its operations failing in turn; yields what was told, if anything."""
    for number in range(1, 1000):
        disk.arm(number)
        told = None
        try:
            save()
        except DiskError as error:
            assert "disk is full" in error.problem
            told = error.problem
        if disk.fail_at:  # there are fewer operations than that
            disk.arm(0)
            return
        yield told


def test_a_full_disk_at_any_operation_of_a_checkpoint(tmp_path: Path, disk: FullDisk) -> None:
    """Each mkdir, write, fsync and rename in turn: the checkpoints before are whole."""
    weights = {"weights.a": torch.arange(1000.0)}
    for step in (3, 6):
        save_checkpoint(tmp_path, step, weights, {"step": step})
    before = sorted(p.name for p in tmp_path.iterdir())
    kinds: list[str] = []
    for told in every_failure(disk, lambda: save_checkpoint(tmp_path, 9, weights, {"step": 9})):
        kinds.append(disk.failed)
        found, notes = newest_whole(tmp_path)
        assert found is not None
        assert not notes, "nothing half-written"
        if found.step == 9:  # the fsync after the rename: it is whole already
            assert torch.equal(found.tensors["weights.a"], weights["weights.a"])
            shutil.rmtree(found.path)
            if not (tmp_path / "step-3").exists():
                save_checkpoint(tmp_path, 3, weights, {"step": 3})
        else:
            assert told is not None
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert {kinds.count(k) for k in ("tensors", "rename")} == {1}
    assert kinds.count("write") == 2
    assert kinds.count("fsync") == 5, "three files, the folder, the folder above"


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_at_any_operation_of_an_adapter(
    tmp_path: Path, disk: FullDisk, there: bool
) -> None:
    """The adapter that was there stays, or the new one is whole; nothing else is left."""
    model, folder = tiny_model("llama"), tmp_path / "adapter"
    attach(model, LoraConfig(r=2))

    def content() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}

    def save(step: int = 2) -> None:
        save_adapter(model, folder, training_info={"step": step}, replace=True)

    save()
    new = content()
    shutil.rmtree(folder)
    if there:
        save(step=1)
    old, kinds = content(), []
    for told in every_failure(disk, save):
        kinds.append(disk.failed)
        assert content() in (old, new)
        assert told is not None or content() == new
        assert [p.name for p in tmp_path.iterdir()] == ["adapter"] * bool(content())
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            save(step=1)
    assert kinds.count("write") == 4
    assert kinds.count("fsync") == 6
    assert kinds.count("rename") == (2 if there else 1)


@pytest.mark.parametrize(
    ("save", "kind"),
    [("save_checkpoint", "tensors"), ("save_checkpoint", "rename"), ("keep_state", "write")],
)
def test_a_run_goes_on_after_a_full_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch, save: str, kind: str
) -> None:
    name = f"full-{kind}"
    original, saves = getattr(loop, save), {"count": 0}
    with monkeypatch.context() as patch:
        disk = FullDisk(patch)

        def fails(*given: object) -> object:
            saves["count"] += 1
            disk.arm(1 if saves["count"] == 3 else 0, kind)
            return original(*given)

        patch.setattr(loop, save, fails)
        with pytest.raises(DiskError, match="disk is full") as caught:
            in_process(place, name)
    assert f"--resume {place / name}" in str(caught.value.fix)
    assert "the disk is full" in (place / name / "report.html").read_text()
    in_process(place, name, resume=True)
    assert result(place / name) == result(place / "whole")


@pytest.mark.parametrize(
    ("work", "at"),
    [("held_out_loss", 0), ("answer_all", 0), ("held_out_loss", 2), ("answer_all", 1)],
)
def test_a_signal_breaks_off_evaluations_and_samples(
    place: Path, monkeypatch: pytest.MonkeyPatch, work: str, at: int
) -> None:
    """The first, a later and the middle one never end by themselves; nothing is lost."""
    number = signal.SIGTERM if at else signal.SIGINT
    name = f"{work}-{at}-{number}"
    original, calls = getattr(loop, work), {"count": 0}

    def endless(*given: object) -> object:
        calls["count"] += 1
        if calls["count"] == at + 1:
            os.kill(os.getpid(), number)
            for _ in range(6000):  # a minute, were it not broken off
                time.sleep(0.01)
            raise AssertionError("the signal was not obeyed")
        return original(*given)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, work, endless)
        with pytest.raises(Interrupted, match="everything is saved") as caught:
            in_process(place, name)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    step = {"held_out_loss": 6, "answer_all": 12}[work] * at
    assert f"stopped at step {step} of" in (place / name / "report.html").read_text()
    in_process(place, name, resume=True)
    assert result(place / name) == result(place / "whole")
    for file, kind in ((metrics.METRICS, "held_out"), (metrics.SAMPLES, "sample")):
        done = [x["step"] for x in metrics.read(place / name, file) if x["kind"] == kind]
        whole = [x["step"] for x in metrics.read(place / "whole", file) if x["kind"] == kind]
        assert done == whole, "each once"
