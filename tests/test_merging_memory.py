"""A merge holds no model: bounded anonymous memory, no transformers, whole or absent folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import save_tiny
from safetensors.torch import load_file, save_file
from test_merging_peft import TOKENIZER, peft_adapter

from tsugiki.errors import TsugikiError
from tsugiki.joining import merge_adapter
from tsugiki.merging import plan_merge, write_merged
from tsugiki.terminal import Terminal

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import merge_memory


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter on it."""
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    peft_adapter(base, tmp_path / "adapter")
    return tmp_path / "adapter", base


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see memory")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """600 MB in shards, the largest tensor 46 MB in fp32: the whole would not fit the bound."""
    total = merge_memory.make_model(tmp_path / "base", 0.6, 200_000_000, vocabulary=4000)
    merge_memory.make_adapter(tmp_path / "base", tmp_path / "adapter")
    done = merge_memory.merge_watched(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    bound = 3 * 4 * merge_memory.INNER * merge_memory.HIDDEN + 300e6
    assert total > bound, "a merge that loads the model would show"
    assert done["anonymous"] <= bound
    assert not done["transformers"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index == before
    assert len(set(index["weight_map"].values())) > 2


def test_a_killed_merge_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    merge_memory.make_model(tmp_path / "base", 0.1, 50_000_000, vocabulary=4000)
    merge_memory.make_adapter(tmp_path / "base", tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("adapter", "base", "out")]
    child = subprocess.Popen([sys.executable, "-c", merge_memory.MERGE, *arguments])
    while not list(tmp_path.glob(".out.*.tmp/*")):
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.tmp"))
    write_merged(plan_merge(tmp_path / "adapter", tmp_path / "base"), tmp_path / "out")
    assert (tmp_path / "out" / "tsugiki.json").is_file()
    assert not list(tmp_path.glob(".out.*.tmp"))


def test_an_output_that_exists_stays_as_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = pair
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(TsugikiError, match="exists already"):
        write_merged(plan_merge(adapter, base), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_the_need_is_told_before(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter, base = pair
    plan = plan_merge(adapter, base)
    written = write_merged(plan, tmp_path / "out")
    size = sum(file.stat().st_size for file in written.folder.iterdir())
    assert size <= plan.need <= size + (2 << 20)
    monkeypatch.setattr("tsugiki.files.free_bytes", lambda path: plan.need - 1)
    with pytest.raises(TsugikiError, match="too little disk space") as error:
        merge_adapter(adapter, tmp_path / "more", Terminal(), model=str(base))
    assert "needed" in str(error.value)
    assert "will be written" in capsys.readouterr().out
    assert not (tmp_path / "more").exists()


def overflowing(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(name for name in tensors if "lora_B" in name)].fill_(1e8)
    save_file(tensors, path, metadata={"format": "pt"})


def not_finite(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def layer_missing(adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layers.1.self_attn.q_proj" not in k}
    save_file(tensors, path, metadata={"format": "pt"})


def other_shape(adapter: Path, base: Path) -> None:
    shutil.rmtree(base)
    save_tiny("gpt2", base, TOKENIZER)


def pickled_base(adapter: Path, base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def shard_missing(adapter: Path, base: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors").unlink()  # a whole file goes before an index
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def index_outside(adapter: Path, base: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def unknown_architecture(adapter: Path, base: Path) -> None:
    change_config(base / "config.json", model_type="mystery")


def quantised_base(adapter: Path, base: Path) -> None:
    change_config(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def lora_bias(adapter: Path, base: Path) -> None:
    change_config(adapter / "adapter_config.json", lora_bias=True)


def pickled_adapter(adapter: Path, base: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def lying_header(adapter: Path, base: Path) -> None:
    content = bytearray((base / "model.safetensors").read_bytes())
    content[:8] = (1 << 60).to_bytes(8, "little")
    (base / "model.safetensors").write_bytes(content)


def change_config(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BAD = {
    overflowing: "does not fit float16",
    not_finite: "NaN or inf",
    layer_missing: "layers.1.self_attn.q_proj: the layer is missing",
    other_shape: "the base stores no",
    pickled_base: "only pickled weights",
    shard_missing: "lacks shards",
    index_outside: "names no files of its folder",
    unknown_architecture: "'mystery' are not known",
    quantised_base: "is quantised",
    lora_bias: "lora_bias",
    pickled_adapter: "pickled",
    lying_header: "header claims",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    bad, pair: tuple[Path, Path], tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    adapter, base = pair
    bad(adapter, base)
    with pytest.raises(TsugikiError, match=BAD[bad]) as error:
        merge_adapter(adapter, tmp_path / "out", Terminal(), model=str(base), dtype="f16")
    if bad is overflowing:
        assert "bf16" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_guides_script_and_help_load_no_torch(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = pair
    script = Path(__file__).parent.parent / "scripts" / "merge_lora_adapter.py"
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), "--adapter", str(adapter), f"--base-model={base}",
         "--output", str(out), "--no-verify"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").is_file()
    code = (
        "import sys; from tsugiki.cli import app\n"
        "for verb in ('merge', 'verify'):\n"
        "    try: app([verb, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
