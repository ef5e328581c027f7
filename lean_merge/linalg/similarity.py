"""Compute how similar corresponding singular directions are, and how important that makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def corresponding_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return s_i = |a_i . b_i| [r] float64 for the columns of a and b [in, r] (step 3)."""
    count = min(first.shape[1], second.shape[1])
    first, second = first[:, :count].cpu(), second[:, :count].cpu()
    dots = (first * second).sum(0, dtype=torch.float64)
    norms = first.norm(dim=0).double() * second.norm(dim=0).double()
    cosines: Tensor = (dots / norms.clamp_min(1e-300)).abs()
    return cosines.clamp(max=1.0)


def log_omitted(
    omitted: int, *, in_features: int, temperature: float, observed: Tensor | None = None
) -> float:
    """Return the logarithm of what `omitted` random directions add to the softmax denominator.

    For i beyond the computed rank, s_i ~ |N(0, 1/in)| is assumed, so that exp(tau s_i) has the mean
    2 exp(tau^2 / (2 in)) Phi(tau / sqrt(in)), and none of the s_i lies far beyond the bound
    sqrt(2 log(2 omitted) / in). If the last quarter of the `observed` similarities is larger than
    random ones are, its mean square replaces 1/in, and its largest value may raise the bound.
    """
    if omitted <= 0:
        return -math.inf
    variance, bound = 1 / in_features, math.sqrt(2 * math.log(2 * omitted) / in_features)
    if observed is not None and observed.numel():
        tail = observed[-max(1, observed.numel() // 4) :]
        if float((tail**2).mean()) > variance:
            variance, bound = float((tail**2).mean()), max(bound, float(tail.max()))
    spread = temperature * math.sqrt(variance)
    mean = (
        math.log(2)
        + spread**2 / 2
        + float(torch.special.log_ndtr(torch.tensor(spread, dtype=torch.float64)))
    )
    return math.log(omitted) + min(mean, temperature * bound)


def importance(
    similarity: Tensor, *, temperature: float, relative: bool, log_tail: float = -math.inf
) -> Tensor:
    """Return gamma [r] float64: softmax(tau s), or exp(tau (s - max s)) if `relative` (step 6)."""
    if similarity.numel() == 0:
        return similarity
    logits = temperature * similarity
    if relative:
        return torch.exp(logits - logits.max())
    denominator = float(torch.logsumexp(logits, 0))
    return torch.exp(logits - _log_add(denominator, log_tail))


@dataclass(frozen=True, slots=True)
class Omitted:
    """The modelled relative errors of the update when directions beyond the rank are not computed.

    `share` is the norm of the missing directions' weights gamma^2, divided by that of the computed
    ones. `deviation` is the error of all weights that comes from the missing directions' random
    contribution to the denominator.
    """

    share: float
    deviation: float


def omitted_errors(
    similarity: Tensor, *, omitted: int, in_features: int, temperature: float, relative: bool
) -> Omitted:
    """Estimate the errors of leaving out `omitted` directions, by the model of `log_omitted`."""
    if omitted <= 0:
        return Omitted(0.0, 0.0)

    def log_moment(power: int) -> float:
        return log_omitted(
            omitted,
            in_features=in_features,
            temperature=power * temperature,
            observed=similarity,
        )

    computed = 0.5 * float(torch.logsumexp(4 * temperature * similarity, 0))
    share = math.exp(min(0.0, 0.5 * log_moment(4) - computed))
    if relative:
        return Omitted(share, 0.0)
    # The denominator is corrected by the tail's mean, so that only its deviation is an error.
    tail, second = log_moment(1), log_moment(2)
    spread = -math.expm1(min(0.0, 2 * tail - second - math.log(omitted)))
    total = _log_add(float(torch.logsumexp(temperature * similarity, 0)), tail)
    deviation = 2 * math.exp(min(0.0, 0.5 * second - total)) * math.sqrt(spread)
    return Omitted(share, deviation)


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
