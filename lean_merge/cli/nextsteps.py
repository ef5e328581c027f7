"""Say what to do next with what a command has made: commands and code to copy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lean_merge.outputs import RECIPE
from lean_merge.outputs.card import hub_id, loading_class, public_name
from lean_merge.plan import Plan


def next_lines(steps: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines that begin with "next", one for each step: a word, and what to copy."""
    return [
        f"{'next' if number == 0 else '':<10} {word:<8} {step}"
        for number, (word, step) in enumerate(steps)
    ]


def program(*words: object) -> str:
    """Return a command line of this program for a shell."""
    return shlex.join(["lean-merge", *map(str, words)])


def after_merge(path: Path | None, plan: Plan) -> list[tuple[str, str]]:
    """Return the steps after a merge: load, verify, push; or write a model after a report alone."""
    if not plan.output.is_model or plan.recipe.output == "none" or path is None:
        return [("write", "the same command without --output none, and with --out DIR")]
    return [
        ("load", loading(path, plan.recipe.output, plan.mllm.config or {}, plan.recipe.receiver)),
        ("verify", program("verify", path)),
        ("push", program("push", path, "org/name")),
    ]


def loading(path: Path, output: str, config: Mapping[str, Any], receiver: str) -> str:
    """Return the line of Python that loads an output."""
    kind, remote = loading_class(config, is_text="vision_config" not in config)
    trust = ", trust_remote_code=True" if remote else ""
    if output == "lora":
        source = hub_id(receiver) or public_name(receiver)
        return f'PeftModel.from_pretrained({kind}.from_pretrained("{source}"{trust}), "{path}")'
    return f'{kind}.from_pretrained("{path}", dtype="auto"{trust})'


def after_plan(words: Sequence[str], *, has_out: bool) -> list[tuple[str, str]]:
    """Return the step after a plan: the same arguments for a merge."""
    kept = [word for word in words if word not in ("plan", "merge", "--look", "--dry-run")]
    return [("merge", program("merge", *kept, *(() if has_out else ("--out", "DIR"))))]


def after_analysis(path: Path, document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the steps after an analysis: a merge at the threshold that was found."""
    found = [entry["auto"] for entry in document["thresholds"]]
    numbers = [f"{each:g}" for each in found if isinstance(each, float)]
    threshold = ("--threshold", numbers[0]) if len(found) == len(numbers) == 1 else ()
    words = ("merge", path / RECIPE, "--analysis", path, *threshold, "--out", "DIR")
    return [("merge", program(*words))]
