"""Models whose frozen projections multiply in int8, or for a while in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, tiny_model
from torch import Tensor, nn

from tsugiki import memory
from tsugiki.adapters.attach import attach, detach, lora_modules
from tsugiki.config import LoraConfig
from tsugiki.errors import ModelError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.int8 import Int8Weight
from tsugiki.models.flat import flat_forward, flat_loss, use_flat_attention
from tsugiki.models.int8 import LEVELS, Int8Products, doors
from tsugiki.models.projections import frozen_weight
from tsugiki.models.quantized import quantize_modules
from tsugiki.models.spec import ModelSpec
from tsugiki.models.tune import Tuned, tune
from tsugiki.models.wide import in_fp32

LENGTHS = (7, 40, 3)


def adapted(
    family: str, dtype: torch.dtype = torch.bfloat16, targets: str = "all-linear"
) -> nn.Module:
    model = tiny_model(family).to(dtype)
    config = LoraConfig(r=4, alpha=8, targets=targets)
    attach(model, config, generator=torch.Generator().manual_seed(0))
    for _, module in lora_modules(model):
        nn.init.normal_(module.lora_B, 0.0, 0.02, generator=torch.Generator().manual_seed(1))
    use_flat_attention(model)
    return model


def gradients(model: nn.Module, tuned: Tuned) -> dict[str, Tensor]:
    ids = torch.arange(sum(LENGTHS))[None] * 37 % 320
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    places = torch.arange(1, sum(LENGTHS))
    head = tuned.head_of(model)
    loss = flat_loss(model, ids, ForwardBatch(LENGTHS), places - 1, ids[0, places], head=head)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def cosines(one: dict[str, Tensor], two: dict[str, Tensor]) -> Tensor:
    assert one.keys() == two.keys()
    flat = nn.functional.cosine_similarity
    return torch.stack(
        [flat(one[n].flatten().double(), g.flatten().double(), dim=0) for n, g in two.items()]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_multiplies_in_int8(family: str) -> None:
    model = adapted(family)
    tuned = tune(model)
    names = list(model.state_dict())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = flat_forward(model, ids, ForwardBatch((20,)))
    with in_fp32(model, list(doors(model, tuned).values())):
        exact = gradients(model, tuned)
    products = Int8Products(model, tuned)
    # every projection of three layers, and the head
    assert len(products.weights) == {"gpt2": 12, "phi3": 12}.get(family, 21) + 1
    lowest = []
    for level in range(len(LEVELS)):
        products.use(level)
        lowest.append(float(cosines(gradients(model, tuned), exact).median()))
    assert lowest[0] > 0.95, lowest  # matrices of these tiny random models are wild
    assert lowest[-1] > max(0.99, lowest[0]), "the safest level is closer"
    assert list(model.state_dict()) == names, "no name changes"
    with torch.no_grad():  # evaluation sees the base as it is
        assert torch.equal(flat_forward(model, ids, ForwardBatch((20,))), before)
    detach(model)
    assert not any(isinstance(m, Int8Weight) for m in _weights(model))


def _weights(model: nn.Module) -> list[object]:
    with torch.enable_grad():
        return [frozen_weight(m) for m in model.modules() if isinstance(m, nn.Linear)]


def test_projections_without_an_adapter_too() -> None:
    model = adapted("llama", targets="minimal")
    products = Int8Products(model, tune(model))
    assert len(products.weights) == 3 * 7 + 1
    assert sum("gate_proj" in path for path in products.weights) == 3


def test_a_family_never_seen_multiplies_its_adapted_projections_in_int8() -> None:
    model = adapted("llama")
    products = Int8Products(model, Tuned())  # nothing replaced, the model's own head
    assert len(products.weights) == 21
    grads = gradients(model, Tuned())
    products.use(2)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in grads.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_fp32_for_a_while_is_an_fp32_copy(family: str) -> None:
    model = adapted(family)
    wide = copy.deepcopy(model).float()
    expected = gradients(wide, tune(wide))
    tuned = tune(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_fp32(model, list(doors(model, tuned).values())):
        found = gradients(model, tuned)
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) <= 1e-4 * float(grad.norm()), name
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor, kept[name]), name
    assert cosines(gradients(model, tuned), expected).min() < 0.9999999, "narrow again"


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_on_a_base_in_few_bits(method: str) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    quantize_modules(model, method)
    attach(model, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
    for _, module in lora_modules(model):
        nn.init.normal_(module.lora_B, 0.0, 0.02)
    use_flat_attention(model)
    tuned = tune(model)
    with in_fp32(model, list(doors(model, tuned).values())):
        exact = gradients(model, tuned)
    products = Int8Products(model, tuned)
    assert len(products.weights) == 22
    products.use(1)
    assert float(cosines(gradients(model, tuned), exact).median()) > 0.98
    planned = memory.int8_bytes(memory.shape_of(ModelSpec.from_config(model.config)), method)
    assert planned - memory.INT8_SCRATCH == products.nbytes, "what is planned is what is held"
    if method == "int8":  # the head's codes, and scales
        rows = sum(weight.shape[0] for weight in products.weights.values())
        assert products.nbytes == products.weights["lm_head"].packed.nbytes + 4 * rows


def test_a_weight_with_nan_is_named_and_nothing_changes() -> None:
    model = adapted("llama")
    tuned = tune(model)
    model.model.layers[1].mlp.up_proj.base.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        Int8Products(model, tuned)
    assert not any(isinstance(m, Int8Weight) for m in _weights(model))
