"""`python -m benchmarks.merge_memory`: memory and time of merging a large random model.

A bf16 Llama of the asked size in 1 GB shards, an adapter of rank 16 on every projection, and the
merge in a process of its own whose anonymous memory is watched. The same bytes are copied (read,
write, fsync) for comparison, both with the base in the page cache as far as it fits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import record

HIDDEN, INNER, VOCABULARY, RANK = 2048, 5632, 32000, 16
MERGE = """
import json, sys, time
from pathlib import Path
from tsugiki.merging import plan_merge, write_merged
began = time.monotonic()
plan = plan_merge(Path(sys.argv[1]), Path(sys.argv[2]))
known = time.monotonic()
write_merged(plan, Path(sys.argv[3]))
print(json.dumps({"fingerprint": known - began, "merge": time.monotonic() - known,
                  "transformers": "transformers" in sys.modules}))
"""


def make_model(
    folder: Path, gigabytes: float, shard_bytes: int, vocabulary: int = VOCABULARY
) -> int:
    """Write a random Llama; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    square, wide = (HIDDEN, HIDDEN), (INNER, HIDDEN)
    layer = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj"), square),
        **dict.fromkeys(("self_attn.v_proj", "self_attn.o_proj"), square),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), wide),
        "mlp.down_proj": (INNER, HIDDEN)[::-1],
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    per_layer = sum(2 * torch.Size(shape).numel() for shape in layer.values())
    ends = 2 * 2 * vocabulary * HIDDEN
    layers = max(1, round((gigabytes * 1e9 - ends) / per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        count = 2 * torch.Size(shape).numel()
        if size + count > shard_bytes and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += count
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: _noise(shape) for name, shape in group.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _noise(shape: tuple[int, ...]) -> torch.Tensor:
    """Random numbers, repeated after the first million: what they are changes no time."""
    count = torch.Size(shape).numel()
    some = torch.randn(min(count, 1 << 20)).bfloat16()
    return some.repeat(-(-count // len(some)))[:count].reshape(shape).clone()


def make_adapter(base: Path, folder: Path) -> None:
    """A random PEFT adapter on every projection of the layers."""
    folder.mkdir(parents=True)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tensors = {}
    for name in index["weight_map"]:
        kind = name.split(".")[-2]
        if kind in kinds:
            ins = INNER if kind == "down_proj" else HIDDEN
            outs = INNER if kind in ("gate_proj", "up_proj") else HIDDEN
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, ins) * 0.02
            tensors[f"{path}.lora_B.weight"] = torch.randn(outs, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32,
        "target_modules": list(kinds), "base_model_name_or_path": str(base), "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_watched(adapter: Path, base: Path, output: Path) -> dict[str, Any]:
    """Merge in a child; seconds, and the most anonymous memory it had at once, in bytes."""
    command = [sys.executable, "-c", MERGE, str(adapter), str(base), str(output)]
    return watched(command, output.parent)


def watched(command: list[str], place: Path) -> dict[str, Any]:
    """What a child prints as JSON, and the most anonymous memory it had at once, in bytes."""
    environment = {**os.environ, "TSUGIKI_CACHE": str(place / "cache")}
    most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            found = [x for x in status.read_text().splitlines() if x.startswith("RssAnon")]
            most = max([most, *(int(line.split()[1]) << 10 for line in found)])
            time.sleep(0.003)
        assert child.stdout is not None
        answer = child.stdout.read()
    if child.returncode != 0:
        raise RuntimeError(f"it ended with {child.returncode}")
    return {**json.loads(answer), "anonymous": most}


def copy_seconds(base: Path, output: Path) -> float:
    """The same files read, written and fsynced."""
    began = time.monotonic()
    output.mkdir()
    for file in sorted(base.iterdir()):
        with open(file, "rb") as source, open(output / file.name, "wb") as target:
            while chunk := source.read(8 << 20):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    return time.monotonic() - began


def main() -> bool:
    """Make, merge, copy; write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, default=None, help="a place with 3 × the size free")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        place = Path(temporary)
        total = make_model(place / "base", arguments.gigabytes, 1_000_000_000)
        make_adapter(place / "base", place / "adapter")
        seconds, first = [], 0.0
        for _ in range(2):
            copied = copy_seconds(place / "base", place / "copy")
            shutil.rmtree(place / "copy")
            merged = merge_watched(place / "adapter", place / "base", place / "merged")
            shutil.rmtree(place / "merged")
            first = first or merged["fingerprint"]
            seconds.append((merged["merge"], copied, merged["anonymous"]))
    largest = 4 * VOCABULARY * HIDDEN
    merge, copied, _ = min(seconds, key=lambda s: s[0] / s[1])
    anonymous = max(s[2] for s in seconds)
    figures = {
        "model GB": total / 1e9,
        "anonymous MB": anonymous / 1e6,
        "anonymous / bound": anonymous / (3 * largest + 300e6),
        "merge s": merge,
        "copy s": copied,
        "merge / copy": merge / copied,
        "first fingerprint s": first,
        "imports transformers": float(merged["transformers"]),
    }
    bounds = {"anonymous / bound": "<= 1", "merge / copy": "<= 1.5", "imports transformers": "== 0"}
    command = f"python -m benchmarks.merge_memory --gigabytes {arguments.gigabytes:g}"
    return record.write("merge_memory", command, figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
