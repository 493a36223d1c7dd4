"""Faster modules: proven on each family, refused where they differ, names and numbers kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tsugiki.adapters.attach import attach, detach, lora_modules
from tsugiki.adapters.lora import LoraLinear
from tsugiki.config import LoraConfig
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.flat import flat_forward, use_flat_attention
from tsugiki.models.hub import resolve_model
from tsugiki.models.load import load_base
from tsugiki.models.tune import tune
from tsugiki.models.tuned import Replacement, TunedFeed

LENGTHS = (7, 60, 3)


def adapted(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(family).to(dtype)
    attach(model, LoraConfig(r=4, alpha=8), generator=torch.Generator().manual_seed(0))
    for _, module in lora_modules(model):
        nn.init.normal_(module.lora_B, 0.0, 0.02, generator=torch.Generator().manual_seed(1))
    use_flat_attention(model)
    return model


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(sum(LENGTHS))[None] * 37 % 320
    logits = flat_forward(model, ids, ForwardBatch(LENGTHS))
    loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    model.zero_grad()
    loss.backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_is_active_in_every_family(family: str, dtype: torch.dtype) -> None:
    model = adapted(family, dtype)
    tuned = tune(model)
    print(f"{family} {dtype}: {tuned.note}")
    norms = {"gpt2": 0, "qwen3": 13, "gemma2": 13, "gemma3": 19}.get(family, 7)
    assert not tuned.kept, tuned.kept
    assert tuned.replaced == {
        "attention": 3, "feed-forward": 3, "head": 1, **({"norm": norms} if norms else {}),
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_originals(family: str) -> None:
    plain = adapted(family)
    fast = copy.deepcopy(plain)
    names = [name for name, _ in plain.named_parameters()]
    tune(fast)
    assert [name for name, _ in fast.named_parameters()] == names, "no name changes"
    (expected, wanted), (logits, found) = gradients(plain), gradients(fast)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert wanted.keys() == found.keys()
    for name, grad in wanted.items():
        assert float((found[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-7, name
    assert len(detach(fast)) == len(list(lora_modules(plain)))
    detach(plain)
    assert torch.allclose(
        flat_forward(fast, torch.arange(9)[None], ForwardBatch((9,))),
        flat_forward(plain, torch.arange(9)[None], ForwardBatch((9,))),
        atol=1e-4,
    )


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_outputs_may_be_changed_in_place(family: str, tuned: bool) -> None:
    """As Falcon and Gemma 3n do with their projections' outputs."""
    found = []
    for place in (False, True):
        model = adapted(family)
        if tuned:
            tune(model)

        def change(_: nn.Module, __: object, out: Any, place: bool = place) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            first = first.mul_(1.5) if place else first * 1.5
            return (first, *out[1:]) if isinstance(out, tuple) else first

        kinds = (Replacement,) if tuned else (LoraLinear,)
        handles = [m.register_forward_hook(change) for m in model.modules() if isinstance(m, kinds)]
        assert len(handles) >= 6
        found.append(gradients(model)[1])
    apart, place_grads = found
    for name, grad in apart.items():
        assert torch.equal(place_grads[name], grad), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_a_batch_the_original_runs(family: str) -> None:
    plain = adapted(family)
    fast = copy.deepcopy(plain)
    tune(fast)
    ids = torch.arange(12)[None]
    for model in (plain, fast):
        model.set_attn_implementation("eager")
    # norms need no batch, and their compiled body sums in another order
    assert torch.allclose(fast(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4)


class Doubled(nn.Module):
    """Looks like a feed-forward block and is another function."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj
        self.act_fn = own.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def test_a_module_that_computes_something_else_is_kept() -> None:
    model = adapted("llama")
    for layer in model.model.layers:
        layer.mlp = Doubled(layer.mlp)
    tuned = tune(model)
    assert "feed-forward" not in tuned.replaced
    assert [text for text in tuned.kept if "Doubled" in text and "off by" in text]
    assert tuned.replaced["attention"] == 3, "the rest is replaced"
    assert all(isinstance(layer.mlp, Doubled) for layer in model.model.layers)


@pytest.mark.parametrize("seed", range(3))
def test_a_trained_model_is_tuned_whole(seed: int) -> None:
    """Its keys' gradients hang on few numbers: one input's roundings say little of them."""
    model = load_base(resolve_model(None), dtype=torch.bfloat16).model
    attach(model, LoraConfig(), generator=torch.Generator().manual_seed(seed))
    tuned = tune(model)
    assert not tuned.kept, tuned.kept
    assert tuned.replaced == {"attention": 6, "feed-forward": 6, "norm": 13, "head": 1}


@pytest.mark.parametrize("seed", range(3))
def test_a_replacement_a_little_further_off_is_refused_by_every_draw(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TunedFeed.forward
    generator = torch.Generator().manual_seed(seed)

    def coarse(self: TunedFeed, x: torch.Tensor) -> torch.Tensor:
        out = right(self, x)
        noise = 0.005 * torch.randn(out.shape, generator=generator)  # the original's: 0.003
        return (out.float() * (1 + noise)).to(out)

    monkeypatch.setattr(TunedFeed, "forward", coarse)
    tuned = tune(adapted("llama", torch.bfloat16))
    assert "feed-forward" not in tuned.replaced
    assert tuned.replaced["attention"] == 3, "the rest is replaced"


SMALL = {"vocab_size": 301, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
         "max_position_embeddings": 512}  # fmt: skip
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
          "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
          "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (AutoConfig.for_model("smollm3", num_hidden_layers=9, **SMALL), 7),  # 2 know no positions
        (AutoConfig.for_model("ministral3", num_hidden_layers=2, head_dim=16, sliding_window=None,
                              rope_parameters=SCALED, **SMALL), 0),  # queries scaled from 128 on
        (AutoConfig.for_model("olmo", num_hidden_layers=2, clip_qkv=8.0, **SMALL), 0),
    ],
    ids=["smollm3", "ministral3", "olmo"],
)  # fmt: skip
def test_what_layers_or_positions_do_apart_is_not_replaced(
    config: PretrainedConfig, attention: int
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 2 / parameter.shape[-1] ** 0.5)
    attach(model, LoraConfig(), generator=torch.Generator().manual_seed(0))
    use_flat_attention(model)
    ids, batch = torch.randint(0, 301, (1, 300)), ForwardBatch((300,))
    with torch.no_grad():
        before = flat_forward(model, ids, batch)
        tuned = tune(model)
        after = flat_forward(model, ids, batch)
    assert tuned.replaced.get("attention", 0) == attention
    assert float((after - before).abs().max()) < 1e-3 * float(before.std())


def test_together_they_must_be_the_model_that_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsugiki.models.tune.prove", lambda *_: "")
    model = adapted("llama")
    for layer in model.model.layers:
        layer.mlp = Doubled(layer.mlp)
    tuned = tune(model)
    assert "attention" not in tuned.replaced
    assert [text for text in tuned.kept if "all modules: together they are off by" in text]
    assert not any(isinstance(module, Replacement) for module in model.modules())


def test_the_head_takes_caps_from_the_config() -> None:
    model = adapted("gemma2")
    model.config.final_logit_softcapping = 5.0
    assert tune(model).head == (1.0, 5.0)


def test_a_head_that_does_more_is_noticed() -> None:
    """Whatever lies between the last hidden row and the logits must be known, or nothing is."""
    model = adapted("llama")

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    model.__class__ = Scaled
    tuned = tune(model)
    assert tuned.head is None
    assert tuned.head_of(model) is None
    assert [text for text in tuned.kept if text.startswith("the head")]


def test_a_family_never_seen_keeps_its_modules() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, vocab_size=320, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    attach(model, LoraConfig(r=4))
    use_flat_attention(model)
    plain = copy.deepcopy(model)
    tuned = tune(model)
    assert set(tuned.replaced) <= {"head"}
    (expected, wanted), (logits, found) = gradients(plain), gradients(model)
    assert torch.equal(logits, expected)
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())


def test_own_attention_is_left_alone() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    tuned = tune(model)
    assert tuned.replaced == {}
    assert tuned.kept
