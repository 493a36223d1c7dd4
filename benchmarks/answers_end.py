"""`python -m benchmarks.answers_end [--run RUN]`: exported models end their answers as ours do.

An adapter trained as `tsugiki demo` does, exported, answers the demo's held-out rows in llama.cpp:
the file's own idea of an end must end them. Beside it our engine on the adapter itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import record
from tsugiki.demo.show import MAX_ANSWER, demo_config, held_out
from tsugiki.evaluation.tasks import question_and_answer, score_answers
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.pipelines import run_training
from tsugiki.shipping import export_gguf
from tsugiki.talk.naming import Who, find_named
from tsugiki.talk.opening import open_voices
from tsugiki.terminal import Terminal

TYPES = ("f16", "q8_0", "q4_k_m")


def main(run: Path | None) -> bool:
    """Train (or take a run), export, ask both, record."""
    rows, terminal = held_out(), Terminal()
    with tempfile.TemporaryDirectory() as temporary:
        if run is None:
            run = Path(temporary) / "run"
            run_training(demo_config(run, 0), terminal)
        adapter = run / "adapter"
        opened = open_voices(find_named(Who(adapters=(f"tuned={adapter}",)), terminal), terminal)
        voice = opened.voices["tuned"]
        ours = score_answers(
            opened.engine, voice.chat, rows, adapter=voice.adapter, max_tokens=MAX_ANSWER
        )
        figures = {"rows": float(len(rows)), "ended in our engine": ours.stopped,
                   "exact in our engine": ours.exact}  # fmt: skip
        prompts = [voice.chat.prompt_ids(question_and_answer(row)[0]) for row in rows]
        with LlamaCpp(torch.get_num_threads()) as llama:
            for file in export_gguf(str(adapter), TYPES, Path(temporary) / "gguf", terminal):
                done = llama.generate(file.path, prompts, most=MAX_ANSWER)
                ended = sum(answer.stop in voice.chat.stop_ids for answer in done)
                texts = [voice.chat.tokenizer.decode(answer.ids).strip() for answer in done]
                same = sum(
                    text == other.text.strip()
                    for text, other in zip(texts, ours.answers, strict=True)
                )
                figures[f"ended in llama.cpp, {file.dtype}"] = ended / len(rows)
                figures[f"the same answer as ours, {file.dtype}"] = same / len(rows)
    bounds = {name: ">= 0.98" for name in figures if name.startswith("ended")}
    bounds["the same answer as ours, f16"] = ">= 0.98"
    return record.write("answers_end", "python -m benchmarks.answers_end", figures, bounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="of tsugiki demo; trained here when left out")
    sys.exit(0 if main(parser.parse_args().run) else 1)
