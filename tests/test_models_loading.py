"""What a model folder or the Hub may do wrong: one clear message each, and nothing run."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from connections import recorded
from families import save_tiny
from hub_server import COMMIT
from runs import own_cache
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.config import read_yaml
from tsugiki.errors import ModelError
from tsugiki.models.load import load_base, resolve_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", tiny_tokenizer(CHATML))


def load(folder: Path) -> None:
    load_base(resolve_model(str(folder)))


def test_a_good_folder_loads_frozen(folder: Path) -> None:
    base = load_base(resolve_model(str(folder)))
    assert base.flat
    assert not any(p.requires_grad for p in base.model.parameters())


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('FIRED', 'w')")


def own_tokenizer_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('FIRED', 'w')")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lying_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def missing_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def wrong_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"] = "text"
    (folder / "config.json").write_text(json.dumps(config))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llamma"}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop_tokenizer, "has no tokenizer"),
        (pickle_only, "only pickled weights"),
        (own_code, "its own Python code"),
        (own_tokenizer_code, "the tokenizer in .* its own Python code"),
        (truncate, "not a whole safetensors file"),
        (lying_header, "header claims"),
        (missing_tensor, "layers.1.mlp.up_proj"),
        (other_shape, r"other shape: .*layers\.0\.mlp\.down_proj"),
        (wrong_type, "hidden_size.*text"),
        (broken_config, "cannot be read"),
        (unknown_architecture, "llamma"),
    ],
)
def test_bad_folders(folder: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    damage(folder)
    with pytest.raises(ModelError, match=said):
        load(folder)
    assert not Path("FIRED").exists()


def test_names_that_are_nothing(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean .*model"):
        resolve_model(str(folder.parent / "modle"))
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(folder / "config.json"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    for user in ("good", "gated", "private", "cut", "huge", "other"):
        save_tiny("llama", tmp_path / "hub" / user / "tiny", tiny_tokenizer(CHATML))
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "hub_server.py"), str(tmp_path / "hub")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    yield int(server.stdout.readline()), tmp_path
    server.kill()
    server.communicate()


CODE = """
import sys
from tsugiki.errors import TsugikiError
from tsugiki.models.hub import resolve_model
try:
    found = resolve_model(*sys.argv[1:])
    print("FOUND", found.commit, sorted(p.name for p in found.folder.iterdir()))
except TsugikiError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def settings(hub: tuple[int, Path]) -> dict[str, str]:
    port, folder = hub
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(folder / "home"),
        "TSUGIKI_CACHE": own_cache(folder / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_HUB_ETAG_TIMEOUT": "5",
    }


def ask(hub: tuple[int, Path], *model: str, **more: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *model],
        env=os.environ | settings(hub) | more,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_the_hub(hub: tuple[int, Path]) -> None:
    code, said = ask(hub, "good/tiny")
    assert code == 0, said
    assert COMMIT in said
    assert "model.safetensors" in said

    code, said = ask(hub, "good/tinny")
    assert code != 0
    assert "no model good/tinny" in said
    assert "good/tiny" in said, "near names"

    for name in ("gated/tiny", "private/tiny"):
        code, said = ask(hub, name)
        assert code != 0
        assert "hf auth login" in said
        assert f"https://huggingface.co/{name}" in said
        assert "then run the same command" in said

    code, said = ask(hub, "huge/tiny")
    assert code != 0
    assert "too little disk space" in said

    code, said = ask((1, hub[1]), "good/other")
    assert code != 0
    assert "Hub" in said


def sent(hub: tuple[int, Path], user: str) -> list[tuple[int, int]]:
    """(where it began, bytes) of every piece of weights that the Hub sent."""
    lines = (hub[1] / "hub.log").read_text().splitlines()
    return [(begin, size) for who, begin, size in map(json.loads, lines) if who == user]


def test_a_cut_download_goes_on_in_the_next_run(hub: tuple[int, Path]) -> None:
    weights = hub[1] / "hub" / "cut" / "tiny" / "model.safetensors"
    size = 24 << 20  # the client writes ten megabytes at a time
    weights.write_bytes(os.urandom(size))
    code, said = ask(hub, "cut/tiny")
    assert code != 0
    assert "run the same command again later: what has arrived is kept" in said
    assert sent(hub, "cut") == [(0, size // 2)]
    code, said = ask(hub, "cut/tiny")
    assert code == 0, said
    assert sent(hub, "cut")[1:] == [(10 << 20, size - (10 << 20))], "not from the start"
    (arrived,) = (hub[1] / "home").rglob("snapshots/*/model.safetensors")
    assert arrived.read_bytes() == weights.read_bytes()
    assert not list((hub[1] / "home").rglob("*.part"))


def test_a_part_that_is_not_the_hubs_is_fetched_anew(hub: tuple[int, Path]) -> None:
    content = (hub[1] / "hub" / "other" / "tiny" / "model.safetensors").read_bytes()
    blobs = hub[1] / "home" / "hub" / "models--other--tiny" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(content).hexdigest()}.part"
    part.write_bytes(b"x" * 1000)
    code, said = ask(hub, "other/tiny")
    assert code != 0
    assert "is not what the Hub says it is" in said
    code, said = ask(hub, "other/tiny")
    assert code == 0, said
    assert sent(hub, "other") == [(1000, len(content) - 1000), (0, len(content))]


def test_what_came_whole_needs_no_network(hub: tuple[int, Path]) -> None:
    alone = (1, hub[1])
    code, first = ask(hub, "good/tiny")
    assert code == 0, first
    assert ask(alone, "good/tiny", COMMIT) == (0, first)
    assert ask(alone, "good/tiny", HF_HUB_OFFLINE="1") == (0, first)
    code, said = ask(alone, "good/tiny")
    assert code != 0
    assert "HF_HUB_OFFLINE=1 takes what was downloaded last" in said
    code, said = ask(alone, "good/tiny", COMMIT, TSUGIKI_CACHE=str(hub[1] / "other"))
    assert code != 0, "whether all of it is there is not on record"
    next((hub[1] / "home").rglob("snapshots/*/tokenizer.json")).resolve().unlink()
    code, said = ask(alone, "good/tiny", COMMIT)
    assert code != 0, "one of its files was deleted"


def test_a_revision_chooses_no_place_to_write(hub: tuple[int, Path]) -> None:
    """A server that answers for any revision is no reason to write beside the cache."""
    ask(hub, "good/tiny", "../../../../escaped")
    assert not list(hub[1].parent.rglob("escaped"))


def test_the_commit_of_a_hub_base_is_recorded(hub: tuple[int, Path], tmp_path: Path) -> None:
    """And nothing but the Hub is contacted, by the parent or the child that trains."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    there = f"127.0.0.1:{hub[0]}"
    done, tried, processes = recorded(
        ["-m", "tsugiki", "train", "rows.jsonl", "--model", "good/tiny", "--max-steps", "1",
         "--output", "run", "--dtype", "float32"],
        tmp_path, there, **settings(hub),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert tried == {there}
    assert processes >= 2
    base = json.loads((tmp_path / "run" / "adapter" / "tsugiki.json").read_text())["base"]
    assert (base["name"], base["commit"]) == ("good/tiny", COMMIT)
    kept = read_yaml(tmp_path / "run" / "config.yaml")["model"]
    assert (kept["name"], kept["revision"]) == ("good/tiny", COMMIT), (
        "a resume takes that very base"
    )
