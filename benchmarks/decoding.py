"""`python -m benchmarks.decoding`: a merged model decodes as fast as its base.

The same prompts, greedy, the same number of tokens, base and merged in turn; in our engine and, as
GGUF in F16, in llama.cpp. The fastest of each, since anything else on the machine only slows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import record
from tsugiki.adapters.attach import attach, lora_modules
from tsugiki.adapters.joined import join
from tsugiki.adapters.storage import save_adapter
from tsugiki.config import LoraConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.demo.show import held_out
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.evaluation.tasks import question_and_answer
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.merging import plan_merge, write_merged
from tsugiki.models.load import load_base, resolve_model

TOKENS, ROWS, ROUNDS = 48, 16, 15


def fastest(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, the least of `ROUNDS`, in turn."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def make_merged(folder: Path) -> Path:
    """sprout with a random adapter on every projection, merged."""
    base = load_base(resolve_model(None))
    attach(base.model, LoraConfig(r=16, alpha=32))
    for _, module in lora_modules(base.model):
        nn.init.normal_(module.lora_B, 0, 0.01)
    save_adapter(base.model, folder / "adapter")
    return write_merged(plan_merge(folder / "adapter", base.folder), folder / "merged").folder


def main() -> bool:
    """Measure, record."""
    with tempfile.TemporaryDirectory() as temporary, LlamaCpp(torch.get_num_threads()) as llama:
        folders = {"base": resolve_model(None).folder, "merged": make_merged(Path(temporary))}
        chat = ChatFormat.of(load_base(resolve_model(None)).tokenizer)
        prompts = [chat.prompt_ids(question_and_answer(r)[0]) for r in held_out()[:ROWS]]
        never = (-1,)  # no token ends an answer: both sides decode the same number
        requests = [
            Request(tuple(p), sampling=Sampling(max_tokens=TOKENS), stop_ids=()) for p in prompts
        ]
        ours: dict[str, Callable[[], object]] = {}
        theirs: dict[str, Callable[[], object]] = {}
        for name, folder in folders.items():
            engine = Engine(load_base(resolve_model(str(folder))), slots=ROWS)
            file = Path(temporary) / f"{name}.gguf"
            write_gguf(plan_export(join(folder, None), name), "f16", file)
            ours[name] = lambda engine=engine: engine.complete(requests)
            theirs[name] = lambda file=file: llama.generate(file, prompts, most=TOKENS, stop=never)
        engine_times, llama_times = fastest(ours), fastest(theirs)
    count = TOKENS * ROWS
    figures = {
        "merged / base, our engine": engine_times["merged"] / engine_times["base"],
        "merged / base, llama.cpp": llama_times["merged"] / llama_times["base"],
        "tokens a second, our engine": count / engine_times["merged"],
        "tokens a second, llama.cpp": count / llama_times["merged"],
    }
    bounds = {name: "<= 1.02" for name in figures if name.startswith("merged")}
    return record.write("decoding", "python -m benchmarks.decoding", figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
