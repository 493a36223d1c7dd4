"""Answers to fixed prompts while a run goes, so that the change can be read. Greedy.

Knows the engine; the model is left in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tsugiki.adapters.attach import training_mode
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.data.formats import Message
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.models.load import Base

MOST_TOKENS = 64
RAW_START = 24  # tokens of a held-out text that serve as its prompt

# What is shown; its turns; or its ids where it is raw text.
Prompt = tuple[str, tuple[Message, ...] | None, tuple[int, ...] | None]


def choose_prompts(
    given: Sequence[str], prepared: Prepared, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """The prompts given, else two held-out ones.

    Where the rows are raw text, a prompt is continued as raw text.
    """
    examples = prepared.held_out or prepared.train
    raw = examples[0].raw
    if given:
        if raw:
            start = [i for i in examples[0].ids[:1] if i == tokenizer.bos_token_id]
            return [
                (p, None, (*start, *tokenizer(p, add_special_tokens=False)["input_ids"]))
                for p in given
            ]
        return [(p, (Message("user", p),), None) for p in given]
    chosen: list[Prompt] = []
    for example in examples:
        if len(chosen) == 2:
            break
        if example.raw:
            ids = example.ids[:RAW_START]
            chosen.append((str(tokenizer.decode(ids, skip_special_tokens=True)), None, ids))
        elif example.row is not None:
            last = max(i for i, m in enumerate(example.row.messages) if m.role == "assistant")
            turns = example.row.messages[:last]
            if turns and turns[-1].content not in [shown for shown, _, _ in chosen]:
                chosen.append((turns[-1].content, turns, None))
    return chosen


def answer_all(
    base: Base,
    chat: ChatFormat,
    prompts: list[Prompt],
) -> list[tuple[str, str]]:
    """(prompt, answer) of each prompt, greedy, at most 64 tokens."""
    training_mode(base.model, False)
    requests = []
    for _, turns, ids in prompts:
        tokens = list(ids) if ids is not None else chat.prompt_ids(turns or ())
        tokens = tokens[-(base.spec.context - MOST_TOKENS) :]
        requests.append(
            Request(
                tuple(tokens),
                sampling=Sampling(max_tokens=MOST_TOKENS),
                stop_ids=chat.stop_ids,
                raw=ids is not None,
            )
        )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        done = Engine(base).complete(requests)
    return [(shown, c.text) for (shown, _, _), c in zip(prompts, done, strict=True)]
