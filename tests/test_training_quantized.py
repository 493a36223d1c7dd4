"""QLoRA from the command line's side: runs, resumes, lineage, memory, and what is said about it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from runs import adapter, forked, make_place, result
from torch import nn
from transformers import AutoConfig

from tsugiki.adapters.attach import attach, detach, training_mode
from tsugiki.config import LoraConfig, RunConfig, build_config, read_yaml
from tsugiki.data.example import Example
from tsugiki.device import Decisions
from tsugiki.errors import MemoryLimitError, RunError, UsageError
from tsugiki.fitting import Length, fit_to_memory
from tsugiki.joining import merge_adapter
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.checkpointing import CheckpointedLayer, checkpoint_layers
from tsugiki.models.flat import flat_forward, use_flat_attention
from tsugiki.models.spec import ModelSpec
from tsugiki.models.tune import tune
from tsugiki.pipelines import run_training
from tsugiki.planning import Facts, Plan, make_plan, memory_limit
from tsugiki.presets import PRESETS, preset
from tsugiki.quantizing import quantize_base
from tsugiki.talk.naming import Who, find_named
from tsugiki.talk.opening import open_voices
from tsugiki.terminal import Terminal
from tsugiki.training.checkpoint import checkpoints
from tsugiki.training.ranks import ranks
from tsugiki.training.state import Progress, pack, unpack
from tsugiki.training.step import make_optimizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, rows.jsonl, whole/ (16-bit), four/ (nf4, checkpointed layers)."""
    folder = tmp_path_factory.mktemp("runs")
    make_place(folder, forked)
    run(folder, "four", {"quantize": "nf4"}, {"gradient_checkpointing": "always"})
    return folder


def run(place: Path, output: str, model: dict[str, Any], train: dict[str, Any]) -> None:
    stored = read_yaml(place / "whole" / "config.yaml")
    changes = {"output": str(place / output), "model": model, "train": train}
    run_training(build_config(stored, changes), Terminal(as_json=True))


def test_a_quantised_run_resumes_to_the_same_bytes(place: Path) -> None:
    for name, free in (("again", {}), ("unchecked", {"gradient_checkpointing": "never"})):
        shutil.copytree(place / "four", place / name)
        shutil.rmtree(place / name / "adapter")
        shutil.rmtree(checkpoints(place / name / "checkpoints")[0][1])
        config = build_config(read_yaml(place / name / "config.yaml"), {"train": free})
        run_training(config, Terminal(as_json=True), resume=place / name)
        assert result(place / name) == result(place / "four")
    assert adapter(place / "four") != adapter(place / "whole")


def test_a_run_does_not_go_on_in_other_bits(place: Path) -> None:
    config = build_config(
        read_yaml(place / "four" / "config.yaml"), {"model": {"quantize": "int8"}}
    )
    with pytest.raises(RunError, match="quantize: nf4 → int8"):
        run_training(config, Terminal(as_json=True), resume=place / "four")


def test_the_adapter_knows_its_base_and_its_bits(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((place / "four" / "adapter" / "tsugiki.json").read_text())
    sixteen = json.loads((place / "whole" / "adapter" / "tsugiki.json").read_text())
    assert record["base"]["quantize"] == "nf4"
    assert sixteen["base"]["quantize"] == "none"
    assert record["base"]["exact"] == sixteen["base"]["exact"], "the 16-bit base's fingerprint"
    assert record["targets"] == sixteen["targets"]
    for quantize, expected, note in ((None, "nf4", ""), ("none", "none", "16- or 32-bit")):
        who = Who(adapters=(str(place / "four"),), quantize=quantize)
        opened = open_voices(find_named(who, Terminal(), place), Terminal())
        said = capsys.readouterr().err
        assert opened.base.quantize == expected
        assert ("trained on this base kept as nf4" in said) == bool(note)
        assert note in said
    with pytest.raises(UsageError, match="no such --quantize"):
        open_voices(
            find_named(Who(adapters=(str(place / "four"),), quantize="4bit"), Terminal(), place),
            Terminal(),
        )


def test_an_adapter_of_a_quantised_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on the folder, it belongs to the 16-bit base, and finds the folder again."""
    quantize_base(str(place / "model"), place / "small", "nf4", "float32", as_json=True)
    few = {"max_steps": 2, "save_every": 2, "eval_every": 2}
    run(place, "stored", {"name": str(place / "small")}, few)
    run(place, "loaded", {"quantize": "nf4"}, few)
    assert adapter(place / "stored") == adapter(place / "loaded"), "the same codes"
    base = json.loads((place / "stored" / "adapter" / "tsugiki.json").read_text())["base"]
    assert base["name"] == str(place / "model")
    opened = open_voices(
        find_named(Who(adapters=(str(place / "stored"),)), Terminal(), place), Terminal()
    )
    assert opened.base.folder == place / "small"
    shutil.rmtree(place / "small")
    opened = open_voices(
        find_named(Who(adapters=(str(place / "stored"),)), Terminal(), place), Terminal()
    )
    assert (opened.base.quantize, opened.base.origin) == ("nf4", None), "quantised anew"
    capsys.readouterr()
    merge_adapter(place / "stored", place / "merged2", Terminal())


def test_full_fine_tuning_needs_weights_that_change(place: Path) -> None:
    with pytest.raises(UsageError, match="cannot be changed"):
        run(place, "none", {"quantize": "nf4"}, {"method": "full"})
    assert not (place / "none").exists()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_checkpointed_gradients_are_the_same_bits(family: str) -> None:
    model = tiny_model(family)
    attach(model, LoraConfig(r=4, dropout=0.2), generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(1))
    use_flat_attention(model)
    lean = copy.deepcopy(model)
    tune(model)
    tune(lean)
    names = [name for name, _ in lean.named_parameters()]
    assert checkpoint_layers(lean) == 3
    assert [name for name, _ in lean.named_parameters()] == names
    ids, saved, found = torch.arange(50)[None], [], []
    for one in (model, lean):
        training_mode(one, True)
        torch.manual_seed(5)
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits = flat_forward(one, ids, ForwardBatch((20, 30)))
        saved.append(kept)
        logits.square().sum().backward()
        found.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert all(float(grad.norm()) > 0 for grad in found[0].values())
    assert saved[1] < 0.4 * saved[0]
    detach(lean)
    assert not any(isinstance(module, CheckpointedLayer) for module in lean.modules())


SPEC = ModelSpec.from_config(  # shapes alone: nothing of it is in memory
    AutoConfig.for_model(
        "qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=True,
    )
)  # fmt: skip
FACTS = Facts(rows=600, labelled_tokens=200_000, tokens=300_000, longest=2000, held_out=60)
CPU = Decisions("cpu", "bfloat16", 2)


def plan(available: int | None = None, *layers: dict[str, Any], facts: Facts = FACTS) -> Plan:
    config: RunConfig = build_config(*layers)
    return make_plan(config, SPEC, facts, CPU, trainable=8_800_000, available=available)


def test_memory_decides_rows_then_checkpointing_then_refuses() -> None:
    wide = plan(10**12)
    assert wide.config.train.gradient_checkpointing == "never"
    assert wide.config.train.batch_size == 8
    some = int(0.6 * wide.memory_total)
    fewer = plan(some)
    assert fewer.config.train.gradient_checkpointing == "never"
    assert fewer.config.train.batch_size < 8, "fewer rows at a time come first"  # type: ignore[operator]
    assert fewer.rows_per_step == 8, "of as many rows a step"
    assert fewer.memory_total <= some
    fixed = {"train": {"batch_size": 8, "gradient_accumulation_steps": 1}}
    lean = plan(some, fixed)
    assert lean.config.train.gradient_checkpointing == "always"
    assert "with it" in lean.reasons["train.gradient_checkpointing"]
    assert lean.memory_total <= some
    with pytest.raises(MemoryLimitError) as caught:
        plan(lean.memory_total // 2, fixed)
    fix = str(caught.value.fix)
    for way in ("--quantize nf4", "--batch-size 1", "--max-length 1000", "--lora-r 8", "a smaller"):
        assert way in fix
    never = {"train": {"gradient_checkpointing": "never"}}
    with pytest.raises(MemoryLimitError, match="this run needs"):
        plan(some, fixed, never)


def test_rows_are_as_long_as_memory_allows() -> None:
    long = replace(FACTS, longest=16_000, tokens=2_400_000)

    def length(memory: int | str, **data: Any) -> Length:
        given = {"train": {"max_memory": str(memory)}, "data": data}
        return fit_to_memory(build_config(given), SPEC, long, CPU)

    wide = length("900GB")
    assert (wide.tokens, wide.cut) == (16_000, False)
    assert "the longest row" in wide.reason
    one = {"train": {"batch_size": 1, "gradient_checkpointing": "always"}}
    some = int(0.8 * plan(10**12, one, facts=long).memory_total)
    with pytest.raises(MemoryLimitError):
        plan(some, facts=long)
    short = length(some)
    assert short.cut
    assert 2_000 < short.tokens < 16_000
    tokens = FACTS.rows * min(4_000, short.tokens)
    plan(some, facts=replace(long, longest=short.tokens, tokens=tokens))
    asked = length(some, max_length=15_000)
    assert (asked.tokens, asked.cut) == (15_000, False), "what was asked for is kept, or refused"
    assert not length("1MB").cut, "nothing useful fits: planning refuses"


def test_ways_out_are_ranked_by_what_they_need() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        plan(1000, {"train": {"batch_size": 4, "gradient_accumulation_steps": 2}})
    ways = str(caught.value.fix).split("; ")[:-1]
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
    needs = []
    for way in ways:
        number, unit = way.rpartition("(")[2].rstrip(")").split()
        needs.append(float(number) * units[unit])
    assert len(needs) >= 4
    assert needs == sorted(needs)
    got = re.search(r"([\d.]+) (KB|MB|GB)", caught.value.problem)
    assert got is not None
    assert max(needs) <= 1.05 * float(got[1]) * units[got[2]], "none that saves nothing"


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("6GiB", 6 << 30), ("500 mb", 5 * 10**8), ("1.5G", 15 * 10**8)],
)
def test_max_memory_is_read_as_people_write_it(text: str, size: int) -> None:
    assert memory_limit(text, "cpu") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8 apples", "1e9"])
def test_max_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory"):
        build_config({"train": {"max_memory": text}})


def test_max_memory_is_the_limit() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        plan(None, {"train": {"max_memory": "100MB"}})
    assert "100.0 MB to use" in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("adamw_torch", "adamw"), ("adamw_bnb_8bit", "adamw_8bit"), ("AdamW-8bit", "adamw_8bit"),
     ("paged_adamw_8bit", "paged_adamw_8bit"), ("paged_adamw_32bit", "adamw")],
)  # fmt: skip
def test_optimisers_as_people_type_them(typed: str, meant: str) -> None:
    config = build_config({"train": {"optimizer": typed}})
    assert config.train.optimizer == meant
    made = plan(10**12, {"train": {"optimizer": typed}})
    assert made.config.train.optimizer == "adamw", "without CUDA"
    assert ("train.optimizer" in made.reasons) == (meant != "adamw")


def test_an_optimiser_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="adamw, adamw_8bit, paged_adamw_8bit"):
        build_config({"train": {"optimizer": "sgd"}})


def test_the_qlora_preset_is_the_guides() -> None:
    settings = preset("qlora")
    assert settings == {
        "model": {"quantize": "nf4"},
        "data": {"max_length": 512},
        "lora": {"r": 16, "alpha": 32, "dropout": 0.05},
        "train": {"learning_rate": 2e-4, "epochs": 3, "batch_size": 4,
                  "gradient_accumulation_steps": 4, "optimizer": "paged_adamw_8bit"},
    }  # fmt: skip
    assert build_config(settings).lora.targets == "all-linear"
    assert "qlora" in PRESETS


def test_an_eight_bit_optimiser_goes_on_where_it_stopped() -> None:
    """bitsandbytes' states are counted in whole steps and kept in codes; both come back."""
    from tsugiki.data.loader import Loader

    alone = ranks(torch.device("cpu"))

    def fresh() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, Loader]:
        torch.manual_seed(0)
        trained = {"a": nn.Parameter(torch.randn(96, 64))}
        optimizer = make_optimizer(trained, 0.01, torch.device("cpu"), "adamw_8bit")
        rows = [Example((1, 2), (1, 2), str(i)) for i in range(8)]
        return trained, optimizer, Loader(tuple(rows), micro_batch=2, accumulation=1, seed=0)

    def steps(
        trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, *numbers: int
    ) -> None:
        for number in numbers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            trained["a"].grad = torch.full_like(trained["a"], float(number)).cos()
            optimizer.step()

    whole, optimizer, _ = fresh()
    steps(whole, optimizer, 1, 2, 3, 4)
    half, optimizer, loader = fresh()
    steps(half, optimizer, 1, 2)
    tensors, state = pack(half, optimizer, loader, Progress(), "cpu", alone)
    assert tensors["optim.state1.a"].dtype == torch.uint8
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again, optimizer, loader = fresh()
    unpack(tensors, state, again, optimizer, loader, "cpu", alone)
    steps(again, optimizer, 3, 4)
    assert torch.equal(again["a"], whole["a"])
