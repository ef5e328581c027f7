"""The part of docs/families.md that tells of every multimodal class of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "families.json"
HEADING = """
## Every multimodal class of transformers

`python bench/families.py` builds a tiny model of every class that transformers {transformers} has
for images and text, or for sound and text, with a base and an expert for its language model. It
merges the three whole and as an adapter, which PEFT {peft} then loads over the unchanged model.
Every change of a weight by the whole merge is compared with the adapter's, and so are the logits of
a text, where the class computes them from text alone. The bar is 1e-3 of the change. Of {classes}
classes {merged} are merged whole. The adapter of {adapters} is applied whole, and that of {partial}
once the weights are left out that its refusal names.

| model type | class | merged | adapter | modules applied | largest error of a weight | logits |
|---|---|---|---|---|---|---|
"""


def found() -> dict[str, Any]:
    """The results as the command wrote them."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def page_of_classes() -> str:
    """The last part of docs/families.md."""
    results = found()
    rows = results["classes"]
    whole = [row for row in rows.values() if row.get("whole")]
    words = HEADING.format(
        transformers=results["transformers"],
        peft=results["peft"],
        classes=len(rows),
        merged=sum("merged" in row for row in rows.values()),
        adapters=sum("left out" not in row for row in whole),
        partial=sum("left out" in row for row in whole),
    )
    return words + "".join(_line(kind, row) for kind, row in rows.items())


def _line(kind: str, row: Mapping[str, Any]) -> str:
    merged = "yes"
    if "merged" not in row:
        merged = f"refused: {row['refused']}" if "refused" in row else f"not built: {row['built']}"
    adapter = modules = weight = logits = "—"
    if "adapter refused" in row:
        adapter = f"refused: {row['adapter refused']}"
    if "modules" in row:
        left_out = ", ".join(f"`{each}`" for each in row.get("left out", ()))
        adapter = f"without {left_out}, which is refused by name" if left_out else "yes"
        modules = f"{row['applied']} of {row['modules']}"
        weight = f"{row['worst weight']:.0e}"
        logits = row["logits"]
        logits = logits if isinstance(logits, str) else f"{logits:.0e}"
    cells = (f"`{kind}`", f"`{row['class']}`", merged, adapter, modules, weight, logits)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
