"""What a comparison found: checks with their figures and limits, in the order of blindness.

Each step is blind to what the one before it sees: a norm epsilon hides from logits, a scale hides
from token ids. Knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rich.table import Table
from rich.text import Text

from tsugiki.errors import MemoryLimitError, TsugikiError, ran_out

# max |difference of logits| / their standard deviation, mean KL in nats, and distance of the
# perplexities' ratio from 1, by stored type. What
# moves them is the rounding of the weights (2^-24, 2^-11 and 2^-8 of each), as far as a model
# amplifies it: the worst of eight random families, float32 → type, is 4e-5, 0.04 and 0.3; the mean
# KL 9e-12, 1.2e-5 and 9e-4. A fault smaller than that is the tensors' step to see.
LIMITS = {
    "float32": (1e-4, 1e-6, 1e-4),
    "float16": (0.1, 1e-4, 1e-2),
    "bfloat16": (0.5, 2e-3, 5e-2),
}


@dataclass(frozen=True)
class Bounds:
    """What is asked of the logits; None: what the stored type allows.

    error: difference / spread. kl: mean, in nats. ratio: how far the perplexities' ratio may be
    from 1.
    """

    error: float | None = None
    kl: float | None = None
    ratio: float | None = None

    def over(self, error: float, kl: float, ratio: float) -> tuple[float, float, float]:
        """These where they are given, else a type's."""
        return (
            error if self.error is None else self.error,
            kl if self.kl is None else self.kl,
            ratio if self.ratio is None else self.ratio,
        )


OF_TYPE = Bounds()
SHOWN = 6
UNMADE = "memory for it"
MORE_ROOM = "end other programs, then: tsugiki verify A B --layer-by-layer"
LAST = "5 logits"  # the step that needs everything: memory, disk, and for GGUF llama.cpp


class Proof(Enum):
    """How a comparison ended; the value is the exit code of the verb that made it."""

    EQUAL = 0
    WRONG = 1
    UNPROVEN = 3  # nothing differs in what was compared, and not everything could be

    @classmethod
    def of_all(cls, proofs: Iterable[Proof]) -> Proof:
        """A fault outweighs what could not be proven, and that outweighs what was."""
        found = set(proofs)
        return next((one for one in (cls.WRONG, cls.UNPROVEN) if one in found), cls.EQUAL)


VERDICTS = {
    Proof.EQUAL: Text("ok", "green"),
    Proof.WRONG: Text("FAILED", "bold red"),
    Proof.UNPROVEN: Text("not proven", "yellow"),
}


@dataclass(frozen=True)
class Check:
    """One thing compared.

    figure, limit: as shown to people. value: the same as a number, where it is one.
    details: what is wrong, named; one line each. proven: whether it could be compared at all; where
    not, nothing differs, and the details say why.
    """

    step: str
    name: str
    figure: str
    limit: str
    ok: bool
    details: tuple[str, ...] = ()
    value: float | None = None
    proven: bool = True


@dataclass(frozen=True)
class Report:
    """Everything that was compared of two artefacts."""

    reference: str
    candidate: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok for check in self.checks)

    @property
    def proof(self) -> Proof:
        """What it proves: nothing whole without its last step, or with one that was cut short."""
        if not self.ok:
            return Proof.WRONG
        whole = any(check.step == LAST for check in self.checks)
        whole = whole and all(check.proven for check in self.checks)
        return Proof.EQUAL if whole else Proof.UNPROVEN

    def table(self) -> Table:
        """For people: one row a check, and what is wrong beneath it."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("step", "compared", "found", "limit", ""):
            table.add_column(title, overflow="fold")
        for check in self.checks:
            proof = Proof.EQUAL if check.ok else Proof.WRONG
            verdict = VERDICTS[proof if check.proven else Proof.UNPROVEN]
            table.add_row(check.step, check.name, Text(check.figure), Text(check.limit), verdict)
            style = "red" if not check.ok else "dim" if check.proven else "yellow"
            for line in check.details[:SHOWN]:
                table.add_row("", Text(line, style), "", "", "")
            if len(check.details) > SHOWN:
                table.add_row("", f"… and {len(check.details) - SHOWN} more", "", "", "")
        return table

    def data(self) -> dict[str, Any]:
        """For machines."""
        return {
            "reference": self.reference,
            "candidate": self.candidate,
            "ok": self.ok,
            "whole": self.proof is not Proof.UNPROVEN,
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }


def found(step: str, name: str, wrong: Sequence[str], compared: int, what: str) -> Check:
    """A check that lists what differs; right when nothing does."""
    figure = f"{len(wrong)} of {compared} {what} differ" if wrong else f"{compared} {what} equal"
    return Check(step, name, figure, "all equal", not wrong, tuple(wrong), float(len(wrong)))


def run_steps(steps: Sequence[tuple[str, Callable[[], list[Check]]]]) -> list[Check]:
    """Every step's checks; one that cannot be made must not hide the others.

    Where memory did not suffice nothing is known to differ, and nothing is proven.
    """
    checks: list[Check] = []
    for step, compare in steps:
        try:
            checks += compare()
        except MemoryLimitError as error:
            checks.append(Check(step, UNMADE, "no", "yes", True, _lines(error), proven=False))
        except TsugikiError as error:
            checks.append(Check(step, "can be read", "no", "yes", False, _lines(error)))
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            told = MemoryLimitError("the memory does not suffice for this step", fix=MORE_ROOM)
            checks.append(Check(step, UNMADE, "no", "yes", True, _lines(told), proven=False))
    return checks


def _lines(error: TsugikiError) -> tuple[str, ...]:
    return tuple(line.strip() for line in str(error).split("\n"))
