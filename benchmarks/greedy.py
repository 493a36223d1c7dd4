"""`python -m benchmarks.greedy`: stories260K goes on as its author publishes, token after token.

Needs ../shared/data. Knows one model and one text.
"""

from __future__ import annotations

import sys
from itertools import takewhile

from benchmarks import record
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.models.load import load_base, resolve_model


def main() -> bool:
    """Generate, compare, record."""
    folder = record.SHARED / "models" / "stories260K"
    expected = (folder / "expected_greedy_200.txt").read_text(encoding="utf-8").strip()
    base = load_base(resolve_model(str(folder)))
    bos = Request((1,), sampling=Sampling(max_tokens=200), raw=True)
    (got,) = Engine(base).complete([bos])
    pairs = zip(got.text.strip(), expected, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    figures = {
        "tokens": float(len(got.ids)),
        "characters equal": float(same),
        "share of the published text": same / max(len(expected), len(got.text.strip())),
    }
    bounds = {"tokens": "== 200", "share of the published text": "== 1"}
    return record.write("greedy", "python -m benchmarks.greedy", figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
