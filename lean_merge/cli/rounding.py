"""Predict what rounding to the output's dtype will keep of an update, and say what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lean_merge.plan import Plan

_BITS = {"bfloat16": 7, "float16": 10}
"""Bits behind the point of a number of each dtype that rounding makes coarse."""
_NAMES = {"BF16": "bfloat16", "F16": "float16"}
ENOUGH_KEPT = 0.9
"""Below this predicted share another way of writing is recommended."""
FORESEEN = "rounding to the output's dtype will keep"
"""The beginning of the advice."""
_BINADES = range(-12, 4)
"""Powers of two around the standard deviation of weights in which nearly all of them lie."""
_STEPS = 40


def predicted_share(update: float, weight: float, bits: int) -> float:
    """Predict the share <stored change, update> / ||update||^2 that rounding to nearest keeps.

    Entries of weights and of updates are taken as normal and independent. In a binade, numbers lie
    one quantum q apart. Of an update with the standard deviation s, rounding to multiples of q
    keeps E[q round(u / q) u] / s^2 = 2 (q / s) sum_k phi((k + 1/2) q / s).

    Parameters
    ----------
    update, weight
        Root mean squares of the update and of the weight.
    bits
        Bits of the dtype's mantissa, without the leading one.
    """
    if update <= 0 or weight <= 0:
        return 1.0
    kept = whole = 0.0
    top = math.floor(math.log2(weight))
    for exponent in (top + each for each in _BINADES):
        low = 2.0**exponent / weight / math.sqrt(2)
        share = math.erf(2 * low) - math.erf(low)
        kept, whole = kept + share * _of_quantum(2.0 ** (exponent - bits) / update), whole + share
    return kept / whole


def _of_quantum(ratio: float) -> float:
    """Return the share that rounding to multiples of a quantum keeps, `ratio` = quantum / s."""
    if ratio < 0.5:
        return 1.0  # within 1e-15
    terms = (math.exp(-(((k + 0.5) * ratio) ** 2) / 2) for k in range(_STEPS))
    return 2 * ratio * math.fsum(terms) / math.sqrt(2 * math.pi)


def dtype_of(plan: Plan) -> str:
    """Return the dtype, of those in which weights in scope are written, with the fewest bits."""
    found = {_NAMES.get(task.tensor.dtype, "float32") for task in plan.weights}
    return next((name for name in _BITS if name in found), "float32")


def foreseen(document: Mapping[str, Any], dtype: str) -> float | None:
    """Return the share that rounding to a dtype will keep, from the norms of an analysis."""
    pairs = []
    for row in document["weights"]:
        if row["skipped"] is None:
            count = math.prod(row["shape"])
            norms = [own["update_norm"] or 0.0 for own in row["experts"] if own["selected"]]
            pairs.append((sum(norm**2 for norm in norms) / count, row["base_norm"] ** 2 / count))
    return _mean(pairs, _BITS[dtype]) if dtype in _BITS else None


def _mean(pairs: Iterable[tuple[float, float]], bits: int) -> float | None:
    """Return the mean share of updates, weighed by their mean squares; None without an update."""
    kept = whole = 0.0
    for update, weight in pairs:
        if update:
            kept += update * predicted_share(math.sqrt(update), math.sqrt(weight), bits)
            whole += update
    return kept / whole if whole else None


def advice(share: float | None, *, at_most: bool) -> str | None:
    """Return what to do about a predicted share; None if rounding will keep nearly all."""
    if share is None or share >= ENOUGH_KEPT:
        return None
    limit = "at most " if at_most else ""
    return (
        f"{FORESEEN} {limit}about {share:.0%} of the update. "
        "--output lora loses nothing of it, and neither does --out-dtype float32; --rounding "
        "stochastic keeps it in the mean"
    )
