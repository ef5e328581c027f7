"""Similarity of corresponding singular directions, and the importance it gives them."""

from __future__ import annotations

import math

import torch
from scipy.special import log_ndtr
from torch import Tensor


def corresponding_cosines(first: Tensor, second: Tensor) -> Tensor:
    """s_i = |a_i . b_i| [r] float64 for vectors in the columns of a, b [in, r] (step 3)."""
    count = min(first.shape[1], second.shape[1])
    first, second = first[:, :count].cpu(), second[:, :count].cpu()
    dots = (first * second).sum(0, dtype=torch.float64)
    norms = first.norm(dim=0).double() * second.norm(dim=0).double()
    cosines: Tensor = (dots / norms.clamp_min(1e-300)).abs()
    return cosines.clamp(max=1.0)


def log_omitted(similarity: Tensor, *, omitted: int, in_features: int, temperature: float) -> float:
    """Log of what `omitted` random directions add to the softmax denominator (computed rank).

    For i beyond the computed rank, s_i ~ |N(0, v)|, so that exp(tau s_i) has the mean
    2 exp(tau^2 v / 2) Phi(tau sqrt v). Random directions have v = 1/in; the last quarter of the
    computed similarities replaces it where theirs is larger.
    """
    if omitted <= 0:
        return -math.inf
    tail = similarity[-max(1, similarity.numel() // 4) :]
    variance = max(1 / in_features, float((tail**2).mean()))
    spread = temperature * math.sqrt(variance)
    mean = math.log(2) + spread**2 / 2 + float(log_ndtr(spread))
    if variance > 1 / in_features:
        # Similarities that are not random do not have the law's far tail.
        mean = min(mean, temperature * float(tail.max()))
    return math.log(omitted) + mean


def importance(
    similarity: Tensor, *, temperature: float, relative: bool, log_tail: float = -math.inf
) -> Tensor:
    """gamma [r] float64: softmax(tau s), or exp(tau (s - max s)) where `relative` (step 6)."""
    if similarity.numel() == 0:
        return similarity
    logits = temperature * similarity
    if relative:
        return torch.exp(logits - logits.max())
    denominator = float(torch.logsumexp(logits, 0))
    return torch.exp(logits - _log_add(denominator, log_tail))


def omitted_share(
    similarity: Tensor, *, omitted: int, in_features: int, temperature: float, relative: bool
) -> float:
    """Modelled error of the update, relative, when `omitted` directions are not computed.

    Both the norm of the missing directions' weights gamma^2 and, for `relative`, the same against
    the computed ones; holds only under the random law of `log_omitted`.
    """
    if omitted <= 0:
        return 0.0

    def log_moment(power: int) -> float:
        return log_omitted(
            similarity,
            omitted=omitted,
            in_features=in_features,
            temperature=power * temperature,
        )

    computed = 0.5 * float(torch.logsumexp(4 * temperature * similarity, 0))
    share = math.exp(min(0.0, 0.5 * log_moment(4) - computed))
    if relative:
        return share
    # The tail's share of the denominator is corrected in the mean; its deviation is what is left.
    tail, second = log_moment(1), log_moment(2)
    spread = -math.expm1(min(0.0, 2 * tail - second - math.log(omitted)))
    total = _log_add(float(torch.logsumexp(temperature * similarity, 0)), tail)
    return share + 2 * math.exp(0.5 * second - total) * math.sqrt(spread)


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
