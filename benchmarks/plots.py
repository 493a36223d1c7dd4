"""`python -m benchmarks.plots`: draws what the step and row benchmarks recorded, as SVG beside it.

For each results/*.json that holds a report with rows: time of a step and peak memory by contestant,
the floor as a line. Measures nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks import record

OURS, THEIRS = "#2f7d4f", "#9aa5b1"
STYLE = {
    "svg.hashsalt": "tsugiki",  # the same figures give the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(path: Path, content: dict[str, Any]) -> Path:
    """Bars of one result file; the SVG's path."""
    report = content["report"]
    rows = {name: row for name, row in report["rows"].items() if "floor" not in name}
    names = list(rows)[::-1]
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9, 0.8 + 0.42 * len(names)), sharey=True, layout="constrained"
        )
        for axes, values, unit in (
            (left, [rows[name]["step"] for name in names], "s"),
            (right, [rows[name]["peak_rss"] / 1e9 for name in names], "GB"),
        ):
            bars = axes.barh(names, values, color=colours)
            axes.bar_label(bars, labels=[f" {value:.1f} {unit}" for value in values])
            axes.set_xlim(0, 1.2 * max(values))
            axes.xaxis.set_visible(False)
            axes.spines.bottom.set_visible(False)
            axes.tick_params(left=False)
        left.set_title("one step", loc="left")
        right.set_title("peak memory", loc="left")
        if "floor" in report["rows"]:
            floor = report["rows"]["floor"]["step"]
            left.axvline(floor, color="black", linewidth=1, linestyle=":")
            left.text(floor, len(names) - 0.45, f" floor {floor:.1f} s", fontsize=8)
        layers = f", {report['layers']} layers" if report.get("layers") else ""
        day, machine = content["date"][:10], content["machine"]
        figure.suptitle(
            f"{report['shape']}{layers}, {report.get('set') or str(report['tokens']) + ' tokens'}, "
            f"{machine['cores']} cores, {day}", fontsize=9, color="#555555",
        )  # fmt: skip
        target = path.with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None})
        pyplot.close(figure)
    return target


def main() -> int:
    """Draw all there are."""
    for path in sorted(record.RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in content.get("report", {}):
            print(draw(path, content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
