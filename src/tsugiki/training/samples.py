"""Answers to fixed prompts while a run goes, so that the change can be read. Greedy.

Knows the engine; the model is left in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tsugiki.adapters.attach import training_mode
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.data.row import Message
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.models.load import Base

MOST_TOKENS = 64
RAW_START = 24  # tokens of a held-out text that serve as its prompt


@dataclass(frozen=True)
class Prompt:
    """What is shown, and what the model sees; raw: it is continued as raw text."""

    shown: str
    ids: tuple[int, ...]
    raw: bool = False


def choose_prompts(given: Sequence[str], prepared: Prepared, chat: ChatFormat) -> list[Prompt]:
    """The prompts given, else two held-out ones, as training and chat render them.

    Where the rows are raw text, a prompt is continued as raw text.
    """
    examples = prepared.held_out or prepared.train
    raw = examples[0].raw
    if given:
        if raw:
            start = [i for i in examples[0].ids[:1] if i == chat.bos]
            return [Prompt(p, (*start, *chat.encode(p)), raw=True) for p in given]
        return [Prompt(p, tuple(chat.prompt_ids([Message("user", p)]))) for p in given]
    chosen: list[Prompt] = []
    for example in examples:
        if len(chosen) == 2:
            break
        if example.raw:
            ids = example.ids[:RAW_START]
            text = str(chat.tokenizer.decode(ids, skip_special_tokens=True))
            chosen.append(Prompt(text, ids, raw=True))
        elif example.row is not None:
            last = max(i for i, m in enumerate(example.row.messages) if m.role == "assistant")
            turns = example.row.messages[:last]
            if turns and turns[-1].content not in [prompt.shown for prompt in chosen]:
                ids = tuple(chat.prompt_ids(turns, example.row.tools))
                chosen.append(Prompt(turns[-1].content, ids))
    return chosen


def answer_all(
    base: Base,
    chat: ChatFormat,
    prompts: list[Prompt],
) -> list[tuple[str, str]]:
    """(prompt, answer) of each prompt, greedy, at most 64 tokens."""
    training_mode(base.model, False)
    requests = []
    context = base.spec.context
    for prompt in prompts:
        ids = prompt.ids if len(prompt.ids) < context else prompt.ids[-(context // 2) :]
        requests.append(
            Request(
                ids,
                sampling=Sampling(max_tokens=MOST_TOKENS),
                stop_ids=(*chat.stop_ids, *base.stop_ids),
                raw=prompt.raw,
            )
        )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        done = Engine(base).complete(requests)
    return [(prompt.shown, c.text) for prompt, c in zip(prompts, done, strict=True)]
