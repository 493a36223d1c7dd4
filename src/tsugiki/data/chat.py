"""A conversation → the tokens that the model sees, and the labels that are trained.

One object for training, samples, chat and `data show`, so one prompt gives one token list. Each
answer is located by rendering and proven: the prompt's tokens must be a prefix of the tokens up to
the answer's end, and the stop token is always a label. Knows no files and no lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsugiki.data.rendering import Watch, check_template
from tsugiki.data.row import Message, Row, RowProblem
from tsugiki.data.templates import FALLBACKS
from tsugiki.errors import DataError

IGNORED = -100
MARKER = "zxqj"
NO_CALLS = "this chat format writes no tool calls"
TEMPLATE_REFUSES = "the chat template refuses it"
FOLDED = "system turn put into the first user turn"
JOINED = "turns of one role joined"
UNASKED = "opening answer that nothing asked for left out"


@dataclass(frozen=True)
class Example:
    """What the model sees: ids, and labels of the same length (-100 = not trained).

    key: rows with one key stay on one side of a split. row: what it was made of, for windowing.
    raw: plain text, which may be split. single: one answer of several, `row` ends with it.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    source: str
    key: str = ""
    row: Row | None = None
    raw: bool = False
    single: bool = False

    @property
    def labelled(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)


class ChatFormat:
    """One template with its tokenizer and stop token.

    Args:
        tokenizer: any transformers tokenizer.
        name: "tokenizer" for its own template, else one of `FALLBACKS`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        if name != "tokenizer" and name not in FALLBACKS:
            raise DataError(
                "unknown chat format", got=name, allowed=", ".join(("tokenizer", *FALLBACKS))
            )
        self.template = None if name == "tokenizer" else FALLBACKS[name]
        self.repairs: Counter[str] = Counter()
        self._watch = Watch()
        if self.template is None:
            own = tokenizer.chat_template
            for source in own.values() if isinstance(own, dict) else [own]:
                check_template(str(source))
        plain = tokenizer("a", add_special_tokens=True)["input_ids"]
        self.bos = tokenizer.bos_token_id
        self.starts_with_bos = self.bos is not None and bool(plain) and plain[0] == self.bos
        self.eos = tokenizer.eos_token_id
        found = self._find_stop()
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
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys(i for i in (found, self.eos) if i is not None)
        )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, fallback: str | None = None) -> ChatFormat:
        """The tokenizer's own template, or a named fallback (plain when none is named)."""
        if fallback is None and tokenizer.chat_template:
            return cls(tokenizer, "tokenizer")
        return cls(tokenizer, fallback or "plain")

    def state(self) -> dict[str, Any]:
        """What an adapter folder keeps, so that chat renders what training saw."""
        return {"format": self.name, "stop_id": self.stop_id, "stop_ids": list(self.stop_ids)}

    @classmethod
    def from_state(
        cls, state: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase
    ) -> ChatFormat:
        """The format that an adapter was trained with.

        Raises:
            DataError: a format that is not known, or a tokenizer that ends answers otherwise.
        """
        if not state:
            return cls.of(tokenizer)
        found = cls(tokenizer, str(state.get("format")))
        if "stop_id" in state and state["stop_id"] != found.stop_id:
            raise DataError(
                "this tokenizer's chat template ends an answer with another token than in training",
                got=found.stop_id,
                allowed=state["stop_id"],
                fix="use the tokenizer that is saved beside the adapter",
            )
        return found

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer_next: bool,
        tools: Sequence[Any] | None = None,
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
                chat_template=self.template,
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

    def encode(self, text: str) -> list[int]:
        """Rendered text → ids, no special tokens added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """What the model sees before it answers. Used by training, samples, chat and show.

        Raises:
            RowProblem: the template refuses the conversation, also after repair.
        """
        messages, _ = self.repair(messages, tools)
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
        for messages, repairs in self._repaired(row.messages, row.tools):
            try:
                found = self._examples(messages, row, train_on)
            except RowProblem as problem:
                first = first or problem
                continue
            self.repairs.update(repairs)
            return found
        raise first or RowProblem("no turns")

    def _examples(self, messages: tuple[Message, ...], row: Row, train_on: str) -> list[Example]:
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        if not answers:
            raise RowProblem("no answer to train on")
        if answers[0] == 0:
            raise RowProblem("the conversation begins with an answer: there is no prompt")
        untrained = [i for i in answers if not messages[i].trained]
        answers = [i for i in answers if messages[i].trained]
        if not answers:
            raise RowProblem("no answer to train on but those of weight 0")
        if train_on == "last":
            answers = answers[-1:]
        silent = untrained if train_on == "everything" else []
        spans = [self._answer(messages, i, row) for i in answers]
        whole = spans[-1][0]
        key = _key(messages)
        if all(whole[: len(ids)] == ids for ids, _ in spans):
            marks = [(begin, len(ids)) for ids, begin in spans]
            unlearnt = [self._answer(messages, i, row) for i in silent if i < answers[-1]]
            return [self._example(whole, marks, row, key, train_on, unlearnt)]
        return [
            replace(
                self._example(
                    ids,
                    [(begin, len(ids))],
                    row,
                    key,
                    train_on,
                    [self._answer(messages, j, row) for j in silent if j < i],
                ),
                row=replace(row, messages=messages[: i + 1]),
                single=True,
            )
            for i, (ids, begin) in zip(answers, spans, strict=True)
        ]

    def repair(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """The conversation in a form that the template takes, and the names of what was done.

        Raises:
            RowProblem: no repair helps.
        """
        return next(self._repaired(messages, tools))

    def _repaired(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> Iterator[tuple[tuple[Message, ...], tuple[str, ...]]]:
        """Every form of the conversation that the template takes, the least changed first."""
        original = tuple(messages)
        if not original:
            raise RowProblem("no turns")
        asked = _asked(original)
        began = () if asked == original else (UNASKED,)
        folded = _fold_system(asked)
        first: RowProblem | None = None
        tried: list[tuple[Message, ...]] = []
        for candidate, names in (
            (asked, began),
            (folded, (*began, FOLDED)),
            (_join_turns(asked), (*began, JOINED)),
            (_join_turns(folded), (*began, FOLDED, JOINED)),
        ):
            if candidate in tried or not candidate:
                continue
            tried.append(candidate)
            try:
                self.render(candidate, answer_next=candidate[-1].role != "assistant", tools=tools)
            except RowProblem as problem:
                first = first or problem
                continue
            yield candidate, names
        if first is not None:
            raise first

    def _answer(self, messages: tuple[Message, ...], index: int, row: Row) -> tuple[list[int], int]:
        """Ids up to and with the stop token of the answer at `index`, and where it begins."""
        before = self.render(messages[:index], answer_next=True, tools=row.tools)
        upto = self.render(messages[: index + 1], answer_next=False, tools=row.tools)
        prompt = self.encode(before)
        ids = self.encode(upto)
        if ids[: len(prompt)] != prompt:
            if not upto.startswith(before):
                raise RowProblem(
                    f"turn {index + 1}: the template renders the prompt differently once "
                    "the answer is there"
                )
            ids = prompt + self.encode(upto[len(before) :])
        if self.appends_stop:
            ids = [*ids, self.stop_id]
        tail = ids[len(prompt) :]
        if self.stop_id not in tail:
            raise RowProblem(f"turn {index + 1}: no stop token after the answer")
        end = len(tail) - tail[::-1].index(self.stop_id)
        if end < 2:
            calls = f": {NO_CALLS}" if messages[index].extra else ""
            raise RowProblem(f"turn {index + 1}: the answer has no tokens{calls}")
        return ids[: len(prompt) + end], len(prompt)

    def _example(
        self,
        ids: list[int],
        spans: list[tuple[int, int]],
        row: Row,
        key: str,
        train_on: str,
        unlearnt: list[tuple[list[int], int]],
    ) -> Example:
        if train_on == "everything":
            labels = list(ids)
            if self.starts_with_bos:
                labels[0] = IGNORED
            for answer, begin in unlearnt:  # of weight 0
                if ids[: len(answer)] != answer:
                    raise RowProblem("an answer of weight 0 cannot be located")
                labels[begin : len(answer)] = [IGNORED] * (len(answer) - begin)
        else:
            labels = [IGNORED] * len(ids)
            for begin, end in spans:
                labels[begin:end] = ids[begin:end]
        return Example(tuple(ids), tuple(labels), row.source, key, row)

    def _raw(self, row: Row) -> Example:
        assert row.text is not None
        ids = self.encode(row.text)
        if not ids:
            raise RowProblem("the text has no tokens")
        labels = list(ids)
        if self.starts_with_bos and self.bos is not None:
            ids, labels = [self.bos, *ids], [IGNORED, *labels]
        if self.eos is not None:
            ids, labels = [*ids, self.eos], [*labels, self.eos]
        return Example(tuple(ids), tuple(labels), row.source, row.text, row, raw=True)

    def _find_stop(self) -> int | None:
        """The first added token that the template puts after an answer; None if it puts none."""
        probe = (Message("user", "a"), Message("assistant", MARKER))
        try:
            text = self.render(probe, answer_next=False)
        except RowProblem:
            return None
        after = text[text.rindex(MARKER) + len(MARKER) :] if MARKER in text else ""
        added = set(self.tokenizer.get_added_vocab().values()) | set(self.tokenizer.all_special_ids)
        return next((i for i in self.encode(after) if i in added), None)


def _key(messages: tuple[Message, ...]) -> str:
    """What the model is asked first: everything before the first answer.

    Two conversations that share any prompt share this one.
    """
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    return "\x1e".join(f"{m.role}\x1f{m.content}" for m in messages[:first])


def _asked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """From the first turn on that is no answer, if any is left."""
    asked = next((i for i, m in enumerate(messages) if m.role != "assistant"), 0)
    return messages[asked:]


def _fold_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    for i, message in enumerate(rest):
        if system and message.role == "user":
            rest[i] = Message("user", f"{system}\n\n{message.content}", message.extra)
            break
    return tuple(rest)


def _join_turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    out: list[Message] = []
    for message in messages:
        alike = out and (out[-1].role, out[-1].trained) == (message.role, message.trained)
        if alike and message.role in ("user", "assistant"):
            joined = f"{out[-1].content}\n\n{message.content}"
            out[-1] = Message(message.role, joined, trained=message.trained)
        else:
            out.append(message)
    return tuple(out)
