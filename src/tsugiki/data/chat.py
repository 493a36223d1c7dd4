"""A conversation → the tokens that the model sees, and the labels that are trained.

One object for training, samples, chat and `data show`, so one prompt gives one token list. Each
answer is located by rendering and proven: the prompt's tokens must be a prefix of the tokens up to
the answer's end, and the stop token is always a label. Knows no files and no lengths.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsugiki.data.ending import ASKED, continued, find_call_stop, find_stop, unopened
from tsugiki.data.example import IGNORED, Example, make_example
from tsugiki.data.rendering import CLOCK, Watch, check_template, today, with_date
from tsugiki.data.repairs import ENDED, forms, unended, up_to_each
from tsugiki.data.row import THOUGHTS, Message, Row, RowProblem, first_question
from tsugiki.data.templates import FALLBACKS
from tsugiki.data.written import MARKER, Written
from tsugiki.errors import DataError

DIFFERS = "the template renders the prompt differently once the answer is there"
NO_CALLS = "this chat format writes no tool calls"
MARKED = "text with a start or end token of its own: not given twice"
TEMPLATE_REFUSES = "the chat template refuses it"


class ChatFormat:
    """One template with its tokenizer and stop token.

    Args:
        tokenizer: any transformers tokenizer.
        name: "tokenizer" for its own template, else one of `FALLBACKS`.
        date: what a template prints that prints the day; today when None. `self.date` is None
            where the template prints none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, date: datetime.date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        if name != "tokenizer" and name not in FALLBACKS:
            raise DataError(
                "unknown chat format", got=name, allowed=", ".join(("tokenizer", *FALLBACKS))
            )
        self.template = None if name == "tokenizer" else FALLBACKS[name]
        self.repairs: Counter[str] = Counter()
        self.date: datetime.date | None = None
        self.written = Written(
            lambda turns, answer_next, tools: self.render(
                turns, answer_next=answer_next, tools=tools
            )
        )
        self._watch = Watch()
        if self.template is None:
            own = tokenizer.chat_template
            for source in own.values() if isinstance(own, dict) else [own]:
                check_template(str(source))
                if CLOCK in str(source):
                    self.date = date or today()
        plain = tokenizer("a", add_special_tokens=True)["input_ids"]
        self.bos = tokenizer.bos_token_id
        self.starts_with_bos = self.bos is not None and bool(plain) and plain[0] == self.bos
        self.eos = tokenizer.eos_token_id
        added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        found = find_stop(self._finished, self.encode, added)
        self.appends_stop = found is None
        if found is None:
            if self.eos is None:
                raise DataError(
                    "this tokenizer has neither a chat template with a stop token nor an "
                    "end-of-text token, so an answer could never end",
                    fix="--template chatml with a tokenizer that has an eos_token",
                )
            found = self.eos
        self.stop_id: int = found
        self.call_stop = find_call_stop(self._finished, self.encode, added, found)
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys(i for i in (found, self.eos, self.call_stop) if i is not None)
        )
        names = [str(tokenizer.convert_ids_to_tokens(i)) for i in self.stop_ids]
        self.stops = tuple(name for name in names if set(self.encode(name)) & set(self.stop_ids))

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        fallback: str | None = None,
        date: datetime.date | None = None,
    ) -> ChatFormat:
        """The tokenizer's own template, or a named fallback (plain when none is named)."""
        if fallback is None and tokenizer.chat_template:
            return cls(tokenizer, "tokenizer", date)
        return cls(tokenizer, fallback or "plain")

    def state(self) -> dict[str, Any]:
        """What an adapter folder keeps, so that chat renders what training saw."""
        return {
            "format": self.name,
            "stop_id": self.stop_id,
            "stop_ids": list(self.stop_ids),
            **({} if self.date is None else {"date": self.date.isoformat()}),
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase
    ) -> ChatFormat:
        """The format that an adapter was trained with.

        Raises:
            DataError: a format that is not known, a date that is none, or a tokenizer that ends
                answers otherwise.
        """
        if not state:
            return cls.of(tokenizer)
        try:
            date = None if "date" not in state else datetime.date.fromisoformat(str(state["date"]))
        except ValueError:
            raise DataError("the chat format's date is none", got=state["date"]) from None
        found = cls(tokenizer, str(state.get("format")), date)
        if "stop_id" in state and state["stop_id"] != found.stop_id:
            raise DataError(
                "this tokenizer's chat template ends an answer with another token than in training",
                got=found.stop_id,
                allowed=state["stop_id"],
                fix="use the tokenizer that is saved beside the adapter",
            )
        return found

    def render(
        self, messages: Sequence[Message], *, answer_next: bool, tools: Sequence[Any] | None = None
    ) -> str:
        """The template's text; whatever the template raises becomes a RowProblem.

        Raises:
            RowProblem: the template refuses the conversation.
            DataError: the template does not end, or could not.
        """

        def render() -> object:
            return self.tokenizer.apply_chat_template(
                [m.as_dict() for m in messages],
                tools=list(tools) if tools else None,
                chat_template=self._source(tools),
                tokenize=False,
                add_generation_prompt=answer_next,
                starts_with_bos=self.starts_with_bos,
            )

        try:
            if self.template is not None:  # one of ours ends by itself
                text = render()
            else:
                text = self._watch.bounded(render)
        except DataError:
            raise
        except Exception as error:  # a template may raise anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
            raise RowProblem(f"{TEMPLATE_REFUSES}: {reason}") from None
        if not isinstance(text, str):
            raise RowProblem("the chat template gave no text")
        return text

    def _source(self, tools: Sequence[Any] | None) -> str | None:
        """The template to render with; None: the tokenizer's own as it is."""
        if self.date is None:
            return self.template
        own = self.tokenizer.get_chat_template(None, list(tools) if tools else None)
        return with_date(str(own), self.date)

    def encode(self, text: str) -> list[int]:
        """Rendered text → ids, no special tokens added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        likely: Sequence[str] = (),
    ) -> list[int]:
        """What the model sees before it answers. Used by training, samples, chat and show.

        likely: names of repairs that the whole conversation got.

        Raises:
            RowProblem: the template refuses the conversation, also after repair.
        """
        messages, _ = next(self._repaired(messages, tools, likely))
        return self.encode(self.render(messages, answer_next=True, tools=tools))

    def examples(self, row: Row, train_on: str = "assistant") -> list[Example]:
        """One example for the conversation, or one per answer where the template needs it.

        Raises:
            RowProblem: nothing to train, an answer that cannot be located, a template that
                refuses the row also after repair.
        """
        if row.text is not None:
            return [self._raw(row)]
        first: RowProblem | None = None
        forms = self._repaired(row.messages, row.tools)
        while True:
            try:
                messages, repairs = next(forms)
                found = self._examples(messages, row, train_on, repairs)
            except RowProblem as problem:
                first = first or problem
                continue
            except StopIteration:
                raise first or RowProblem("no turns") from None
            self.repairs.update(repairs)
            return found

    def _examples(
        self, messages: tuple[Message, ...], row: Row, train_on: str, repairs: tuple[str, ...]
    ) -> list[Example]:
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if not answers:
            raise RowProblem("no answer to train on")
        if answers[0] == 0:
            raise RowProblem("the conversation begins with an answer: there is no prompt")
        untrained = [i for i in answers if not messages[i].trained]
        answers = [i for i in answers if messages[i].trained]
        if not answers:
            raise RowProblem("no answer to train on but those of weight 0")
        for i, message in enumerate(messages[: answers[-1] + 1]):
            if message.extra and not self.written.calls(messages[: i + 1], row.tools):
                raise RowProblem(f"turn {i + 1}: {NO_CALLS}")
        every = [i for i, m in enumerate(messages) if m.role == "assistant"]
        messages, ended = unended(messages, every, self.stops)
        if train_on == "last":
            answers = answers[-1:]
        everything = int(self.starts_with_bos) if train_on == "everything" else None
        silent = [] if everything is None else untrained
        asked = up_to_each(row.messages, every, self.stops) if repairs else {}

        def located(i: int) -> tuple[list[int], int]:
            return self._answer(messages, i, row, asked.get(i), repairs)

        spans = [located(i) for i in answers]
        self.repairs.update([ENDED] if ended else [])
        whole = spans[-1][0]
        key = first_question(messages)
        if all(whole[: len(ids)] == ids for ids, _ in spans):
            marks = [(begin, len(ids)) for ids, begin in spans]
            unlearnt = [located(i) for i in silent if i < answers[-1]]
            return [make_example(whole, marks, row, key, everything, unlearnt)]
        return [
            replace(
                make_example(
                    ids, [(begin, len(ids))], row, key, everything,
                    [located(j) for j in silent if j < i],
                ),
                row=replace(row, messages=asked.get(i, messages[: i + 1])),
                single=True,
            )
            for i, (ids, begin) in zip(answers, spans, strict=True)
        ]  # fmt: skip

    def repair(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """The conversation in a form that the template takes, and the names of what was done.

        Raises:
            RowProblem: no repair helps.
        """
        return next(self._repaired(messages, tools))

    def _repaired(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, likely: Sequence[str] = ()
    ) -> Iterator[tuple[tuple[Message, ...], tuple[str, ...]]]:
        """Every form of the conversation that the template takes, the least changed first."""
        original = tuple(messages)
        if not original:
            raise RowProblem("no turns")
        first: RowProblem | None = None
        search = forms(original, likely)
        lost: str | None = None
        while True:
            try:
                candidate, names = search.send(lost)
            except StopIteration:
                break
            lost = None
            try:
                self.render(candidate, answer_next=candidate[-1].role != "assistant", tools=tools)
                lost = self.written.lost(candidate, tools) if self.template is None else None
                if lost is not None:
                    raise RowProblem(lost)
            except RowProblem as problem:
                first = first or problem
                continue
            yield candidate, names
        if first is not None:
            raise first

    def _answer(
        self,
        messages: tuple[Message, ...],
        index: int,
        row: Row,
        asked: tuple[Message, ...] | None,
        repairs: tuple[str, ...],
    ) -> tuple[list[int], int]:
        """Ids up to and with the stop token of the answer at `index`, and where it begins.

        asked: what the row has up to it: its prompt may be taken in another form than the whole.
        """
        before = self.render(messages[:index], answer_next=True, tools=row.tools)
        upto = self.render(messages[: index + 1], answer_next=False, tools=row.tools)
        prompt = self.encode(before)
        ids = self.encode(upto)
        if ids[: len(prompt)] != prompt:
            if not upto.startswith(before):
                upto = before + self._unopened(messages[: index + 1], before, row.tools)
                ids = self.encode(upto)
            if ids[: len(prompt)] != prompt:
                ids = prompt + continued(
                    upto[len(before) :], self.encode, self.tokenizer.unk_token_id
                )
        if self.appends_stop:
            ids = [*ids, self.stop_id]
        tail = ids[len(prompt) :]
        stop = self.call_stop if messages[index].calls else self.stop_id
        if stop not in tail:
            raise RowProblem(f"turn {index + 1}: no stop token after the answer")
        end = len(tail) - tail[::-1].index(stop)
        if end < 2:
            raise RowProblem(f"turn {index + 1}: the answer has no tokens")
        if asked is not None:
            prompt = self.prompt_ids(asked[:-1], row.tools, repairs)
        return prompt + tail[:end], len(prompt)

    def _unopened(
        self, messages: tuple[Message, ...], before: str, tools: Sequence[Any] | None
    ) -> str:
        """The last answer as it follows a prompt that opens what the template then drops.

        Raises:
            RowProblem: the two differ by more than how the prompt ends.
        """
        answer = messages[-1]
        marked = (*messages[:-1], replace(answer, content=MARKER))
        text = self.render(marked, answer_next=False, tools=tools)
        extra = dict(answer.extra)
        thought = next((extra[key] for key in THOUGHTS if key in extra), "")
        found = unopened(before, text, thought, answer.content)
        if found is None:
            raise RowProblem(f"turn {len(messages)}: {DIFFERS}")
        return found

    def _raw(self, row: Row) -> Example:
        assert row.text is not None
        text, end = row.text, self.tokenizer.eos_token
        if end and text.rstrip().endswith(end):
            text = text.rstrip()
        ids = self.encode(text)
        if not ids:
            raise RowProblem("the text has no tokens")
        begun, ended = self.starts_with_bos and ids[0] == self.bos, ids[-1] == self.eos
        self.repairs.update([MARKED] if begun or ended else [])
        if self.starts_with_bos and self.bos is not None and not begun:
            ids = [self.bos, *ids]
        if self.eos is not None and not ended:
            ids = [*ids, self.eos]
        labels = [IGNORED if self.starts_with_bos and i == 0 else x for i, x in enumerate(ids)]
        return Example(tuple(ids), tuple(labels), row.source, row.text, row, raw=True)

    def opens_thoughts(self) -> bool:
        """Whether its prompts open a tag that its finished turns have not, as R1's do."""
        try:
            before = self.render((ASKED,), answer_next=True)
            marked = self._finished((ASKED, Message("assistant", MARKER)))
        except RowProblem:
            return False
        found = None if marked.startswith(before) else unopened(before, marked, MARKER, "a")
        return found is not None and MARKER in found

    def _finished(self, messages: Sequence[Message]) -> str:
        return self.render(messages, answer_next=False)
