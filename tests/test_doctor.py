"""`tsugiki doctor`: decisions as a run makes them, and one advice for each thing that is amiss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki import device
from tsugiki.device import Decisions
from tsugiki.doctor import FEW_FAULTS, PACKAGES, Machine, advise, look
from tsugiki.errors import RunError, UsageError

GOOD = Machine(
    system="Linux x86_64", cpu="a CPU", cores=8, present=8, load=0.2, free=30 << 30,
    total=32 << 30, swapped=0, disk=100 << 30, faults=0.1, instructions=("amx_bf16", "avx2"),
    gpus=(), driver=False, cuda=None, governor="performance", huge_pages="madvise",
    on_battery=False, omp=None, plain="", packages=dict.fromkeys(PACKAGES, "1.0"),
)  # fmt: skip
NONE: dict[str, str | None] = dict.fromkeys(PACKAGES)
GPU = (("a GPU", 8 << 30),)
AMISS: list[tuple[dict[str, Any], tuple[str, str], str]] = [
    ({"driver": True}, ("cpu", "bfloat16"), "torch sees no GPU"),
    ({"driver": True, "gpus": GPU, "packages": NONE}, ("cuda", "bfloat16"), "triton"),
    ({"driver": True, "gpus": GPU, "packages": NONE}, ("cuda", "bfloat16"), "bitsandbytes"),
    ({"omp": "2"}, ("cpu", "bfloat16"), "OMP_NUM_THREADS=2"),
    ({"load": 6.0}, ("cpu", "bfloat16"), "a load of 6.0"),
    ({"swapped": 4 << 30}, ("cpu", "bfloat16"), "swapped out"),
    ({"faults": 256.0}, ("cpu", "bfloat16"), "page faults"),
    ({"huge_pages": "never"}, ("cpu", "bfloat16"), "huge pages are off"),
    ({"plain": "no C++ compiler"}, ("cpu", "bfloat16"), "plain torch (no C++ compiler)"),
    ({"on_battery": True}, ("cpu", "bfloat16"), "battery"),
    ({"instructions": ("avx2",)}, ("cpu", "float32"), "bf16 no faster"),
]  # fmt: skip


def test_nothing_amiss_nothing_said() -> None:
    assert not list(advise(GOOD, "cpu", "bfloat16"))
    on_gpu = replace(GOOD, driver=True, gpus=GPU, faults=256.0, huge_pages="never")
    assert not list(advise(on_gpu, "cuda", "bfloat16")), "a CPU's pages are no matter there"
    without = replace(GOOD, packages=NONE)
    assert not list(advise(without, "cpu", "bfloat16")), "a CPU needs no triton"


@pytest.mark.parametrize(("changes", "decided", "said"), AMISS, ids=[said for *_, said in AMISS])
def test_each_thing_amiss_is_named_with_its_fix(
    changes: dict[str, Any], decided: tuple[str, str], said: str
) -> None:
    found = [one for one in advise(replace(GOOD, **changes), *decided) if said in one.problem]
    assert len(found) == 1
    assert found[0].cost
    assert found[0].fix


def test_the_governor_of_a_driver_that_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    from tsugiki import doctor

    slow = replace(GOOD, governor="powersave")
    for driver, count in (("acpi-cpufreq", 1), ("intel_pstate", 0)):
        monkeypatch.setattr(doctor, "_read", lambda path, driver=driver: driver)
        assert len(list(advise(slow, "cpu", "bfloat16"))) == count


@pytest.mark.parametrize(
    ("files", "cores"),
    [({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, None), ({}, None),
     ({"cpu.max": "words"}, None),
     ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
     ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None)],
)  # fmt: skip
def test_a_containers_limit_is_read(
    tmp_path: Path, files: dict[str, str], cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert device.core_quota(tmp_path) == cores


def test_threads_stay_inside_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, cores in ((None, 8), (2.5, 2), (0.5, 1), (64.0, 8)):
        monkeypatch.setattr(device, "core_quota", lambda quota=quota: quota)
        assert device.usable_cores() == cores


@pytest.mark.parametrize(
    ("value", "threads"),
    [("3", 3), ("3,2", 3), (" 1 ", 1), ("", 5), ("0", 5), ("-1", 5), ("many", 5)],
)
def test_any_omp_num_threads_is_read(
    value: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(device, "usable_cores", lambda: 5)
    before = torch.get_num_threads()
    try:
        found = device.decide("cpu", "float32", hidden_size=8)
    finally:
        torch.set_num_threads(before)
    assert found.threads == threads
    assert found.reasons["threads"] == ("5 usable cores" if threads == 5 else "OMP_NUM_THREADS")


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"device": "cuda:99"}, UsageError, "not on this machine"),
        ({"dtype": "bf16"}, RunError, "bfloat16"),
        ({"threads": 0}, RunError, "from 1 on"),
    ],
)
def test_decisions_of_another_machine_are_refused(
    changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    made = Decisions("cpu", "float32", 1)
    with pytest.raises(error, match=said):
        Decisions.from_json(made.to_json() | changed).apply()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSUGIKI_CACHE", "/proc/nowhere")
    plain = "c++ could not build them: [Errno 2] No such file or directory: '/proc/nowhere'"
    (found,) = advise(replace(GOOD, plain=plain), "cpu", "bfloat16")
    assert "set TSUGIKI_CACHE" in found.fix


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_kept_pages_are_counted() -> None:
    """In a process of its own: what an allocator keeps, it keeps until the process ends."""
    code = "from tsugiki import device, doctor\n"
    code += "before = doctor.page_faults(); kept = device.keep_pages()\n"
    code += "print(before, doctor.page_faults(), kept)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, kept = done.stdout.split()
    if kept == "False":
        pytest.skip("another C library, which cannot be told")
    assert float(before) > FEW_FAULTS > float(after)


def test_the_verb(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", tiny_tokenizer(CHATML))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def say(*given: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tsugiki", "doctor", "--model", "model", *given],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = [json.loads(line) for line in say("--json").splitlines()]
    assert [line["kind"] for line in lines] == ["machine", "advice"]
    decided = lines[0]["decisions"]
    assert (decided["threads"], decided["dtype"]) == (1, "float32")
    assert "hidden size" in decided["reasons"]["dtype"]
    assert lines[0]["int8"]["used"] is False
    assert "hidden size" in lines[0]["int8"]["reason"]
    assert lines[0]["machine"]["total"] > 1 << 28
    text = say()
    assert "hidden size" in text
    assert "--compute int8" in text
    assert "What would make it faster" in text


def test_what_is_seen_is_this_machine() -> None:
    machine = look()
    assert machine.cores == device.usable_cores() <= machine.present
    assert 0 < machine.free <= machine.total
    assert machine.packages["torch"] is not None
