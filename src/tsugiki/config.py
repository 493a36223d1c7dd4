"""What a user can ask for: frozen sections, one source of defaults and of help texts.

Flags, YAML keys, the docs' option table and the run folder's `config.yaml` are all generated
from these fields. `None` means "the planner chooses, and prints why" (`planning.py`). Knows
nothing of models, data or hardware, and imports no torch.

Precedence: flag > `--config` file > `--preset` > chosen default.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from tsugiki import spellings
from tsugiki.errors import UsageError
from tsugiki.files import parse_bytes, parse_yaml
from tsugiki.mistakes import FromFile, Known, Place, lines_of, origin, refusal

TrainOn = Literal["assistant", "last", "everything"]
Long = Literal["skip", "window", "split"]
Method = Literal["lora", "full"]
Scheduler = Literal["cosine", "linear", "constant"]
Compute = Literal["bf16", "int8"]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(spellings.dtype)
]
Quantize = Literal["none", "nf4", "int8"]
Checkpointing = Literal["auto", "always", "never"]
Optimizer = Annotated[
    Literal["adamw", "adamw_8bit", "paged_adamw_8bit"], BeforeValidator(spellings.optimizer)
]
Columns = Annotated[dict[str, str], BeforeValidator(spellings.columns)]
Day = Annotated[datetime.date | None, BeforeValidator(spellings.day)]
Targets = Annotated[str | tuple[str, ...], BeforeValidator(spellings.names)]
Texts = Annotated[tuple[str, ...], BeforeValidator(spellings.texts)]


def _holds(rule: Callable[[Any], bool], said: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not rule(value):
            raise ValueError(said)
        return value

    return AfterValidator(check)


Share = Annotated[float, _holds(lambda x: 0 <= x < 1, "must be at least 0 and below 1")]
Positive = Annotated[
    float, _holds(lambda x: math.isfinite(x) and x > 0, "must be a finite number above 0")
]
NotNegative = Annotated[
    float, _holds(lambda x: math.isfinite(x) and x >= 0, "must be a finite number, at least 0")
]
Count = Annotated[int, _holds(lambda x: x >= 1, "must be at least 1")]
Tokens = Annotated[int, _holds(lambda x: x >= 2, "must be at least 2 tokens")]
Seed = Annotated[int, _holds(lambda x: 0 <= x < 1 << 63, "must be at least 0 and below 2^63")]
Size = Annotated[str, _holds(lambda x: parse_bytes(x) >= 0, "must be a size")]


def option(flag: str, text: str, default: Any = None, *, works: Any = None) -> Any:
    """A field that is also a command-line flag, with the same help text everywhere.

    Args:
        works: a value to propose where the user's makes no sense, if the default is none.
    """
    extra = {"flag": flag, "works": default if works is None else works}
    return Field(default=default, description=text, json_schema_extra=extra)


class Section(BaseModel):
    """Frozen, refuses unknown keys, and is validated also where a default is used."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, field: ValidationInfo) -> Any:
        kind = spellings.plain_type(cls.model_fields[str(field.field_name)].annotation)[0]
        if isinstance(value, bool) and kind in (int, float):
            what = "whole number" if kind is int else "number"
            raise ValueError(f"takes a {what}, not yes or no")
        return value


class ModelConfig(Section):
    """Which base, and how it is loaded."""

    name: str | None = option("--model", "local folder or Hub name; default: the embedded sprout")
    revision: str | None = option("--revision", "branch, tag or commit on the Hub")
    trust_remote_code: bool = option(
        "--trust-remote-code", "allow a model folder to run its own Python code", False
    )
    device: str = option("--device", "auto, cpu, cuda, cuda:N or mps", "auto")
    compute: Compute = option(
        "--compute",
        "products of the frozen base in a step: bf16 (that is, in --dtype) or int8 (CPU; faster, "
        "used only where its gradients are proven on your rows)",
        "bf16",
    )
    dtype: DType = option("--dtype", "compute type; auto takes a short timing probe", "auto")
    quantize: Quantize = option(
        "--quantize",
        "keep the frozen projections in few bits: nf4 (QLoRA, 4 bits), int8 or none",
        "none",
        works="nf4",
    )


class DataConfig(Section):
    """Which rows, how they become prompts and answers, and what is trained."""

    path: Path | None = option("--data", "file or folder: JSONL, JSON, CSV, TSV, Parquet, text")
    eval_data: Path | None = option("--eval-data", "held-out rows in a file of their own")
    eval_ratio: Share | None = option(
        "--eval-ratio",
        "share of rows held out (0 for none); default 0.1, at most 200 rows",
        works=0.1,
    )
    columns: Columns = option(
        "--columns",
        "what columns hold: prompt=question,answer=choice[label]; text=story",
        {},
        works="prompt=question,answer=answer",
    )
    prompt_template: str | None = option(
        "--prompt-template", "prompt made of columns, e.g. 'Q: {question}'"
    )
    answer_template: str | None = option(
        "--answer-template", "answer made of columns, e.g. '{choice[label]}'"
    )
    template: Literal["chatml", "alpaca", "instruction-ja", "plain"] | None = option(
        "--template",
        "chat format where the tokenizer has none: chatml, alpaca, instruction-ja, plain",
    )
    template_date: Day = option(
        "--template-date",
        "day that a chat template prints which prints the day, such as 2026-11-30; "
        "default: the day on which the run begins",
        works="2026-11-30",
    )
    train_on: TrainOn = option(
        "--train-on", "assistant: every answer; last: the last one; everything", "assistant"
    )
    max_length: Tokens | None = option("--max-length", "longest example in tokens", works=512)
    long: Long | None = option(
        "--long", "longer rows: skip, window (drop the oldest context), split (raw text)"
    )
    strict: bool = option("--strict", "stop at the first row that would be skipped", False)


class LoraConfig(Section):
    """The adapter: rank, scale, which projections (Hu et al. 2021, arXiv:2106.09685)."""

    r: Count = option("--lora-r", "rank of the adapter", 16)
    alpha: Positive | None = option("--lora-alpha", "scale is alpha / r; default 2·r", works=32)
    dropout: Share = option("--lora-dropout", "dropout on the adapter's input", 0.0, works=0.05)
    targets: Targets = option(
        "--targets",
        "minimal (q,v), standard (q,k,v,o), maximal, all-linear, or names",
        "all-linear",
    )
    rslora: bool = option("--rslora", "scale by alpha / sqrt(r) (arXiv:2312.03732)", False)

    @property
    def resolved_alpha(self) -> float:
        """alpha, or 2·r where none was given."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What B·A is multiplied by: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        return self.resolved_alpha / (math.sqrt(self.r) if self.rslora else self.r)


class TrainConfig(Section):
    """The run: method, steps, rate, what is saved and logged."""

    method: Method = option("--method", "lora, or full fine-tuning as the baseline", "lora")
    epochs: Positive | None = option("--epochs", "passes over the rows", works=3)
    max_steps: Count | None = option(
        "--max-steps", "optimiser steps; beside --epochs, the fewer of both", works=100
    )
    batch_size: Count | None = option("--batch-size", "rows in one forward pass", works=4)
    gradient_accumulation_steps: Count | None = option(
        "--gradient-accumulation-steps", "forward passes in one optimiser step", works=4
    )
    learning_rate: Positive | None = option("--learning-rate", "peak learning rate", works=1e-4)
    warmup_ratio: Share | None = option(
        "--warmup-ratio", "share of steps in which the rate rises", works=0.05
    )
    weight_decay: NotNegative | None = option(
        "--weight-decay", "AdamW's decoupled weight decay", works=0.01
    )
    scheduler: Scheduler | None = option("--scheduler", "cosine, linear or constant after warm-up")
    max_grad_norm: NotNegative = option(
        "--max-grad-norm", "clip the global gradient norm (0: off)", 1.0
    )
    optimizer: Optimizer = option(
        "--optimizer",
        "adamw, adamw_8bit or paged_adamw_8bit (the last two need CUDA; elsewhere: adamw)",
        "adamw",
    )
    gradient_checkpointing: Checkpointing = option(
        "--gradient-checkpointing",
        "compute each layer twice to save memory: auto (where memory needs it), always, never",
        "auto",
    )
    max_memory: Size | None = option(
        "--max-memory",
        "most memory the run may take, such as 8GB or 6GiB; default: what is free",
        works="8GB",
    )
    seed: Seed = option("--seed", "seed of shuffling, dropout and initial weights", 0)
    save_every: Count | None = option("--save-every", "steps between checkpoints", works=100)
    log_every: Count | None = option("--log-every", "steps between log lines", works=10)
    eval_every: Count | None = option("--eval-every", "steps between held-out losses", works=100)
    early_stopping: Count | None = option(
        "--early-stopping", "stop after so many held-out losses without a new best", works=3
    )
    sample_prompt: Texts = option(
        "--sample-prompt", "prompt answered at start, middle and end (repeatable)", ()
    )
    show_grad_norms: bool = option(
        "--show-grad-norms", "gradient norm of every LoRA tensor in the log", False
    )


class RunConfig(Section):
    """Everything that `tsugiki train` was asked for, saved as `config.yaml` in the run folder."""

    version: Literal[1] = 1
    preset: str | None = option("--preset", "settings from the guides (tsugiki presets lists them)")
    output: Path | None = option("--output", "run folder to make; default runs/NAME-DATE")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()

    def to_yaml(self) -> str:
        """The config as YAML that `--config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "lora": LoraConfig,
    "train": TrainConfig,
}


def flag_fields() -> dict[str, Place]:
    """Flag → where its value lives: {'--lora-r': ('lora', 'r'), …}, in the order of the help."""
    found: dict[str, Place] = {}
    for name, field in RunConfig.model_fields.items():
        if name in SECTIONS:
            for inner, inner_field in SECTIONS[name].model_fields.items():
                extra = inner_field.json_schema_extra
                assert isinstance(extra, dict)
                found[str(extra["flag"])] = (name, inner)
        elif isinstance(field.json_schema_extra, dict):
            found[str(field.json_schema_extra["flag"])] = (name,)
    return found


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and key in SECTIONS:
            out[key] = {**out[key], **value}
        else:
            out[key] = value
    return out


def build_config(*layers: dict[str, Any]) -> RunConfig:
    """A RunConfig from nested dicts, lowest precedence first.

    Raises:
        UsageError: every unknown key (with the one that was meant) and bad value at once, each with
            the file and line, or the flag, that it came from, and a value that works.
    """
    raw: dict[str, Any] = {}
    for layer in layers:
        raw = merge(raw, layer)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        sections = {name: list(section.model_fields) for name, section in SECTIONS.items()}
        sections[""] = list(RunConfig.model_fields)
        known = Known(flags_by_place(), sections, _working)
        raise refusal(error, known, lambda place: origin(layers, place)) from None


def _working(place: Place, value: Any) -> Any:
    """What the field at `place` takes: the value itself, else as a text, else one that works."""
    section, name = (SECTIONS[place[0]] if len(place) > 1 else RunConfig), place[-1]
    extra = section.model_fields[name].json_schema_extra
    works = extra.get("works") if isinstance(extra, dict) else None
    texts = (str(value),) if isinstance(value, str | int | float) and value is not True else ()
    for candidate in (value, *texts):
        with contextlib.suppress(ValidationError):
            section.model_validate({name: candidate})
            return candidate
    return works


def read_yaml(path: Path) -> FromFile:
    """The settings of a `--config` file.

    Raises:
        UsageError: not readable, not YAML, or not a mapping; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = parse_yaml(text)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", fix="check --config") from None
    except UnicodeDecodeError as error:
        fix = "save it as UTF-8"
        raise UsageError(f"{path} is not valid YAML: {error}", fix=fix) from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply", fix="mend --config") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        said = getattr(error, "problem", None) or error
        raise UsageError(f"{place}: not valid YAML: {said}", fix="mend that line") from None
    if loaded is None:
        return FromFile({}, path, {})
    if not isinstance(loaded, dict) or not _are_named(loaded):
        raise UsageError(
            f"{path} must hold a mapping of sections, with names as keys",
            got=type(loaded).__name__,
            allowed=", ".join(RunConfig.model_fields),
        )
    empty = [key for key, value in loaded.items() if key in SECTIONS and value is None]
    said = {key: value for key, value in loaded.items() if key not in empty}
    return FromFile(said, path, lines_of(text))


def _are_named(loaded: dict[Any, Any]) -> bool:
    """Whether all keys are texts, of the sections too."""
    sections = (held for held in loaded.values() if isinstance(held, dict))
    return all(isinstance(key, str) for keys in (loaded, *sections) for key in keys)


def flags_by_place() -> dict[Place, str]:
    """Where a value lives → its flag; the other way round than `flag_fields`."""
    return {place: flag for flag, place in flag_fields().items()}
