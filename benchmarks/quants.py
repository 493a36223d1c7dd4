"""`python -m benchmarks.quants`: what each GGUF type costs, on two trained models; writes a table.

The original's logits (transformers, fp32) against llama.cpp's of each file, in strict settings, on
texts that the model reads: mean KL, share of equal first choices, ratio of the perplexities. The
table goes to docs/quants.md, beside one that was published.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

import torch

from benchmarks import record
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.formats.mixes import find_kind
from tsugiki.models.hub import sprout_folder
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.checks import Check
from tsugiki.proof.gguf.artefact import open_gguf_artefact
from tsugiki.proof.gguf.logits import compare_logits, limits_of, read_reference
from tsugiki.shipping import export_gguf
from tsugiki.terminal import Terminal

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "quants.md"
TYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
STORIES = record.SHARED / "models" / "stories260K"
# Of a trained Llama of 4 layers of width 256.
PUBLISHED = {
    "f16": (1.6e-7, 0.9998, 1.0), "bf16": (1.0e-5, 0.997, 1.0), "q8_0": (1.6e-4, 0.986, 1.0004),
    "q6_k": (8.7e-4, 0.975, 1.002), "q5_k_m": (1.8e-3, 0.963, 1.005),
    "q4_k_m": (4.7e-3, 0.939, 1.005), "q3_k_m": (1.7e-2, 0.895, 1.018),
    "q2_k": (7.5e-2, 0.791, 1.097),
}  # fmt: skip
LIMITS = {kind: limits_of(find_kind(kind).main).kl for kind in TYPES}
Row = tuple[float, float, float]


def measure(model: str, text: str) -> tuple[dict[str, Row], dict[str, str]]:
    """(mean KL, same first choice, perplexities' ratio) by type, and the types of its tensors."""
    found, mixes = {}, {}
    with tempfile.TemporaryDirectory() as temporary, LlamaCpp(torch.get_num_threads()) as llama:
        read = read_reference(open_artefact(model), llama, text=text)
        assert read.learnt, "a text that the model reads"
        for file in export_gguf(model, TYPES, Path(temporary), Terminal()):
            opened = open_gguf_artefact(str(file.path), file.path, None)
            checks = compare_logits(read, opened, llama)
            found[file.dtype] = (
                _value(checks, "mean KL"), _value(checks, "same first"), _value(checks, "perplex")
            )  # fmt: skip
            mixes[file.dtype] = ", ".join(f"{name} × {n}" for name, n in file.types.items())
    return found, mixes


def documentation() -> str:
    """Of Python's standard library, which sprout reads."""
    members = [*vars(threading.Thread).values(), *vars(Path).values()]
    return " ".join(" ".join((member.__doc__ or "").split()) for member in members)


def _value(checks: list[Check], words: str) -> float:
    value = next(check.value for check in checks if words in check.name)
    assert value is not None
    return value


def page(measured: dict[str, tuple[dict[str, Row], dict[str, str]]]) -> str:
    """docs/quants.md."""
    names = ["published, 4 layers × 256", *measured]
    columns = [PUBLISHED, *(rows for rows, _ in measured.values())]
    lines = [
        "# What each GGUF type costs",
        "",
        "Mean KL divergence from the original in nats, share of equal first choices, and the ratio",
        "of the perplexities, each on a text that the model reads. Measured by",
        "`python -m benchmarks.quants`; `tsugiki export` prints the figures of your own model.",
        "Small models suffer more than large ones: these are upper ends, not averages.",
        "",
        "| type | " + " | ".join(names) + " | verify's limit, mean KL |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for kind in TYPES:
        cells = [f"{kl:.1e} · {top:.1%} · {ratio:.3f}" for kl, top, ratio in
                 (column[kind] for column in columns)]  # fmt: skip
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {LIMITS[kind]:g} |")
    lines += [
        "",
        "Q8_0 is the closest of the quantised types, not Q5_K_M. Rows that are no multiple of 256",
        "get other types than the file's name says; what was written in each:",
        "",
    ]
    for name, (_, mixes) in measured.items():
        lines += [f"- {name}: " + "; ".join(f"{kind}: {told}" for kind, told in mixes.items())]
    return "\n".join(lines) + "\n"


def main() -> bool:
    """Measure, write the page, record."""
    measured = {"sprout": measure(str(sprout_folder()), documentation())}
    if STORIES.is_dir():
        lines = (record.SHARED / "text" / "tinystories_1000.jsonl").read_text(encoding="utf-8")
        stories = " ".join(json.loads(line)["text"] for line in lines.splitlines()[:8])
        measured["stories260K"] = measure(str(STORIES), stories)
    else:
        print("stories260K is left out: it needs ../shared/data", flush=True)
    PAGE.write_text(page(measured), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    figures, bounds = {}, {}
    for name, (rows, _) in measured.items():
        for kind, (kl, top, ratio) in rows.items():
            figures |= {f"{name} {kind} KL": kl, f"{name} {kind} same first": top,
                        f"{name} {kind} ratio": ratio}  # fmt: skip
            bounds[f"{name} {kind} KL"] = f"<= {LIMITS[kind]:g}"
    return record.write("quants", "python -m benchmarks.quants", figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
