"""Analyses as analysis.json holds them, made up but plausible, of any size."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

LEAVES = {
    "self_attn.q_proj": (1, 1),
    "self_attn.k_proj": (1, 1),
    "self_attn.v_proj": (1, 1),
    "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (2.7, 1),
    "mlp.up_proj": (2.7, 1),
    "mlp.down_proj": (1, 2.7),
}
"""Rows and columns of each weight in hidden sizes."""
NULL_99 = 2.5758


def dense(layers: int) -> list[str]:
    """Canonical names of a Llama of so many layers."""
    return [f"layers.{layer}.{leaf}" for layer in range(layers) for leaf in LEAVES]


def mixture(layers: int, experts: int) -> list[str]:
    """Of a model whose feed-forward layers are mixtures."""
    attention = [leaf for leaf in LEAVES if "attn" in leaf]
    return [
        name
        for layer in range(layers)
        for name in [
            *(f"layers.{layer}.{leaf}" for leaf in attention),
            *(
                f"layers.{layer}.mlp.experts.{expert}.{leaf}"
                for expert in range(experts)
                for leaf in ("gate_proj", "up_proj", "down_proj")
            ),
        ]
    ]


def analysis(
    names: Sequence[str],
    *,
    experts: Sequence[str] = ("meta-math/MetaMath-7B-V1.0",),
    hidden: int = 4096,
    threshold: float = 0.4,
    sigmas: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """An analysis of weights with these canonical names."""
    generator = random.Random(seed)
    rows = [_weight(generator, name, len(experts), hidden, threshold, sigmas) for name in names]
    return {
        "version": 1,
        "lean_merge": "0.1.0",
        "recipe": {
            "merge_method": "ip_merging",
            "base_model": "meta-llama/Llama-2-7b-hf",
            "mllm_model": "llava-hf/llava-1.5-7b-hf",
            "experts": [{"model": name} for name in experts],
            "parameters": {"threshold": threshold, "temperature": 32},
        },
        "experts": list(experts),
        "inputs": [{"role": "base", "source": "meta-llama/Llama-2-7b-hf"}],
        "environment": {"torch": "2.13", "device": "cpu"},
        "gathered": {"rank": "auto", "svd": "randomized", "nuclear": "full", "temperature": 32},
        "seconds": {"read": 61.0, "analyse": 43.2},
        "bytes": {"read": 53_000_000_000, "written": 91_000_000},
        "memory": {"peak_anonymous": 430_000_000},
        "warnings": [],
        "thresholds": [_threshold(rows, n, name, threshold) for n, name in enumerate(experts)],
        "weights": rows,
    }


def _weight(
    generator: random.Random, name: str, experts: int, hidden: int, threshold: float, sigmas: int
) -> dict[str, Any]:
    layer, leaf = int(name.split(".")[1]), name.rpartition(".")[2]
    tall, wide = next(size for each, size in LEAVES.items() if each.endswith(leaf))
    shape = [round(tall * hidden), round(wide * hidden)]
    return {
        "weight": name,
        "name": f"language_model.model.{name}.weight",
        "layer": layer,
        "module": leaf,
        "shape": shape,
        "skipped": None,
        "passes": 7,
        "mllm": {**_spectrum(generator, 1.6, sigmas), "rank": min(shape)},
        "experts": [
            _expert(generator, layer, leaf, n, shape, threshold, sigmas) for n in range(experts)
        ],
    }


def _spectrum(generator: random.Random, size: float, sigmas: int) -> dict[str, Any]:
    top, decay = size * generator.uniform(0.7, 1.3), generator.uniform(0.3, 0.6)
    sigma = [top / (1 + n) ** decay for n in range(sigmas)]
    gap = generator.random() < 0.06
    if gap and sigmas > 1:
        sigma[1] = 0.99 * sigma[0]
    return {"norm": 2 * math.hypot(*sigma), "nuclear": 9 * sum(sigma), "sigma": sigma, "gap": gap}


def _expert(
    generator: random.Random,
    layer: int,
    leaf: str,
    number: int,
    shape: Sequence[int],
    threshold: float,
    sigmas: int,
) -> dict[str, Any]:
    null = NULL_99 / math.sqrt(shape[1])
    kind = 0.25 if leaf in ("down_proj", "o_proj") else 0.0
    aligned = 0.25 + kind + 0.35 * math.sin(layer / 5 + number) + generator.gauss(0, 0.12)
    first = min(0.99, max(abs(generator.gauss(0, null / NULL_99)), aligned))
    rest = [abs(generator.gauss(0, 0.08)) for _ in range(sigmas - 1)]
    similarity = [first, *rest]
    scale = generator.uniform(0.3, 0.7)
    spectrum = _spectrum(generator, 3.0, sigmas)
    update = first**2 * scale * spectrum["norm"] * generator.uniform(0.3, 0.6)
    chosen = first >= threshold
    return {
        **spectrum,
        "rank": min(shape),
        "similarity": similarity,
        "gamma": [first, 1 - first][:sigmas],
        "similarity_first": first,
        "similarity_max": max(similarity),
        "lambda": scale,
        "lambda_top_q": 0.9 * scale,
        "lambda_doubt": 0.01,
        "angle_error": 1e-4,
        "omitted_share": 1e-3,
        "null_99": null,
        "update_norm": update,
        "update_relative": update / (scale * spectrum["norm"]),
        "effective_rank": generator.uniform(1, 3),
        "energy_kept": generator.uniform(0.01, 0.1),
        "energy_inside": generator.uniform(0.1, 0.4),
        "selected": chosen,
        "reason": f"s_1 {'reaches' if chosen else 'is below'} the threshold {threshold:g}",
    }


def _threshold(
    rows: Sequence[dict[str, Any]], expert: int, name: str, in_force: float
) -> dict[str, Any]:
    found = [row["experts"][expert]["similarity_first"] for row in rows]
    nulls = sorted(row["experts"][expert]["null_99"] for row in rows)
    return {
        "expert": name,
        "in_force": in_force,
        "select_by": "first",
        "null": {"quantile_99": nulls[len(nulls) // 2], "expected_false": 0.01 * len(rows)},
        "gap": {"low": 0.29, "high": 0.33},
        "auto": 0.31,
        "explanation": "99 % of unrelated task vectors of these shapes stay below 0.04; the widest "
        "gap between two similarities above that lies at 0.31.",
        "counts": [
            {"threshold": n / 100, "selected": sum(s >= n / 100 for s in found)} for n in range(101)
        ],
    }
