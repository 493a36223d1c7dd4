"""What cannot be exported is one clear error, and nothing is left; memory is bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import save_tiny, tiny_config
from safetensors.torch import load_file, save_file
from test_merging_forms import our_adapter
from test_merging_memory import change_config, pickled_base, quantised_base, shard_missing
from test_merging_peft import TOKENIZER, peft_adapter

from tsugiki.adapters.joined import join
from tsugiki.errors import TsugikiError
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.gguf_settings import limits, misfits
from tsugiki.shipping import export_gguf, export_lora, export_portable, file_names, parse_types
from tsugiki.terminal import Terminal

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import export_speed, merge_memory

Spoil = Callable[[Path], None]


def unknown_architecture(base: Path) -> None:
    change_config(base / "config.json", model_type="gpt_neox")


def no_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()


def layer_missing(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "layers.1.mlp.up_proj" not in k}
    save_file(tensors, path, metadata={"format": "pt"})


def stranger(base: Path) -> None:
    path = base / "model.safetensors"
    extra = {"model.layers.0.mlp.router.weight": torch.zeros(4, 4)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})


def whole_numbers(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(
        torch.int8
    )
    save_file(tensors, path, metadata={"format": "pt"})


def other_activation(base: Path) -> None:
    change_config(base / "config.json", hidden_act="gelu")


def dynamic_rotation(base: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    change_config(base / "config.json", rope_parameters=rope)


def other_heads(base: Path) -> None:
    change_config(base / "config.json", num_attention_heads=64, num_key_value_heads=64, head_dim=1)


def no_numbers(base: Path) -> None:
    change_config(base / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": "x"})


def own_code(base: Path) -> None:
    change_config(base / "config.json", auto_map={"AutoConfig": "x.Y"})


def cut_short(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def too_large(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = -70000.0
    save_file(tensors, path, metadata={"format": "pt"})


def not_finite(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


BAD: dict[Spoil, str] = {
    unknown_architecture: "'gpt_neox' are not written as GGUF",
    no_tokenizer: "has no tokenizer",
    layer_missing: "lacks tensors of its own layers",
    stranger: "router",
    whole_numbers: "holds codes, not numbers",
    other_activation: "activation gelu",
    dynamic_rotation: "rotary embedding of type 'dynamic'",
    other_heads: "does not fit its config.json",
    no_numbers: "config",
    own_code: "wants to run its own Python code",
    cut_short: "not a whole safetensors file",
    too_large: "layers.1.mlp.up_proj.weight does not fit F16",
    not_finite: "layers.1.self_attn.q_proj.weight does not fit F16",
    lambda base: pickled_base(base, base): "only pickled weights",
    lambda base: quantised_base(base, base): "is quantised",
    lambda base: shard_missing(base, base): "lacks shards",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_models(spoil: Spoil, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    spoil(base)
    with pytest.raises(TsugikiError, match=BAD[spoil]) as error:
        export_gguf(str(base), ["f16"], tmp_path / "out", Terminal())
    if spoil is too_large:
        assert "65504" in str(error.value)
        assert "--gguf bf16" in str(error.value)
        done = export_gguf(str(base), ["bf16,q8_0"], tmp_path / "out", Terminal())
        assert [shipped.types["F32"] for shipped in done] == [7, 7]
    elif (tmp_path / "out").exists():
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
        ("gemma2", {"tie_word_embeddings": False}, "head of its own"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, "layer_types"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn"),
        ("gpt2", {"activation_function": "relu"}, "activation relu"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise(family: str, settings: dict, says: str) -> None:
    config = tiny_config(family).to_dict()
    name = config["model_type"]
    assert misfits(name, config) == []
    assert any(says in line for line in misfits(name, config | settings)), says


def test_windows_that_llama_cpp_has_not_are_told() -> None:
    config = tiny_config("mistral").to_dict()
    assert "up to 16 tokens" in limits("mistral", config)[0]
    assert limits("mistral", config | {"sliding_window": None}) == []
    assert limits("gemma3_text", tiny_config("gemma3").to_dict()) == []


def test_types_and_names() -> None:
    assert parse_types(["f16,Q8_0", "f16"]) == ["f16", "q8_0"]
    with pytest.raises(TsugikiError, match="did you mean q4_k_m") as error:
        parse_types(["q4_km"])
    assert error.value.exit_code == 2
    paths = file_names(["f16", "q8_0"], "x", Path("out/model-f16.gguf"))
    assert paths == {"f16": Path("out/model-f16.gguf"), "q8_0": Path("out/model-Q8_0.gguf")}
    assert file_names(["bf16"], "demo", Path("out")) == {"bf16": Path("out/demo-BF16.gguf")}


def test_an_output_that_exists_and_a_disk_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    (tmp_path / "mine.gguf").write_text("kept")
    with pytest.raises(TsugikiError, match="exists already"):
        export_gguf(str(base), ["f16"], tmp_path / "mine.gguf", Terminal())
    assert (tmp_path / "mine.gguf").read_text() == "kept"
    monkeypatch.setattr("tsugiki.files.free_bytes", lambda path: 1000)
    with pytest.raises(TsugikiError, match="too little disk space"):
        export_gguf(str(base), ["f16"], tmp_path / "new", Terminal())
    assert "will be written" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_several_types_and_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny("qwen3", tmp_path / "base", TOKENIZER)
    peft_adapter(base, tmp_path / "run" / "adapter")
    done = export_gguf(
        str(tmp_path / "run"), ["q4_k_m,bf16", "q8_0"], None, Terminal(), model=str(base)
    )
    folder = tmp_path / "run" / "gguf"
    assert [d.path for d in done] == [folder / f"run-{t}.gguf" for t in ("Q4_K_M", "BF16", "Q8_0")]
    assert len(list(folder.iterdir())) == 4, "the exact file for quantising is gone"
    assert "FROM ./run-Q4_K_M.gguf" in (folder / "run.Modelfile").read_text()
    for shipped in done:
        kinds = [info.type.name for info in open_gguf(shipped.path).tensors.values()]
        assert {k: kinds.count(k) for k in kinds} == shipped.types
    assert "Q8_0 ×" in capsys.readouterr().out
    again = export_gguf(str(folder / "run-BF16.gguf"), ["q8_0"], tmp_path / "x.gguf", Terminal())
    assert again[0].types == done[2].types


def test_another_base_and_a_base_that_is_gone(tmp_path: Path) -> None:
    base = save_tiny("qwen3", tmp_path / "base", TOKENIZER)
    our_adapter(base, tmp_path / "adapter")
    other = save_tiny("qwen3", tmp_path / "x" / "other", TOKENIZER, seed=9)
    for export in (lambda **how: export_gguf(str(tmp_path / "adapter"), ["f16"], None, Terminal(), **how),
                   lambda **how: export_lora(str(tmp_path / "adapter"), None, Terminal(), **how),
                   lambda **how: export_portable(str(tmp_path / "adapter"), None, Terminal(), **how)):  # fmt: skip
        with pytest.raises(TsugikiError, match="another base"):
            export(model=str(other))
    (tmp_path / "base").rename(tmp_path / "x" / "moved")
    with pytest.raises(TsugikiError, match="which is not there"):
        export_gguf(str(tmp_path / "adapter"), ["f16"], None, Terminal())
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "x"}


def test_a_killed_export_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    merge_memory.make_model(tmp_path / "base", 0.1, 50_000_000, vocabulary=4000)
    TOKENIZER.save_pretrained(tmp_path / "base")
    output = tmp_path / "out.gguf"
    child = subprocess.Popen(
        [sys.executable, "-c", export_speed.EXPORT, str(tmp_path / "base"), str(output)]
    )
    while not list(tmp_path.glob(".out.gguf.*.tmp")):
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not output.exists()
    write_gguf(plan_export(join(tmp_path / "base", None), "x"), "f16", output)
    assert not list(tmp_path.glob(".out.gguf.*"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see memory")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """500 MB in bf16 with an adapter: the model alone would not fit the bound."""
    total = merge_memory.make_model(tmp_path / "base", 0.5, 200_000_000, vocabulary=4000)
    TOKENIZER.save_pretrained(tmp_path / "base")
    merge_memory.make_adapter(tmp_path / "base", tmp_path / "adapter")
    done = export_speed.export_watched(tmp_path / "base", tmp_path / "a.gguf", tmp_path / "adapter")
    bound = 3 * 4 * merge_memory.INNER * merge_memory.HIDDEN + 300e6
    assert total > bound, "an export that loads the model would show"
    assert done["anonymous"] <= bound


def test_the_guides_script(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    script = Path(__file__).parent.parent / "scripts" / "convert_to_gguf.py"
    done = subprocess.run(
        [sys.executable, str(script), str(base), "--outfile", str(tmp_path / "m-f16.gguf"),
         "--outtype=f16", "--quantize", "Q8_0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.glob("*.gguf")} == {"m-f16.gguf", "m-Q8_0.gguf"}
    bare = subprocess.run(
        [sys.executable, str(script), str(base), "--outtype", "q9"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert bare.returncode == 2
    assert "Traceback" not in bare.stderr


def test_an_adapter_alone_and_flags_that_exclude_each_other(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tsugiki.cli import app

    for flags in ([], ["--gguf", "f16", "--portable"]):
        done = CliRunner().invoke(app, ["export", str(tmp_path), *flags])
        assert done.exit_code != 0
        assert isinstance(done.exception, TsugikiError)
        assert "--gguf TYPE" in str(done.exception)
