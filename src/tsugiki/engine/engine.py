"""Tokens in, tokens out: many requests, each with its own adapter and sampling, in one forward.

Chat, samples, evaluation and (later) serving stand on `submit`, `step` and `cancel`. A step either
happens or leaves everything as it was, so it may be interrupted. Knows no chat format and no files.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from tsugiki.adapters.pool import AdapterPool
from tsugiki.engine import scheduler
from tsugiki.engine.runners import make_runner
from tsugiki.engine.sampling import Sampling, choose
from tsugiki.engine.scheduler import Scheduler
from tsugiki.engine.text import StopStrings, TextStream
from tsugiki.errors import NonFiniteError, UsageError
from tsugiki.models.load import Base, refuse_unknown

Finish = Literal["stop", "length", "cancelled"]
GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    ids: prompt tokens, special tokens included.
    adapter: index in the pool; -1 is the base. Without a pool, the model as it is.
    stop_ids: tokens that end the answer and are not part of it.
    stop: strings that end the answer and are not part of it, also across tokens.
    raw: the text goes on from the prompt's (keeps a leading space that a decoder would drop).
    """

    ids: tuple[int, ...]
    adapter: int = -1
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    raw: bool = False


@dataclass(frozen=True)
class Event:
    """One token of one request; the last one says why it ended.

    request: its number from `submit`, or its place in what `generate` was given.
    token: the id, None when it is a stop token or when there is none (cancelled).
    text: what became certain; pieces joined are the answer's text.
    reused: prompt tokens that were still in a slot; on the last event.
    """

    request: int
    token: int | None
    text: str
    finish: Finish | None = None
    reused: int = 0


@dataclass(frozen=True)
class Completion:
    """A whole answer. reused: prompt tokens that were still in a slot."""

    ids: tuple[int, ...]
    text: str
    finish: Finish
    reused: int


@dataclass
class _Active:
    request: Request
    sequence: scheduler.Sequence
    generator: torch.Generator
    stream: TextStream
    stops: StopStrings
    ids: list[int] = field(default_factory=list)


class Engine:
    """Generates for many requests at once on one base.

    Args:
        base: the model and its tokenizer.
        pool: adapters loaded beside it.
        slots: most requests that run at once.
        token_budget: most tokens in one forward.
    """

    def __init__(
        self,
        base: Base,
        pool: AdapterPool | None = None,
        *,
        slots: int = 16,
        token_budget: int = 512,
    ) -> None:
        self.base = base
        self.pool = pool
        self.context = base.spec.context
        table: Any = base.model.get_input_embeddings()  # type: ignore[operator]
        self._rows = int(table.weight.shape[0])
        with _Evaluating(base):
            self._runner = make_runner(base, pool)
        if self._runner.limits is not None:
            slots, token_budget = self._runner.limits
        self._scheduler = Scheduler(slots, token_budget, self._runner.can_cut)
        self._active: dict[int, _Active] = {}
        self._next = 0

    @property
    def idle(self) -> bool:
        """No request runs or waits."""
        return self._scheduler.idle

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number.

        Raises:
            UsageError: an empty prompt, or one that leaves no room for a token.
            ModelError: a token that the base has no numbers for.
        """
        if not request.ids:
            raise UsageError("an empty prompt", fix="give at least one token")
        refuse_unknown(request.ids, self._rows, self.base.tokenizer, "the prompt")
        if len(request.ids) >= self.context:
            raise UsageError(
                f"a prompt of {len(request.ids):,} tokens leaves no room for an answer",
                allowed=f"at most {self.context - 1:,} tokens: the context is {self.context:,}",
                fix="shorten the prompt",
            )
        number, self._next = self._next, self._next + 1
        sequence = scheduler.Sequence(number, list(request.ids), request.adapter, len(request.ids))
        context = request.ids if request.raw else ()
        self._active[number] = _Active(
            request,
            sequence,
            request.sampling.generator(),
            TextStream(self.base.tokenizer, context),
            StopStrings(request.stop),
        )
        self._scheduler.add(sequence)
        return number

    def cancel(self, number: int) -> Event | None:
        """End a request early; None when it has ended already."""
        active = self._active.get(number)
        return None if active is None else self._end(active, None, "", "cancelled")

    def step(self) -> list[Event]:
        """One forward: a token for every request whose prompt is computed.

        Raises:
            NonFiniteError: the model gave NaN; every request is cancelled.
        """
        work = self._scheduler.plan()
        if not work:
            return []
        with torch.inference_mode(), _Evaluating(self.base):
            logits = self._runner.run(work)
        self._scheduler.commit(work)
        ready = [self._active[item.sequence.number] for item in work if item.completes]
        if not ready:
            return []
        if bool(logits.isnan().any()):
            self._give_up()
            raise NonFiniteError(
                "the model gave NaN; no token can be chosen",
                fix="--dtype float32; if it stays, the weights or an adapter are broken",
            )
        best = logits.argmax(dim=-1).tolist()
        events = []
        for row, active in enumerate(ready):
            sampling = active.request.sampling
            token = (
                best[row]
                if sampling.plain
                else choose(logits[row], active.sequence.ids, sampling, active.generator)
            )
            events.append(self._take(active, token))
        return events

    def generate(self, requests: Sequence[Request]) -> Generator[Event, None, None]:
        """Events of all requests as they come; `Event.request` is the place in `requests`.

        What is unfinished when the iterator is closed is cancelled.
        """
        assert not self._active, "generate and stream need the engine for themselves"
        numbers: list[int] = []
        try:
            numbers.extend(self.submit(request) for request in requests)
            while not self.idle:
                for event in self.step():
                    yield replace(event, request=event.request - numbers[0])
        finally:
            for number in numbers:
                self.cancel(number)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Whole answers, in the order of the requests."""
        ids: list[list[int]] = [[] for _ in requests]
        texts: list[list[str]] = [[] for _ in requests]
        finishes: dict[int, Finish] = {}
        reused: dict[int, int] = {}
        for event in self.generate(requests):
            index = event.request
            if event.token is not None:
                ids[index].append(event.token)
            texts[index].append(event.text)
            if event.finish is not None:
                finishes[index] = event.finish
                reused[index] = event.reused
        return [
            Completion(tuple(ids[i]), "".join(texts[i]), finishes[i], reused[i])
            for i in range(len(requests))
        ]

    def forget(self) -> None:
        """Drop all kept prefixes; needed after the weights or an attached adapter changed.

        Frees the keys and values too when nothing runs.
        """
        self._scheduler.forget()
        if self.idle:
            self._runner.clear()

    def _give_up(self) -> None:
        """Nothing of a step that went wrong may be read again: NaN · 0 is NaN."""
        for number in list(self._active):
            self.cancel(number)
        self.forget()

    def _take(self, active: _Active, token: int) -> Event:
        if token in active.request.stop_ids:
            return self._end(active, None, "", "stop")
        active.sequence.ids.append(token)
        active.ids.append(token)
        text = active.stops.push(active.stream.push(token))
        if active.stops.found:
            return self._end(active, token, text, "stop")
        full = len(active.sequence.ids) >= self.context
        if full or len(active.ids) >= active.request.sampling.max_tokens:
            return self._end(active, token, text, "length")
        return Event(active.sequence.number, token, text)

    def _end(self, active: _Active, token: int | None, text: str, finish: Finish) -> Event:
        del self._active[active.sequence.number]
        self._scheduler.remove(active.sequence)
        rest = active.stops.push(active.stream.finish())
        if active.stops.found:
            finish = "stop"
        text += rest + active.stops.finish()
        return Event(active.sequence.number, token, text, finish, active.sequence.reused)


class _Evaluating:
    """Dropout off for a while; the mode it was in comes back."""

    def __init__(self, base: Base) -> None:
        self._model = base.model
        self._was = base.model.training

    def __enter__(self) -> None:
        if self._was:
            self._model.eval()

    def __exit__(self, *_: object) -> None:
        if self._was:
            self._model.train()
