"""PEFT reads our adapters and we read PEFT's, for eight families, with an effect that shows."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from families import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

from tsugiki.adapters.attach import attach, detach, lora_modules
from tsugiki.adapters.pool import AdapterPool
from tsugiki.adapters.storage import BaseIdentity, load_adapter, save_adapter
from tsugiki.config import LoraConfig
from tsugiki.errors import AdapterError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.flat import flat_forward, solo_forward, use_flat_attention

LENGTHS = (23, 40, 9)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return flat_forward(model, ids, ForwardBatch(LENGTHS))


def draw_b(model: nn.Module, width: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, module in lora_modules(model):
            module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * width)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways(family: str, tmp_path: Path) -> None:
    plain = tiny_model(family)
    ours = copy.deepcopy(plain)
    use_flat_attention(ours)
    ids = torch.randint(0, 320, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    base = logits(ours, ids)
    attach(ours, LoraConfig(r=8, alpha=24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(ours, ids), base), "B = 0 is the base"
    effect, width = 0.0, 0.2
    while effect < float(base.std()):  # the adapter moves the logits by at least their own spread
        assert width < 2, f"{family}: {effect:.3f} of {float(base.std()):.3f}"
        draw_b(ours, width)
        adapted = logits(ours, ids)
        effect = float((adapted - base).pow(2).mean().sqrt())
        width *= 1.2
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    with torch.no_grad():
        in_peft = solo_forward(theirs, ids, LENGTHS)
    assert float((in_peft - adapted).abs().max()) <= 2e-5 * effect

    theirs.save_pretrained(tmp_path / "theirs")
    detach(ours)
    assert torch.equal(logits(ours, ids), base), "detached is the base"
    info = load_adapter(ours, tmp_path / "theirs")
    assert not info.verified
    assert "base not verified" in info.notes[0]
    assert float((logits(ours, ids) - in_peft).abs().max()) <= 2e-5 * effect


# It says so of every pattern for a parameter, and honours it.
IGNORED = "ignore:The following (rank|alpha)_pattern keys did not match"
PROJECTIONS = ["q_proj", "o_proj", "down_proj"]
HONOURED = {
    "patterns": {
        "target_modules": ["q_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {"down_proj": 2, r"layers\.[12]\.self_attn\.q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "^model.layers.2.mlp.down_proj": 5},
    },
    "excluded by name": {"exclude_modules": ["layers.1.self_attn.q_proj", "down_proj"]},
    "excluded by pattern": {"exclude_modules": r".*\.(0|2)\.self_attn\..*"},
    "one layer": {"layers_to_transform": 1},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "layers by several names": {"layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    "a pattern": {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qv]|mlp\.up)_proj"},
    "Unsloth's pattern": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
    },
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "ALL-LINEAR": {"target_modules": "ALL-linear"},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "wrong fan_in_fan_out": {"fan_in_fan_out": True},
    "weights as parameters": {
        "target_modules": ["q_proj"], "target_parameters": ["1.mlp.up_proj.weight"],
        "rank_pattern": {"up_proj.weight": 2, "up_proj": 3}, "alpha_pattern": {"up_proj": 9},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HONOURED)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:Setting `save_embedding")
@pytest.mark.filterwarnings(IGNORED)
def test_what_a_foreign_config_asks_is_honoured(name: str, tmp_path: Path) -> None:
    """The same logits as in PEFT, saved again too; one layer less or more is refused."""
    asked = {"target_modules": PROJECTIONS, "init_lora_weights": False, **HONOURED[name]}
    plain = tiny_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **asked)
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.2)
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    if name.lower() == "all-linear":  # PEFT writes the names it found; a hand may leave the word
        written["target_modules"] = asked["target_modules"]
        (folder / "adapter_config.json").write_text(json.dumps(written))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    ids = torch.randint(0, 320, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = solo_forward(theirs, ids, LENGTHS)
    ours = copy.deepcopy(plain)
    load_adapter(ours, folder)
    use_flat_attention(ours)
    base = solo_forward(plain, ids, LENGTHS)
    effect = float((expected - base).detach().pow(2).mean().sqrt())
    assert effect > 0.1
    adapted = logits(ours, ids)
    assert float((adapted - expected).abs().max()) <= 1e-4

    save_adapter(ours, tmp_path / "again")  # ranks and scales that differ by layer survive
    detach(ours)
    load_adapter(ours, tmp_path / "again")
    assert torch.equal(logits(ours, ids), adapted)
    detach(ours)
    reread = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "again").eval()
    with torch.no_grad():
        assert float((solo_forward(reread, ids, LENGTHS) - expected).abs().max()) <= 1e-4

    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    copied = [key for key in whole if key.endswith("base_layer.weight")]
    assert copied == (["base_model.model.lm_head.base_layer.weight"] if "head" in name else [])
    for key in copied:
        save_file({**whole, key: whole[key] + 1}, path, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=r"lm_head.*differs from the base"):
            load_adapter(ours, folder)
        save_file(whole, path, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match="output head"):
            AdapterPool(ours).load(folder, "one")
    first = next(key for key in whole if ".lora_A" in key).rpartition(".lora_")[0]
    less = {key: value for key, value in whole.items() if not key.startswith(first)}
    absent = next(
        f"base_model.model.{p}.lora_"
        for p, m in plain.named_modules()
        if isinstance(m, nn.Linear) and not any(f".{p}.lora" in key for key in whole)
    )
    shape = plain.get_submodule(absent[17:-6]).weight.shape
    more = {
        **whole,
        f"{absent}A.weight": torch.zeros(4, shape[1]),
        f"{absent}B.weight": torch.zeros(shape[0], 4),
    }
    for tensors, said in ((less, "the layer is missing"), (more, "does not name")):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=said):
            load_adapter(ours, folder)


REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "kasa_config": {"kasa_config": {}},
    "use_bdlora": {"use_bdlora": {"target_modules_bd_b": PROJECTIONS, "match_strict": False}},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("said", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_can_and_we_cannot_is_refused_by_name(said: str, tmp_path: Path) -> None:
    """Adapters that PEFT itself made with these settings."""
    plain = tiny_model("llama")
    asked = {"target_modules": PROJECTIONS, **REFUSED[said]}
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **asked)
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=said):
        load_adapter(plain, tmp_path / "theirs")
    assert next(lora_modules(plain), None) is None, "the model is untouched"


IDENTITY = BaseIdentity("me/base", "a" * 64, "b" * 64, dtype="float32")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = tiny_model("llama")
    attach(model, LoraConfig(r=4, targets="standard"))
    draw_b(model)
    save_adapter(model, tmp_path / "a", base=IDENTITY, training_info={"rows": 3})
    detach(model)
    return model, tmp_path / "a"


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change the tensors and make the recorded digest fit again, as a careful liar would."""
    import hashlib

    from safetensors.torch import save

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    content = save(tensors, metadata={"format": "pt"})
    path.write_bytes(content)
    record = json.loads((folder / "tsugiki.json").read_text())
    record["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "tsugiki.json").write_text(json.dumps(record))


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: [t.pop(k) for k in list(t) if "layers.1.self_attn.q_proj" in k], "missing"),
        (lambda t: t.pop(Q), "missing"),
        (lambda t: t.update({Q: t[Q][:2].clone()}), "shape"),
        (lambda t: t[Q].fill_(float("nan")), "NaN"),
        (lambda t: t[Q].fill_(float("inf")), "NaN or inf"),
        (lambda t: t.update({Q: t[Q].int()}), "not a floating type"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), "lm_head"),
        (lambda t: t.update({Q.replace("layers.1", "layers.9"): t[Q].clone()}), "layers.9"),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_damaged_adapters_are_refused(saved, change, said: str) -> None:  # type: ignore[no-untyped-def]
    model, folder = saved
    rewrite(folder, change)
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, folder, base=IDENTITY)
    assert next(lora_modules(model), None) is None, "the model is untouched"


def test_the_base_is_known_by_its_tensors(saved) -> None:  # type: ignore[no-untyped-def]
    model, folder = saved
    other = BaseIdentity("me/other", "c" * 64, "d" * 64, dtype="float32")
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(model, folder, base=other)
    half = BaseIdentity("me/base", "c" * 64, "b" * 64, dtype="bfloat16")
    with pytest.raises(AdapterError, match="another type"):
        load_adapter(model, folder, base=half)
    info = load_adapter(model, folder, base=half, accept_base=True)
    assert not info.verified
    assert "accepted" in info.notes[0]
    detach(model)
    assert load_adapter(model, folder, base=IDENTITY).verified


def test_changed_weights_are_seen(saved) -> None:  # type: ignore[no-untyped-def]
    model, folder = saved
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match="not the file that was saved"):
        load_adapter(model, folder, base=IDENTITY)


def test_an_edited_scale_is_seen(saved) -> None:  # type: ignore[no-untyped-def]
    model, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="another scale"):
        load_adapter(model, folder, base=IDENTITY)


@pytest.mark.parametrize(
    "change",
    [{"base": {"name": "x"}}, {"base": "x"}, {"format_version": "1"}, {"targets": []}],
)
def test_a_damaged_record_is_refused(saved, change) -> None:  # type: ignore[no-untyped-def]
    model, folder = saved
    record = json.loads((folder / "tsugiki.json").read_text())
    (folder / "tsugiki.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(model, folder, base=IDENTITY)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora_dropout", 1.0, "not a probability"),
        ("target_modules", "(", "not a valid pattern"),
        ("lora_alpha", None, "lora_alpha"),
        ("target_modules", None, "target_modules"),
        ("use_dora", True, "use_dora"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("bias", "all", "bias"),
        ("peft_type", "IA3", "only LoRA"),
        ("r", 0, "at least 1"),
        ("init_lora_weights", "olora", "init_lora_weights"),
        ("use_a_newer_kind", True, "use_a_newer_kind"),
        ("use_rslora", "false", "neither true nor false"),
        ("exclude_modules", "[", "exclude_modules"),
        ("rank_pattern", {"(": 4}, "rank_pattern"),
        ("layers_to_transform", [0, "1"], "layers_to_transform"),
        ("layers_pattern", "layers", "without layers_to_transform"),
        ("target_modules", [["q_proj"]], "damaged"),
        ("target_modules", [], "the adapter does not name"),
        ("target_parameters", ["experts.down_proj"], "target_parameters"),
    ],
)
def test_foreign_configs_that_cannot_be_honoured(saved, key: str, value, said: str) -> None:  # type: ignore[no-untyped-def]
    model, folder = saved
    (folder / "tsugiki.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    if value is not None:
        config[key] = value
    elif (was := config.pop(key)) and key == "lora_alpha":
        config["alpha"] = was  # the usual misspelling
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, folder)


def test_pickled_adapters_are_not_read(saved) -> None:  # type: ignore[no-untyped-def]
    model, folder = saved
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled"):
        load_adapter(model, folder)
