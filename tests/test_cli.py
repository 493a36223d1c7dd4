"""The command line as a user meets it: errors without tracebacks, precedence, the guide's script."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import save_tiny
from runs import own_cache
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.config import RunConfig, build_config, flag_fields, read_yaml
from tsugiki.errors import DiskError, UsageError
from tsugiki.presets import PRESETS, preset
from tsugiki.training.place import refuse_used

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny("llama", folder / "model", tiny_tokenizer(CHATML))
    rows = [{"prompt": f"say {i}", "completion": f"{i} it is"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "moved").mkdir()
    (folder / "bare").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "bare")
    (folder / "moved" / "config.yaml").write_text("data: {path: gone.jsonl}\n")
    return folder


def run(
    place: Path, *arguments: str, script: str | None = None, path: str = ""
) -> subprocess.CompletedProcess[str]:
    start = [str(ROOT / script)] if script else ["-m", "tsugiki"]
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TSUGIKI_CACHE": own_cache(place / "cache"),
             "COLUMNS": "200", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_guides_command_as_written(place: Path) -> None:
    (place / "data").mkdir(exist_ok=True)
    (place / "data" / "japanese_chat.jsonl").write_text((place / "rows.jsonl").read_text())
    done = run(
        place, "--model", "model", "--data", "data/japanese_chat.jsonl", "--lora-r", "16",
        "--lora-alpha", "32", "--lora-dropout", "0.05", "--epochs", "3", "--batch-size", "2",
        "--gradient-accumulation-steps", "8", "--learning-rate", "5e-5",
        "--output", "models/japanese_chat", script="scripts/train_lora.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = build_config(read_yaml(place / "models/japanese_chat/config.yaml"))
    assert stored.train.warmup_ratio == 0.3, "the guide's own default"
    assert stored.train.learning_rate == 5e-5
    adapter = place / "models" / "japanese_chat" / "adapter"
    for name in (
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training_info.json", "tsugiki.json",
    ):  # fmt: skip
        assert (adapter / name).is_file(), name
    assert (place / "models" / "japanese_chat" / "report.html").is_file()


def test_json_and_dry_run(place: Path) -> None:
    done = run(place, "train", "rows.jsonl", "--model", "model", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line)["kind"] for line in done.stdout.splitlines()]
    assert "plan" in kinds
    assert kinds[-1] == "dry_run"
    assert not (place / "runs").exists()


def test_the_qlora_preset_and_what_becomes_of_it(place: Path) -> None:
    given = ["train", "rows.jsonl", "--model", "model", "--preset", "qlora", "--max-length", "128"]
    done = run(place, *given, "--device", "cpu", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    (plan,) = (
        said for line in done.stdout.splitlines() if (said := json.loads(line))["kind"] == "plan"
    )
    config = plan["config"]
    assert config["model"]["quantize"] == "nf4"
    assert config["data"]["max_length"] == 128, "a flag over the preset"
    assert (config["lora"]["r"], config["lora"]["alpha"], config["lora"]["dropout"]) == (
        16,
        32,
        0.05,
    )
    train = config["train"]
    assert (train["learning_rate"], train["epochs"]) == (2e-4, 3)
    assert (train["batch_size"], train["gradient_accumulation_steps"]) == (4, 4)
    assert train["optimizer"] == "adamw"
    assert "paged_adamw_8bit needs CUDA" in plan["reasons"]["train.optimizer"]


def test_only_file_in_data_is_taken(place: Path) -> None:
    (place / "solo" / "data").mkdir(parents=True)
    (place / "solo" / "data" / "mine.jsonl").write_text((place / "rows.jsonl").read_text())
    done = run(place / "solo", "train", "--model", "../model", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "30 read" in done.stdout
    done = run(place / "model", "train", "--model", ".", "--dry-run")
    assert done.returncode != 0
    assert "no data was named" in done.stderr


BAD = {
    "no such file": (["train", "nothing.jsonl", "--model", "model"], "there is no file"),
    "no such model": (["train", "rows.jsonl", "--model", "./modle"], "did you mean model"),
    "r = 0": (["train", "rows.jsonl", "--lora-r", "0"], "--lora-r"),
    "alpha < 0": (["train", "rows.jsonl", "--lora-alpha", "-1"], "--lora-alpha"),
    "lr = nan": (["train", "rows.jsonl", "--learning-rate", "nan"], "--learning-rate"),
    "unknown flag": (["train", "rows.jsonl", "--lora-rank", "3"], "did you mean --lora-r?"),
    "flag of no verb": (["generate", "hi", "--zzz"], "tsugiki generate --help lists them"),
    "base": (["generate", "hi", "--base"], "did you mean --base-only?"),
    "chat's base": (["chat", "--base"], "did you mean --base-only?"),
    "scheduler": (["train", "rows.jsonl", "--scheduler", "cosin"], "fix:     --scheduler cosine"),
    "unknown preset": (["train", "rows.jsonl", "--preset", "chta"], "--preset chat"),
    "context": (["train", "rows.jsonl", "--model", "model", "--max-length", "9999"], "2…256"),
    "target": (["train", "rows.jsonl", "--model", "model", "--targets", "q_porj"], "q_proj"),
    "device": (["train", "rows.jsonl", "--model", "model", "--device", "cuda:7"], "not on this"),
    "no run": (["train", "--resume", "runs/none"], "there is no run folder"),
    "no run folder": (["train", "--resume", "rows.jsonl"], "rows.jsonl is not a run folder"),
    "seed": (["train", "rows.jsonl", "--seed", "-3"], "--seed"),
    "a file": (["train", "rows.jsonl", "--model", "model", "--output", "rows.jsonl"], "is a file"),
    "in a file": (["train", "rows.jsonl", "--output", "rows.jsonl/x"], "is a file"),
    "long name": (["train", "x" * 300], "File name too long"),
    "long model": (["train", "rows.jsonl", "--model", f"./{'x' * 300}"], "File name too long"),
    "no target": (["train", "rows.jsonl", "--model", "model", "--targets", ""], "no target was"),
    "word": (["train", "rows.jsonl", "--model", "model", "--targets", "allinear"], "all-linear?"),
    "column": (
        ["train", "rows.jsonl", "--model", "model", "--columns", "prompt=prompt,answer=compeltion"],
        "did you mean 'completion'?",
    ),
    "resume as": (["train", "--resume", "model", "--preset", "style"], "joined with --resume"),
    "resume by": (["train", "--resume", "model", "--config", "c.yaml"], "joined with --resume"),
    "moved": (["train", "--resume", "moved"], "tsugiki train --resume moved --data WHERE_IT_IS"),
    "exists": (["train", "rows.jsonl", "--model", "model", "--output", "model"], "exists already"),
    "suffix": (["train", "model/config.yml", "--model", "model"], "no file"),
    "memory": (["train", "rows.jsonl", "--model", "model", "--max-memory", "50MB"], "--lora-r 8"),
    "no size": (["train", "rows.jsonl", "--max-memory", "lots"], "--max-memory"),
    "adapter": (["generate", "--adapter", "model", "hi"], "there is no adapter in model"),
    "prompt": (
        ["generate", "--adapter", "model", "--prompt", "hi"],
        "there is no adapter in model",
    ),
    "no prompt": (["generate", "--adapter", "model"], "no prompt"),
    "raw": (["generate", "hi", "--raw", "--system", "x"], "--system has no meaning with --raw"),
    "few bits": (["generate", "hi", "--quantize", "nf5"], "none, nf4, int8"),
    "format": (["generate", "hi", "--template", "foo"], "chatml, alpaca"),
    "adapter first": (["generate", "hi", "--model", "nobody/none", "--adapter", "x"], "no adapter"),
    "sampling": (["generate", "hi", "--model", "nobody/none", "--temperature", "-5"], "no sense"),
    "no name": (["generate", "hi", "--adapter", "one="], "names no folder"),
    "full": (["train", "rows.jsonl", "--method", "full", "--quantize", "nf4"], "few bits cannot"),
    "no tokenizer": (["data", "show", "rows.jsonl", "--model", "bare"], "bare has no tokenizer"),
    "newest": (["chat", "--model", "./none"], "there is no model folder ./none"),
    "data": (["data", "check", "empty.jsonl", "--model", "model"], "is empty"),
    "layout": (["data", "show", "odd.jsonl"], "--columns prompt=asks,answer=tells"),
    "empty": (["train", "empty.jsonl", "--model", "model"], "is empty"),
}


NEEDS_THE_BASE = ("context", "target", "device", "no target", "word", "memory")


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that, on Python's path, makes an import of torch end the program."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise SystemExit('torch was loaded')\n")
    return str(folder)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(place: Path, no_torch: str, case: str) -> None:
    (place / "empty.jsonl").touch()
    (place / "odd.jsonl").write_text('{"asks": "q", "tells": "a"}\n')
    arguments, said = BAD[case]
    before = sorted(p for p in place.rglob("*") if "cache" not in p.parts)
    # Most is told in half a second, before torch and transformers are loaded.
    done = run(place, *arguments, path="" if case in NEEDS_THE_BASE else no_torch)
    assert done.returncode != 0
    assert said in done.stderr.replace("\n", " "), done.stderr
    assert sorted(p for p in place.rglob("*") if "cache" not in p.parts) == before


def test_an_unknown_layout_gets_the_users_own_command_whole(place: Path) -> None:
    (place / "odd rows.jsonl").write_text('{"asks": "q", "tells": "a"}\n')
    given = ["train", "odd rows.jsonl", "--model", "model", "--max-steps", "3", "--dry-run"]
    done = run(place, *given)
    assert done.returncode == 1
    _, ready = done.stderr.split("fix:")
    command = shlex.split(ready)
    assert command == ["tsugiki", *given, "--columns", "prompt=asks,answer=tells"]
    done = run(place, *command[1:])
    assert done.returncode == 0, done.stderr
    done = run(place, "data", "check", "rows.jsonl", "--model", "model",
               "--eval-data", "odd rows.jsonl")  # fmt: skip
    assert "fix:     lay these rows out as the training rows are" in done.stderr


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(place: Path) -> None:
    for output in ("model", "rows.jsonl"):
        given = ["train", "rows.jsonl", "--model", "model", "--output", output]
        assert run(place, *given).stdout == ""
        assert run(place, *given, "--dry-run").returncode == 1


def test_no_permission_is_told(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    child = os.fork()
    if child == 0:
        code = 9
        try:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write anywhere
            refuse_used(locked / "run")
        except DiskError as error:
            code = 7 if "no permission to write" in str(error) else 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_names_with_brackets_and_a_terminal_without_arrows(place: Path) -> None:
    folder = place / "odd[/b]"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "r[red].jsonl").write_text((place / "rows.jsonl").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "tsugiki", "data", "show", "odd[/b]/r[red].jsonl",
         "--model", "model", "--count", "1"],
        cwd=place, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "odd[/b]/r[red].jsonl:1" in done.stdout


def test_held_out_rows_of_their_own_are_shown(place: Path) -> None:
    (place / "held.jsonl").write_text(
        '{"prompt": "new", "completion": "one"}\n{"prompt": "broken"}\n'
    )
    done = run(
        place, "data", "check", "rows.jsonl", "--model", "model", "--eval-data", "held.jsonl"
    )
    assert "30 to train, 1 held out" in done.stdout
    assert "held.jsonl:2" in done.stdout
    assert done.stdout.count("--strict stops at the first") == 1, "what to do, once"
    assert done.stdout.rstrip().endswith("data check again")


def test_yaml_keys(place: Path) -> None:
    (place / "run.yaml").write_text("lora:\n  alhpa: 4\ntrian: {}\n")
    done = run(place, "train", "rows.jsonl", "--config", "run.yaml")
    assert done.returncode == 2
    assert "run.yaml:2: unknown setting 'lora.alhpa'; did you mean lora.alpha?" in done.stderr
    assert "run.yaml:3: unknown setting 'trian'; did you mean train?" in done.stderr
    (place / "twice.yaml").write_text("train:\n  epochs: 3\n  epochs: 4\n")
    done = run(place, "train", "rows.jsonl", "--config", "twice.yaml")
    assert done.returncode == 2
    assert "twice.yaml:3: not valid YAML: 'epochs' is given twice" in done.stderr


def test_precedence() -> None:
    from tsugiki.cli import configure

    folder_less = configure({"preset": "chat"}, None)
    assert folder_less.train.epochs == 3
    flags = configure({"preset": "chat", "train": {"epochs": 1.0}}, None)
    assert flags.train.epochs == 1
    assert flags.train.learning_rate == 5e-5


def test_precedence_of_the_file(tmp_path: Path) -> None:
    from tsugiki.cli import configure

    (tmp_path / "c.yaml").write_text("preset: chat\ntrain: {epochs: 2}\nlora: {r: 4}\n")
    config = configure({"lora": {"r": 2}}, tmp_path / "c.yaml")
    assert (config.train.epochs, config.lora.r, config.lora.alpha) == (2, 2, 32)


def test_the_config_reads_back() -> None:
    import yaml

    config = build_config({"lora": {"targets": ["q_proj"]}, "data": {"path": "x.jsonl"}})
    assert build_config(yaml.safe_load(config.to_yaml())) == config


def test_every_flag_of_the_guide_is_there() -> None:
    for flag in [
        "--data",
        "--lora-r",
        "--lora-alpha",
        "--lora-dropout",
        "--epochs",
        "--batch-size",
        "--gradient-accumulation-steps",
        "--learning-rate",
        "--output",
    ]:
        assert flag in flag_fields()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    assert isinstance(build_config(preset(name)), RunConfig)


def test_the_script_guides_presets_take_its_warm_up() -> None:
    for name, (_, settings) in PRESETS.items():
        train = settings["train"]
        assert train.get("warmup_ratio") == (None if name in ("qlora", "textbook") else 0.3), name
        assert "learning_rate" in train, name
    assert preset("light")["train"]["gradient_accumulation_steps"] == 16
    assert (preset("code-long")["train"]["epochs"], preset("chat")["train"]["epochs"]) == (5, 3)
    assert preset("memory-over-16gb")["train"]["batch_size"] == 4


def test_a_presets_misspelling() -> None:
    with pytest.raises(UsageError, match="no preset"):
        preset("gide")
