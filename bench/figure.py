"""Draw the figure of README from what the demo measured.

    python bench/figure.py

It reads bench/demo.json, which `lean-merge demo --json` printed, and writes docs/assets/demo.svg:
for each task the share of right answers of every model, with 95 % intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDED, FIGURE = ROOT / "bench" / "demo.json", ROOT / "docs" / "assets" / "demo.svg"
TASKS = {
    "picture_sums": "adds digits in pictures",
    "text_sums": "adds in text",
    "read": "reads digits in pictures",
}
"""The panels from left to right, and what each task asks of a model."""
NAMES = {
    "base": "base, text only",
    "expert": "expert, text only",
    "mllm": "multimodal model, before",
}
INPUTS = tuple(NAMES)
LEFT, PANEL, GAP, TOP, ROW = 190, 176, 22, 86, 30
BAR = 16


def figure(results: dict[str, Any]) -> str:
    """Return the figure as SVG; equal results give equal text."""
    models = list(results["accuracy"])
    width = LEFT + len(TASKS) * (PANEL + GAP) + 6
    height = TOP + len(models) * ROW + 44
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" font-size="13">',
        f'<title id="title">{escape(_summary(results))}</title>',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(16, 28, "Right answers on held-out problems, in percent", size=16, weight=600),
        *_names(models),
    ]
    for place, (task, title) in enumerate(TASKS.items()):
        lines += _panel(results, task, title, LEFT + place * (PANEL + GAP))
    note = "Lines are 95 % intervals. Grey bars are the models that go in, blue bars the merges."
    lines += [_text(16, height - 16, note, fill="#55627a", size=12), "</svg>"]
    return "\n".join(lines) + "\n"


def _names(models: list[str]) -> Iterator[str]:
    for row, model in enumerate(models):
        said = NAMES.get(model, f"merged by {model}")
        yield _text(LEFT - 12, TOP + row * ROW + 19, said, anchor="end")


def _panel(results: dict[str, Any], task: str, title: str, left: int) -> Iterator[str]:
    """Yield one task's bars, whiskers and numbers, and the line where the MLLM begins."""
    scores = results["accuracy"]
    bottom = TOP + len(scores) * ROW
    scale = (PANEL - 46) / 100
    yield _text(left, TOP - 22, title, weight=600)
    for mark in (0, 50, 100):
        x = left + mark * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#e1e6ed"/>'
        yield _text(x, TOP - 6, str(mark), fill="#55627a", size=10, anchor="middle")
    before = left + _percent(scores["mllm"][task]) * scale
    yield (
        f'<line x1="{before:.1f}" x2="{before:.1f}" y1="{TOP}" y2="{bottom}" stroke="#55627a" '
        'stroke-dasharray="3 3"/>'
    )
    for row, (model, tasks) in enumerate(scores.items()):
        y = TOP + row * ROW
        score = tasks.get(task)
        if score is None:
            yield _text(left + 4, y + 19, "sees no pictures", fill="#8691a3", size=11)
            continue
        share = _percent(score)
        low, high = left + 100 * score["low"] * scale, left + 100 * score["high"] * scale
        fill = "#b9c2cf" if model in INPUTS else "#2f62d9"
        yield (
            f'<rect x="{left}" y="{y + 7}" width="{share * scale:.1f}" height="{BAR}" '
            f'fill="{fill}"/>'
        )
        middle = y + 7 + BAR / 2
        yield (
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} '
            f'{middle - 4}v8" stroke="#16202e" fill="none"/>'
        )
        yield _text(left + 100 * scale + 8, y + 19, f"{share:.1f}", size=12)


def _percent(score: dict[str, Any]) -> float:
    return 100 * score["correct"] / score["total"]


def _summary(results: dict[str, Any]) -> str:
    """Return the figure in one sentence, for people who do not see it."""
    task = next(iter(TASKS))
    scores = [
        f"{NAMES.get(model, model)} {_percent(tasks[task]):.1f}"
        for model, tasks in results["accuracy"].items()
        if task in tasks
    ]
    return f"Percent of right answers where a model {TASKS[task]}: {'; '.join(scores)}."


def _text(
    x: float,
    y: float,
    said: str,
    *,
    fill: str = "#16202e",
    size: int = 13,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(said)}</text>'
    )


def main() -> None:
    results = json.loads(RECORDED.read_text(encoding="utf-8"))
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(figure(results), encoding="utf-8")
    print(FIGURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
