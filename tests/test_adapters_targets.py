"""Targets: the guide's counts, names that match nothing, and what cannot be adapted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import tiny_model
from peft import PeftModel
from peft.utils import transformers_weight_conversion
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tsugiki.adapters.attach import attach, detach
from tsugiki.adapters.portable import _verdicts
from tsugiki.adapters.storage import load_adapter, save_adapter
from tsugiki.adapters.targets import left_out, resolve_targets
from tsugiki.config import LoraConfig
from tsugiki.errors import AdapterError
from tsugiki.models.conversion import EXPERTS, experts_for_peft
from tsugiki.models.flat import use_flat_attention
from tsugiki.models.spec import ModelSpec
from tsugiki.models.tune import tune

GPT2_MEDIUM = AutoConfig.for_model("gpt2", n_embd=1024, n_layer=24, n_head=16, vocab_size=32000)
GPT2 = AutoConfig.for_model("gpt2")
LLAMA_7B = AutoConfig.for_model("llama")
GEMMA3_1B = AutoConfig.for_model(
    "gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912,
    num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "targets", "r", "count"),
    [
        (GPT2_MEDIUM, ["c_attn", "c_proj"], 8, 2_162_688),
        (GPT2_MEDIUM, ["attn.c_attn", "attn.c_proj"], 8, 1_179_648),
        (GPT2, ["attn.c_attn", "attn.c_proj"], 8, 442_368),
        (LLAMA_7B, "minimal", 8, 4_194_304),
        (LLAMA_7B, "all-linear", 16, 39_976_960),
        (GEMMA3_1B, "all-linear", 16, 13_045_760),
        (GEMMA3_1B, ["layers.0.self_attn.q_proj"], 16, 34_816),
    ],
)
def test_the_guides_counts(config, targets, r: int, count: int) -> None:  # type: ignore[no-untyped-def]
    found = resolve_targets(ModelSpec.from_config(config).meta_model(), targets)
    assert sum(t.count(r) for t in found) == count


def test_parameters_of_whole_models() -> None:
    assert ModelSpec.from_config(GPT2).parameters == 124_439_808
    assert ModelSpec.from_config(GEMMA3_1B).parameters == 999_885_952


def test_gemma_3_1b_shapes() -> None:
    model = ModelSpec.from_config(GEMMA3_1B).meta_model()
    shapes = {
        t.path.rsplit(".")[-1]: (t.in_features, t.out_features)
        for t in resolve_targets(model, "standard")
    }
    assert shapes == {
        "q_proj": (1152, 1024), "k_proj": (1152, 256), "v_proj": (1152, 256), "o_proj": (1024, 1152),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["q_proj", "v_porj"], "v_porj.*did you mean v_proj"),
        (["lm_head"], "output head"),
        (["embed_tokens"], "not a linear projection"),
        (["proj"], "no module of that name"),
        ([], "no target"),
    ],
)
def test_wrong_names_are_refused_even_beside_right_ones(names: list[str], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        resolve_targets(tiny_model("llama"), names)


def test_surgery_says_what_it_changed_and_can_be_undone() -> None:
    model = tiny_model("gpt2")
    before = {name: id(module) for name, module in model.named_modules()}
    attached = attach(model, LoraConfig(r=2, targets=("attn.c_attn",)))
    assert [t.path for t in attached.targets] == [
        f"transformer.h.{i}.attn.c_attn" for i in range(3)
    ]
    assert attached.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.raises(AdapterError, match="already"):
        attach(model, LoraConfig())
    assert detach(model) == [t.path for t in attached.targets]
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("way", ["attach", "load", "copy"])
def test_detach_gives_back_the_very_model(way: str, tmp_path: Path) -> None:
    """Modules, parameters, their gradients' flags and the modes are what they were."""
    model = tiny_model("gpt2")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    model.transformer.h[1].train()

    def state(of: nn.Module) -> list[object]:
        return [
            [(name, type(m), m.training) for name, m in of.named_modules()],
            [(name, p.requires_grad, p.tolist()) for name, p in of.named_parameters()],
        ]

    before = state(model)
    objects = [id(x) for x in (*model.modules(), *model.parameters())]
    attach(model, LoraConfig(r=2))
    if way == "load":
        save_adapter(model, tmp_path / "a")
        detach(model)
        load_adapter(model, tmp_path / "a")
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n] == []
    if way == "copy":
        model = copy.deepcopy(model)
    detach(model)
    assert state(model) == before
    if way != "copy":
        assert [id(x) for x in (*model.modules(), *model.parameters())] == objects


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_detach_gives_back_the_modules_that_a_run_replaced(family: str) -> None:
    """As a run leaves it: adapters attached, modules replaced by proven faster ones."""
    model = tiny_model(family)
    before = [(name, id(m)) for name, m in model.named_modules()]
    attach(model, LoraConfig(r=2))
    use_flat_attention(model)
    attached = [(name, id(m)) for name, m in model.named_modules()]
    assert tune(model).replaced
    assert [(name, id(m)) for name, m in model.named_modules()] != attached
    detach(model)
    assert [(name, id(m)) for name, m in model.named_modules()] == before


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
MIXTRAL = AutoConfig.for_model("mixtral", intermediate_size=32, num_attention_heads=4,
                               num_key_value_heads=2, num_local_experts=4, **SMALL)  # fmt: skip
GLM_MOE = AutoConfig.for_model(
    "glm4_moe", intermediate_size=48, moe_intermediate_size=16, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
    first_k_dense_replace=1, **SMALL,
)  # fmt: skip
MAMBA = AutoConfig.for_model("mamba", state_size=4, **SMALL)
IDS = torch.arange(9)[None]


def in_peft(model: nn.Module, plain: nn.Module, folder: Path) -> float:
    """How far PEFT's logits with the adapter on `model` are from its own, of what it changes."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, 0.0, 0.2)
    save_adapter(model, folder)
    with torch.no_grad():
        expected, base = model(IDS).logits, plain(IDS).logits
        found = PeftModel.from_pretrained(plain, str(folder)).eval()(IDS).logits
    return float((found - expected).norm() / (expected - base).norm())


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("targets", ["all-linear", ("0.mlp.down_proj", "shared_experts.up_proj")])
def test_peft_applies_what_it_would_take_for_experts(targets, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Dense layers and shared experts of a model whose experts are stacked, ranks that differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GLM_MOE).eval()
    plain = copy.deepcopy(model)
    attached = attach(model, LoraConfig(r=2, targets=targets, dropout=0.1))
    names = {t.path for t in attached.targets}
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.up_proj"} <= names
    one = model.get_submodule("model.layers.1.mlp.shared_experts.up_proj")
    one.lora_A, one.lora_B = (nn.Parameter(torch.randn(s)) for s in ((3, 32), (16, 3)))
    assert in_peft(model.eval(), copy.deepcopy(plain), tmp_path / "a") < 1e-4
    expected = model(IDS).logits
    load_adapter(plain, tmp_path / "a")
    assert torch.allclose(plain(IDS).logits, expected, atol=1e-5)


def test_what_peft_takes_for_experts_is_as_it_says() -> None:
    table = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    assert {kind: frozenset(names) for kind, names in table.items()} == EXPERTS
    assert experts_for_peft("deepseek_v3") == EXPERTS["qwen2_moe"]
    assert experts_for_peft("llama") == experts_for_peft(None) == frozenset()
    peft, *_ = _verdicts("glm4_moe", 8, {"q_proj", "down_proj"})
    assert (peft.takes, "down_proj for experts" in peft.needs) == (False, True)


def test_any_module_can_be_adapted() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    attached = attach(model, LoraConfig(r=1, targets=("2",)))
    assert [t.path for t in attached.targets] == ["2"]
    assert attached.trainable == 10


class Router(nn.Linear):
    """As Llama 4's and Phi-3.5-MoE's: the product, and what is chosen by it."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(input)
        return scores, scores.argmax(-1)


class Own(nn.Linear):
    """As Falcon's: the product, written otherwise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


def test_a_router_that_inherits_from_linear_is_not_adapted() -> None:
    model = nn.ModuleDict({"router": Router(4, 8), "own": Own(4, 8), "up": nn.Linear(4, 8)})
    for device in ("cpu", "meta"):
        there = copy.deepcopy(model).to(device)
        assert [t.path for t in resolve_targets(there, "all-linear")] == ["own", "up"]
        with pytest.raises(AdapterError, match="a Router gives another thing than the product"):
            resolve_targets(there, ["router"])


@pytest.mark.parametrize(
    ("config", "adapted", "without"),
    [
        (MIXTRAL, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
        (MAMBA, {"in_proj", "x_proj"}, {"dt_proj", "out_proj"}),
    ],
    ids=["mixtral", "mamba"],
)
def test_all_linear_goes_without_what_cannot_be_adapted(
    config: PretrainedConfig, adapted: set[str], without: set[str], tmp_path: Path
) -> None:
    """And PEFT computes what the adapter does here."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain = copy.deepcopy(model)
    assert {path.rsplit(".", 1)[-1] for path in left_out(model)} == without
    for name in without:
        with pytest.raises(AdapterError, match=r"not supported|without calling|PEFT"):
            resolve_targets(model, [name])
    attached = attach(model, LoraConfig(r=2))
    assert {t.path.rsplit(".", 1)[-1] for t in attached.targets} == adapted
    assert in_peft(model, plain, tmp_path / "adapter") <= 1e-4
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters()
               if p.requires_grad), "none is left out silently"  # fmt: skip
