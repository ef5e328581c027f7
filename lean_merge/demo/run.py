"""The demo: merge the embedded family with the public API, then measure every model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lean_merge.demo.evaluate import evaluate
from lean_merge.demo.tasks import TASKS
from lean_merge.errors import LeanMergeError
from lean_merge.merge import merge
from lean_merge.recipe import Expert, MergeRecipe

FAMILY = Path(__file__).parent / "family"
DEMO_RECIPE = "recipe.yml"
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "IP-Merging": ("ip_merging", {}),
    "TIES": ("ties", {}),
    "TSV-M": ("tsv_m", {}),
    "rank one": ("rank_one", {"scale": 0.5}),
}
"""The merges of the table by their titles: a method, and the parameters that are not defaults."""


def family_recipe(**options: Any) -> MergeRecipe:
    """Return a recipe for the embedded checkpoints."""
    return MergeRecipe(
        base_model=str(FAMILY / "base"),
        mllm_model=str(FAMILY / "mllm"),
        experts=(Expert(str(FAMILY / "expert")),),
        **options,
    )


def demo_recipes(**options: Any) -> dict[str, MergeRecipe]:
    """Return the recipes of the table's merges by their titles, with further recipe options."""
    return {
        name: family_recipe(merge_method=method, parameters=tuple(given.items()), **options)
        for name, (method, given) in MERGES.items()
    }


def run_demo(out: Path | None, *, problems: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Merge by every method of `MERGES`, evaluate all models, and return the table's figures.

    Parameters
    ----------
    out
        Where the merged models stay, and `recipe.yml`, a recipe of the family; None for a
        temporary folder.
    problems
        Held-out problems for each task.
    say
        Receives a line for each step.

    Raises
    ------
    LeanMergeError
        transformers or scikit-learn, which only the evaluation needs, are missing.
    """
    _need_what_measures()
    if out is not None:
        results = _run(out, problems, say)
        (out / DEMO_RECIPE).write_text(family_recipe().to_yaml(), encoding="utf-8")
        say(f"{out / DEMO_RECIPE} names the three models; try: lean-merge plan {out / DEMO_RECIPE}")
        return results
    with tempfile.TemporaryDirectory(prefix="lean-merge-demo-") as folder:
        return _run(Path(folder), problems, say)


def count_right(model: Path, *, problems: int) -> dict[str, dict[str, int]]:
    """Return by task how many answers of one model are right, and how many there are.

    Raises
    ------
    LeanMergeError
        transformers or scikit-learn are missing.
    """
    _need_what_measures()
    return {
        task: {"correct": each.correct, "total": each.total}
        for task, each in evaluate(model, problems=problems).items()
    }


def _need_what_measures() -> None:
    try:
        import sklearn  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise LeanMergeError(
            f"The demo's evaluation needs {error.name}; install it with: "
            "pip install 'lean-merge[demo]'"
        ) from error


def _run(out: Path, problems: int, say: Callable[[str], None]) -> dict[str, Any]:
    models = {name: FAMILY / name for name in ("base", "expert", "mllm")}
    merges = {}
    for name, recipe in demo_recipes().items():
        folder = out / name.lower().replace(" ", "-")
        report = merge(recipe, folder, overwrite=True).report
        counts = report["counts"]
        say(f"merged {name}: {counts['merged']} weights, {counts['copied']} tensors copied")
        models[name] = folder
        merges[name] = {"counts": counts, "warnings": report["warnings"]}
    scores = {}
    for name, folder in models.items():
        say(f"evaluating {name} on {problems} held-out problems a task")
        accuracies = evaluate(folder, problems=problems)
        scores[name] = {
            task: {"correct": a.correct, "total": a.total, "low": a.low, "high": a.high}
            for task, a in accuracies.items()
        }
    conditions = json.loads((FAMILY / "training_log.json").read_text()).get("conditions")
    return {"accuracy": scores, "merges": merges, "conditions": conditions}


def table(results: dict[str, Any]) -> str:
    """Return the figures of `run_demo` as a table, with 95 % intervals and the conditions below."""
    width = 24
    head = f"{'model':<18}" + "".join(f"{task.replace('_', ' '):<{width}}" for task in TASKS)
    lines = [head.rstrip()]
    for model, scores in results["accuracy"].items():
        cells = []
        for task in TASKS:
            score = scores.get(task)
            if score is None:
                cells.append(f"{'-':<{width}}")
                continue
            share = score["correct"] / score["total"]
            interval = f"[{score['low']:.1%}, {score['high']:.1%}]"
            cells.append(f"{f'{share:.1%} {interval}':<{width}}")
        lines.append((f"{model:<18}" + "".join(cells)).rstrip())
    lines += ["", *_conditions(results["conditions"]), ""]
    lines.append(_settings())
    for name, merged in results["merges"].items():
        counts = merged["counts"]
        in_scope = counts["merged"] + counts["unchanged"]
        lines.append(f"{name}: {counts['merged']} of {in_scope} in-scope weights merged.")
        lines += [f"  {warning}" for warning in merged["warnings"]]
    return "\n".join(lines)


def _settings() -> str:
    """Return a sentence on the parameters of all merges."""
    said = [
        f"{name} with {', '.join(f'{key} {value}' for key, value in given.items())}"
        for name, (_, given) in MERGES.items()
        if given
    ]
    plain = ", ".join(name for name, (_, given) in MERGES.items() if not given)
    return "; ".join([f"{plain} with all defaults", *said]) + "."


def _conditions(conditions: dict[str, Any]) -> list[str]:
    """Return the conditions for a fair comparison, as they were measured after training."""
    angles = conditions["leading_angles"]["s_1"]
    line = conditions["line_base_to_expert"]
    steps = ", ".join(f"{point['text_sums']['share']:.1%}" for point in line.values())
    norms = {
        role: conditions[f"task_vector_of_{role}"]["overall_percent"] for role in ("mllm", "expert")
    }
    return [
        f"Task vectors: MLLM {norms['mllm']:.1f} %, expert {norms['expert']:.1f} % of the base's "
        f"norm; s_1 median {angles['median']:.2f}, largest {angles['largest']:.2f}.",
        f"Text sums on the straight line from base to expert at {', '.join(line)}: {steps}.",
    ]
