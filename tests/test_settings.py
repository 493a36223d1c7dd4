"""Settings as people write them, in YAML and as flags: what is taken, and what is said of a mistake."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from tsugiki.config import build_config, flag_fields, read_yaml
from tsugiki.errors import UsageError
from tsugiki.flags import meant_flag
from tsugiki.mistakes import plain
from tsugiki.spellings import USUAL_NAMES

MISTAKEN = {
    "yes as seed": (
        "train: {seed: yes}",
        "c.yaml:1: train.seed: takes a whole number, not yes or no",
    ),
    "yes as patience": (
        "train: {early_stopping: true}",
        "train.early_stopping: takes a whole number, not yes or no",
    ),
    "yes as epochs": ("train: {epochs: true}", "train.epochs: takes a number, not yes or no"),
    "flag": ("lora_r: 8", "did you mean lora.r?"),
    "flag with dashes": ("lora-alpha: 8", "did you mean lora.alpha?"),
    "no section": ("learning_rate: 5e-5", "did you mean train.learning_rate?"),
    "other section": ("train: {lora_dropout: 0}", "did you mean lora.dropout?"),
    "far": ("train: {zzzz: 0}", "known: method, epochs"),
    "near nothing": ("wandb: x", "unknown setting 'wandb'; known: version, preset"),
    "Unsloth's": ("lora: {rank: 4}", "did you mean lora.r?\n  fix:     lora: {r: 4}"),
    "at the top": ("rank: 4", "did you mean lora.r?"),
    "short": ("train: {lr: 1}", "train.learning_rate?\n  fix:     train: {learning_rate: 1}"),
    "LLaMA-Factory's": ("lora: {lora_target: 'q_proj,v_proj'}", "fix:     lora: {targets: 'q_proj"),
    "in its section": ("model: {path: x}", "did you mean model.name?"),
    "with a dot": ("lora.r: 4", "fix:     lora: {r: 4}"),
    "another word": ("load_in_4bit: true", "fix:     model: {quantize: nf4}"),
    "eight bits": ("quantization_bit: 8", "fix:     model: {quantize: int8}"),
    "another meaning": ("train_on_inputs: true", "fix:     data: {train_on: …}"),
    "mlx-lm's": ("lora: {scale: 10.0}", "fix:     lora: {alpha: …}"),
    "another optimiser": ("optim: sgd", "fix:     train: {optimizer: …}"),
    "a usual name misspelt": ("train: {num_train_epoch: 2}", "did you mean train.epochs?"),
    "range": (
        "\nlora:\n  r: 0",
        "c.yaml:3: lora.r: must be at least 1\n  got:     0\n  fix:     lora: {r: 16}",
    ),
    "word": (
        "train: {scheduler: cosin}",
        "no such value; did you mean 'cosine'?\n  got:     'cosin'\n  allowed: cosine, linear, constant\n  fix:     train: {scheduler: cosine}",
    ),
    "no list": ("lora: {targets: 5}", "c.yaml:1: lora.targets: takes a text"),
    "broken": ("lora:\n  r: [4\ntrain: {}", "c.yaml:3: not valid YAML: expected ',' or ']'"),
    "a section": (
        "model: ./base",
        "model is a section of settings (got './base'); did you mean mo",
    ),
    "columns": ("data: {columns: prompt}", "takes a list of role=column"),
    "roles": ("data: {columns: {prompt: a, ansewr: b}}", "roles: prompt, answer, system, text"),
    "day": ("data: {template_date: 20261130}", "takes a day such as 2026-11-30"),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_what_yaml_takes_and_what_was_meant(tmp_path: Path, case: str) -> None:
    text, said = MISTAKEN[case]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        build_config(read_yaml(tmp_path / "c.yaml"))
    assert said in str(caught.value)


def test_mistakes_are_told_all_at_once_each_with_its_origin(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lora:\n  alpha: -1\n  r: 0\ntrain:\n")
    flags = {"lora": {"r": -2}, "train": {"method": "ful"}}
    with pytest.raises(UsageError) as caught:
        build_config(read_yaml(tmp_path / "c.yaml"), flags)
    assert str(caught.value).splitlines() == [
        "--lora-r (lora.r): must be at least 1 (got -2)",
        f"{tmp_path}/c.yaml:2: lora.alpha: must be a finite number above 0 (got -1)",
        "--method (train.method): no such value; did you mean 'full'? (got 'ful'; allowed: lora, full)",
        "  fix:     --lora-r 16; lora: {alpha: 32}; --method full",
    ]


WORKS = {flag: place for flag, place in flag_fields().items() if place not in {
    ("preset",), ("output",), ("model", "name"), ("model", "revision"), ("data", "path"),
    ("data", "eval_data"), ("data", "prompt_template"), ("data", "answer_template"),
}}  # fmt: skip


@pytest.mark.parametrize("flag", WORKS)
def test_the_value_that_is_proposed_works(flag: str) -> None:
    section, name = WORKS[flag]
    with pytest.raises(UsageError) as caught:
        build_config({section: {name: {"no": 1}}})
    proposed, value = shlex.split(caught.value.fix or "")
    assert proposed == flag
    build_config({section: {name: value}})


USUAL = {
    "--lr": "--learning-rate", "--rank": "--lora-r", "--r": "--lora-r", "-r": "--lora-r",
    "--alpha": "--lora-alpha", "--bs": "--batch-size", "--lora-rank": "--lora-r",
    "--wd": "--weight-decay", "--grad-accum": "--gradient-accumulation-steps",
    "--per_device_train_batch_size": "--batch-size", "--num_train_epochs": "--epochs",
    "--lora_target": "--targets", "--base_model": "--model", "--cutoff_len": "--max-length",
    "--model_name_or_path": "--model", "--micro_batch_size": "--batch-size",
    "--val_set_size": "--eval-ratio", "--output_dir": "--output", "--max-seq-length": "--max-length",
    "--learning_rate": "--learning-rate", "--lora-alhpa": "--lora-alpha", "--zzz": None,
    "--sgd": None, "--wandb": None, "--eval": None,
}  # fmt: skip


@pytest.mark.parametrize("flag", USUAL)
def test_the_flag_that_was_meant(flag: str) -> None:
    assert meant_flag(flag, {plain(own): own for own in flag_fields()}) == USUAL[flag]


@pytest.mark.parametrize("name", USUAL_NAMES)
def test_usual_names_lead_to_settings_and_are_none(name: str) -> None:
    assert tuple(USUAL_NAMES[name].split(".")) in flag_fields().values()
    assert name not in {plain(flag) for flag in flag_fields()}
    section, _, key = name.rpartition(".")
    with pytest.raises(UsageError, match=f"did you mean {USUAL_NAMES[name]}"):
        build_config({section: {key: 1}} if section else {key: 1})


def test_types_as_people_write_them() -> None:
    for typed, kind in (("fp16", "float16"), ("BF16", "bfloat16"), ("torch.float32", "float32")):
        assert build_config({"model": {"dtype": typed}}).model.dtype == kind
    with pytest.raises(UsageError, match="auto, float32, bfloat16, float16"):
        build_config({"model": {"dtype": "int4"}})


def test_yaml_takes_what_flags_take(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        'lora: {targets: "q_proj, v_proj"}\ntrain: {sample_prompt: hi, learning_rate: 5e-5}\n'
        'data: {columns: "prompt=q, answer=c[label]", template_date: 2026-11-30}\n'
    )
    config = build_config(read_yaml(tmp_path / "c.yaml"))
    assert config.lora.targets == ("q_proj", "v_proj")
    assert (config.train.sample_prompt, config.train.learning_rate) == (("hi",), 5e-5)
    assert config.data.columns == {"prompt": "q", "answer": "c[label]"}
    assert str(config.data.template_date) == "2026-11-30"
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert build_config(read_yaml(tmp_path / "again.yaml")) == config
    flags = {"lora": {"targets": "k_proj,"}, "data": {"columns": "text=t"}}
    config = build_config(read_yaml(tmp_path / "c.yaml"), flags)
    assert (config.lora.targets, config.data.columns) == (("k_proj",), {"text": "t"})


def test_what_yaml_makes_of_a_few_lines_is_not_printed_whole(tmp_path: Path) -> None:
    """Nine lists of nine lists of …: a billion words."""
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    file = tmp_path / "c.yaml"
    file.write_text("\n".join([*lines, "train: *i"]))
    with pytest.raises(UsageError) as caught:
        build_config(read_yaml(file))
    assert len(str(caught.value)) < 5_000
    file.write_text("train: {1: 2}")
    with pytest.raises(UsageError, match=r"c\.yaml must hold a mapping"):
        read_yaml(file)
