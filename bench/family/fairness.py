"""Is the family a fair question?  Task vectors, their angles, and simple merges, in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lean_merge.demo.evaluate import Accuracy, load, measure_model

PROBLEMS = 1000
LINE = (0, 0.25, 0.5, 0.75, 1)
QUESTION_SEED = 7  # the questions are the same for every family, whatever its training seed

Weights = Mapping[str, torch.Tensor]

_IN_SCOPE = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight$")


def judge(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Measure a saved family: abilities, conditions, and the simplest ways to merge it.

    Parameters
    ----------
    folders : mapping with keys "base", "expert" and "mllm"

    Returns
    -------
    dict
        ``abilities``, ``conditions`` and ``merges``, ready for the log.
    """
    loaded = {name: load(folder) for name, folder in folders.items()}
    base, expert, mllm = (in_scope(loaded[name][0]) for name in ("base", "expert", "mllm"))
    base, expert, mllm = _copy(base), _copy(expert), _copy(mllm)
    abilities = {name: _scores(name, *pair) for name, pair in loaded.items()}

    def along(
        name: str, title: str, at: Callable[[float], Weights], weights: Sequence[float]
    ) -> dict[str, Any]:
        model, reader = loaded[name]
        rows = {}
        for weight in weights:
            put(model, at(weight))
            rows[f"{weight:g}"] = _scores(f"{title} {weight:g}", model, reader)
        return rows

    conditions = {
        "task_vector_of_expert": relative_norms(expert, base),
        "task_vector_of_mllm": relative_norms(mllm, base),
        "cosine_of_task_vectors": flat_cosine(expert, mllm, base),
        "leading_angles": leading_angles(expert, mllm, base),
        "line_base_to_expert": along(
            "base", "base to expert", partial(interpolation, base, expert), LINE
        ),
    }
    conditions["met"] = met(abilities, conditions)
    for name in ("task_vector_of_expert", "task_vector_of_mllm", "met"):
        print(f"  {name}: {conditions[name]}", flush=True)
    merges = {
        "task_arithmetic": along(
            "mllm", "task arithmetic", partial(task_arithmetic, mllm, expert, base), (0.3, 0.5, 1)
        ),
        "interpolation_to_expert": along(
            "mllm", "mllm to expert", partial(interpolation, mllm, expert), (0.3, 0.5, 0.7, 1)
        ),
    }
    return {"abilities": abilities, "conditions": conditions, "merges": merges}


def met(abilities: Mapping[str, Any], conditions: Mapping[str, Any]) -> dict[str, bool]:
    """Say which of the conditions of a fair question hold; the README gives the reasons."""
    adds = {name: scores["text_sums"]["share"] for name, scores in abilities.items()}
    line = [scores["text_sums"]["share"] for scores in conditions["line_base_to_expert"].values()]

    def near(name: str) -> bool:
        return 1 <= float(conditions[f"task_vector_of_{name}"]["overall_percent"]) <= 3

    return {
        "base_adds_in_part": 0.60 <= adds["base"] <= 0.85,
        "expert_adds": adds["expert"] > 0.90,
        "mllm_reads": abilities["mllm"]["read"]["share"] > 0.90,
        "mllm_adds_worse_than_base": adds["mllm"] < adds["base"],
        "expert_is_near": near("expert"),
        "mllm_is_near": near("mllm"),
        "line_rises": all(here < there for here, there in pairwise(line)),
    }


def in_scope(model: Any) -> dict[str, torch.Tensor]:
    """The language model's 2-D weights that merging may touch, by their names within it.

    An MLLM's vision tower has projections of the same names; they are left out.
    """
    language_model = getattr(model.model, "language_model", model.model)
    weights = language_model.state_dict()
    return {name: weight.float() for name, weight in weights.items() if _IN_SCOPE.search(name)}


def relative_norms(tuned: Weights, base: Weights) -> dict[str, float]:
    """Task vectors' Frobenius norms in percent of the base weights': overall and per matrix."""
    shares = [100 * float((tuned[n] - base[n]).norm() / base[n].norm()) for n in base]
    moved = sum(float((tuned[n] - base[n]).square().sum()) for n in base) ** 0.5
    whole = sum(float(base[n].square().sum()) for n in base) ** 0.5
    return {
        "overall_percent": 100 * moved / whole,
        "smallest_percent": min(shares),
        "largest_percent": max(shares),
    }


def leading_angles(expert: Weights, mllm: Weights, base: Weights) -> dict[str, Any]:
    """How far the two task vectors' leading singular directions agree, matrix by matrix.

    ``s_1`` is the absolute cosine between the leading right singular vectors, as IP-Merging
    compares them, from a plain float64 SVD; ``s_1_left`` is the same on the output side.
    """
    left, right = {}, {}
    for name, start in base.items():
        expert_svd = torch.linalg.svd((expert[name] - start).double(), full_matrices=False)
        mllm_svd = torch.linalg.svd((mllm[name] - start).double(), full_matrices=False)
        left[name] = abs(float(expert_svd.U[:, 0] @ mllm_svd.U[:, 0]))
        right[name] = abs(float(expert_svd.Vh[0] @ mllm_svd.Vh[0]))
    return {"s_1": _summary(right), "s_1_left": _summary(left), "per_matrix_s_1": right}


def flat_cosine(expert: Weights, mllm: Weights, base: Weights) -> float:
    """The cosine between the two task vectors, all in-scope weights laid end to end."""
    one = torch.cat([(expert[n] - base[n]).flatten() for n in base])
    other = torch.cat([(mllm[n] - base[n]).flatten() for n in base])
    return float(one @ other / (one.norm() * other.norm()))


def task_arithmetic(mllm: Weights, expert: Weights, base: Weights, weight: float) -> Weights:
    """``mllm + weight * (expert - base)``."""
    return {n: mllm[n] + weight * (expert[n] - base[n]) for n in base}


def interpolation(start: Weights, end: Weights, weight: float) -> Weights:
    """The point at ``weight`` on the straight line from ``start`` to ``end``."""
    return {n: start[n] + weight * (end[n] - start[n]) for n in start}


def put(model: Any, weights: Weights) -> None:
    """Write in-scope weights into a model, in place."""
    language_model = getattr(model.model, "language_model", model.model)
    language_model.load_state_dict(dict(weights), strict=False)


def _summary(values: Mapping[str, float]) -> dict[str, float]:
    ordered = torch.tensor(sorted(values.values()), dtype=torch.float64)
    return {"median": float(ordered.quantile(0.5)), "largest": float(ordered[-1])}


def _copy(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def _scores(title: str, model: Any, reader: Any) -> dict[str, dict[str, float]]:
    scores = measure_model(model, reader, problems=PROBLEMS, seed=QUESTION_SEED)
    shown = (f"{task} {100 * score.share:.1f}" for task, score in scores.items())
    print(f"  {title:22}" + "  ".join(shown), flush=True)
    return {task: _with_share(score) for task, score in scores.items()}


def _with_share(score: Accuracy) -> dict[str, float]:
    return {"share": score.share, **asdict(score)}
