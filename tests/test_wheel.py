"""The wheel, built here and installed in another folder: it leaves torch alone and runs the demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def command(*arguments: str, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the working tree gets no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "src").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy))
    (built,) = folder.glob("*.whl")
    return built


def test_it_asks_for_the_lowest_torch_tested_and_installs_none(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (n for n in names if n.endswith("METADATA"))
        said = archive.read(metadata).decode()
        asked = re.findall(r"Requires-Dist: (torch\S*)\n", said)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert asked == [f"torch>={pinned[1].rpartition('.')[0]}"], "a range, from what was tested"
    assert re.search(r"Requires-Dist: pyarrow>=\d+\n", said), "Parquet needs no extra"
    for needed in ("models/sprout/model.safetensors", "demo/train.jsonl", "py.typed"):
        assert f"tsugiki/{needed}" in names
    report = json.loads(
        command("-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "--report", "-",
                str(wheel))
    )  # fmt: skip
    installs = {item["metadata"]["name"] for item in report["install"]}
    assert installs <= {"tsugiki"}, "what is installed already is left alone"


def test_it_runs_the_demo_in_another_folder_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    command("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site),
            str(wheel))  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(site), "PATH": str(tmp_path), "HOME": str(tmp_path),
        "CC": "/nowhere/cc", "HF_ENDPOINT": "http://127.0.0.1:9",
    }  # fmt: skip
    where = command("-c", "import tsugiki; print(tsugiki.__file__)", cwd=work, env=environment)
    assert where.startswith(str(site))
    told = command("-m", "tsugiki", "demo", "--json", cwd=work, env=environment)
    events = [json.loads(line) for line in told.splitlines()]
    scores = next(e for e in events if e["kind"] == "scores")["scores"]
    assert scores["tuned"]["rows"] >= 200
    assert scores["tuned"]["exact"] >= 0.9
    assert scores["tuned"]["stopped"] >= 0.98
    assert scores["tuned, words never trained on"]["exact"] >= 0.7
    assert scores["base"]["exact"] <= 0.1
    assert scores["base with 4 examples"]["exact"] <= 0.1
    assert scores["answer of the nearest training row"]["exact"] <= 0.4
    turns = next(e for e in events if e["kind"] == "conversation")["turns"]
    assert any(re.search(r"[぀-ヿ一-鿿]", turn["tuned"]) for turn in turns)
    samples = {e["step"] for e in events if e["kind"] == "sampled"}
    assert len(samples) == 3, "start, middle and end"
    assert next(e for e in events if e["kind"] == "proven")["ok"]
    run = work / "runs" / "demo"
    for name in (
        "adapter/adapter_model.safetensors",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "merged/model.safetensors",
    ):
        assert (run / name).stat().st_size > 0
