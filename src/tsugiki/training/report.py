"""`report.html`: one file that opens offline, with the run's curves, samples and settings.

Charts are SVG drawn from metrics.jsonl, so that no script is needed. Every text is escaped. Knows
only the files of the run folder.
"""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from tsugiki.files import atomic_write, read_json
from tsugiki.training import metrics

WIDTH, HEIGHT = 720, 240
LEFT, BOTTOM, TOP, RIGHT = 64, 28, 12, 12

STYLE = """
:root{color-scheme:light dark;--ink:#1c1917;--soft:#78716c;--line:#e7e5e4;--page:#fafaf9;
--card:#fff;--a:#0f766e;--b:#c2410c}
@media(prefers-color-scheme:dark){:root{--ink:#f5f5f4;--soft:#a8a29e;--line:#3f3a36;
--page:#1c1917;--card:#292524;--a:#2dd4bf;--b:#fb923c}}
body{font:15px/1.6 system-ui,"Hiragino Sans","Noto Sans CJK JP",sans-serif;color:var(--ink);
background:var(--page);max-width:800px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}
.sub{color:var(--soft)}.card{background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:1rem;margin:.5rem 0}
.big{display:flex;gap:2rem;flex-wrap:wrap}.big b{display:block;font-size:1.4rem}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--line)}.a{stroke:var(--a)}.b{stroke:var(--b)}.fa{fill:var(--a)}.fb{fill:var(--b)}
table{border-collapse:collapse;width:100%}td{padding:.2rem .6rem .2rem 0;vertical-align:top;
border-bottom:1px solid var(--line)}td:first-child{color:var(--soft);white-space:nowrap}
pre{white-space:pre-wrap;word-break:break-word;margin:0;font-size:13px}
"""


def write_report(folder: Path, ended: str) -> Path:
    """Write `folder/report.html` from what the run has written; `ended` says how it ended."""
    lines = metrics.read(folder)
    samples = metrics.read(folder, metrics.SAMPLES)
    train = [(x["step"], x["loss"]) for x in lines if x["kind"] == "train"]
    held = [(x["step"], x["loss"]) for x in lines if x["kind"] == "held_out"]
    rates = [(x["step"], x["lr"]) for x in lines if x["kind"] == "train"]
    norms = [(x["step"], x["grad_norm"]) for x in lines if x["kind"] == "train"]
    config_text = (folder / "config.yaml").read_text(encoding="utf-8")
    decisions = read_json(folder / "decisions.json")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{_text(folder.name)}</title><style>{STYLE}</style>",
        f"<h1>{_text(folder.name)}</h1><p class=sub>tsugiki training report: {_text(ended)}</p>",
        _summary(train, held),
        "<h2>Loss <span class=sub>nats per trained token: "
        "<span class=fa>●</span> training, held out in orange</span></h2>",
        _card(chart([("a", train), ("b", held)])),
        "<h2>Learning rate</h2>",
        _card(chart([("a", rates)])),
        "<h2>Gradient norm <span class=sub>before clipping</span></h2>",
        _card(chart([("a", norms)])),
        "<h2>Samples</h2>",
        *(_sample(line) for line in samples),
        "<h2>Decisions</h2>",
        _card(_table(decisions)),
        "<h2>Settings</h2>",
        _card(f"<pre>{_text(config_text)}</pre>"),
        "</html>\n",
    ]
    path = folder / "report.html"
    atomic_write(path, "\n".join(parts))
    return path


def chart(series: list[tuple[str, list[tuple[int, float]]]]) -> str:
    """Lines over steps as SVG; points that are not finite are left out."""
    clean = [(css, [(x, y) for x, y in line if math.isfinite(y)]) for css, line in series]
    points = [point for _, line in clean for point in line]
    if not points:
        return "<p class=sub>nothing recorded yet</p>"
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    if y1 - y0 < 1e-12:
        y0, y1 = y0 - max(abs(y0) * 0.1, 1e-9), y1 + max(abs(y1) * 0.1, 1e-9)
    x1 = max(x1, x0 + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    out = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img>"]
    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        _, y = at(x0, value)
        out.append(f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y} y2={y} />")
        out.append(f"<text x={LEFT - 6} y={y + 4} text-anchor=end>{value:.3g}</text>")
    for i in range(5):
        step = x0 + (x1 - x0) * i / 4
        x, _ = at(step, y0)
        out.append(f"<text x={x} y={HEIGHT - 8} text-anchor=middle>{step:.0f}</text>")
    for css, line in clean:
        path = " ".join(f"{x},{y}" for x, y in (at(*p) for p in line))
        out.append(f"<polyline class={css} fill=none stroke-width=2 points='{path}' />")
        if len(line) <= 40:
            dots = (f"<circle class=f{css} r=3 cx={x} cy={y} />" for x, y in (at(*p) for p in line))
            out.extend(dots)
    return "".join([*out, "</svg>"])


def _summary(train: list[tuple[int, float]], held: list[tuple[int, float]]) -> str:
    figures = []
    if held:
        figures.append(("held-out loss before", f"{held[0][1]:.4f}"))
        best = min(held, key=lambda p: p[1])
        figures.append((f"best, at step {best[0]}", f"{best[1]:.4f}"))
    if train:
        figures.append(("last training loss", f"{train[-1][1]:.4f}"))
        figures.append(("steps", str(train[-1][0])))
    cells = "".join(
        f"<div><span class=sub>{_text(k)}</span><b>{_text(v)}</b></div>" for k, v in figures
    )
    return _card(f"<div class=big>{cells}</div>")


def _sample(line: dict[str, Any]) -> str:
    return _card(
        f"<div class=sub>step {int(line['step'])}</div>"
        f"<pre class=sub>{_text(line['prompt'])}</pre><pre>{_text(line['text'])}</pre>"
    )


def _table(values: Any) -> str:
    reasons = values.get("reasons", {}) if isinstance(values, dict) else {}
    rows = [
        f"<tr><td>{_text(key)}<td>{_text(value)}<td class=sub>{_text(reasons.get(key, ''))}"
        for key, value in values.items()
        if key != "reasons"
    ]
    return f"<table>{''.join(rows)}</table>"


def _card(inner: str) -> str:
    return f"<div class=card>{inner}</div>"


def _text(value: Any) -> str:
    return html.escape(str(value))
