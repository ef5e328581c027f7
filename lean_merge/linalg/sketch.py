"""Sketch a matrix at random to find its leading singular triplets and the sums of its spectrum.

The sums come from deflated stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017; Golub and
Meurant 2010 for the Gauss-Radau rule). Four things make them accurate to a few parts in a thousand
with 32 probes and four passes:

- the probes stand on the smaller side of B, and directions that are known already are left out:
  `own_sums` drops their nodes from the sketch that found them, and `sums` uses a second sketch that
  is orthogonal to them;
- they are the start of one block Krylov space, so that all share its nodes;
- the exact Frobenius norm is a control variate for the random error;
- a Gauss and a Gauss-Radau rule are averaged 2 : 1. Where the spectrum touches zero, sqrt(theta) is
  |sigma| with a kink. The Gauss rule has the kink midway between its symmetric nodes, an error of
  +h^2/12; the Radau rule has it on a node, -h^2/6. Away from zero both converge geometrically.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.linalg.krylov import BlockKrylov, Deflation, Ritz, generalized_ritz, grow_gram
from lean_merge.linalg.passes import (
    Pass,
    Products,
    gram64,
    orthonormalize,
    random_block,
    remove_components,
)

_ROUNDING = 1e-5
"""This share of the squared norm cannot be told from the rounding of float32 products."""
_UNSEEN = 4.0
"""A squared norm of more than this many times what random probes see of it is not trusted."""
FEWEST_PROBES = 32
"""With fewer probes, the sums are visibly random."""
_CHANCE = 4.0
"""The probes' share of fixed directions may exceed its mean by this many standard deviations."""
_NEARLY_ALL = 0.02
"""If 16-bit products leave a smaller share of the squared norm, it may be their rounding error."""


@dataclass(frozen=True, slots=True)
class SingularSums:
    """A spectrum given by `values` [k], descending, and how many each stands for, `counts` [k]."""

    values: Tensor
    counts: Tensor
    nuclear: float
    """The sum of all singular values."""
    spread: float = 0.0
    """The difference of the two rules' results, as a share of `nuclear`. The error of their mean is
    at most a tenth of it on spectra with a noise floor."""
    doubt: float = 0.0
    """The share of `nuclear` that is estimated from products that are mostly rounding error."""

    @classmethod
    def of_spectrum(cls, sigma: Tensor) -> SingularSums:
        """Return the sums of a whole spectrum `sigma` [n], descending."""
        return cls(values=sigma, counts=torch.ones_like(sigma), nuclear=float(sigma.sum()))

    def leading(self, count: int) -> float:
        """Return the sum of the `count` largest singular values."""
        before = torch.cumsum(self.counts, 0) - self.counts
        taken = (count - before).clamp_min(0).minimum(self.counts)
        return float((taken * self.values).sum())


@dataclass(frozen=True, slots=True)
class _Rule:
    """Quadrature nodes theta [k] and the mass [k] that the probes give them."""

    theta: Tensor
    mass: Tensor

    def beyond(self, count: int) -> _Rule:
        """Return the rule without its first `count` nodes."""
        return _Rule(self.theta[count:], self.mass[count:])


class Sketch:
    """A random block Krylov sketch of B [out, in], which one `Pass` after another extends.

    Parameters
    ----------
    shape : (int, int)
        The numbers of rows (out) and columns (in).
    block : int
        Number of columns of the start, which are also the probes of the quadrature.
    dtype, device
        Arithmetic dtype of the products with B, and the device that computes them.
    seed, name, role
        The words that seed the random start; see `random_block`.
    deflate : Deflation, optional
        Leading directions that are known already.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        block: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        name: str,
        role: str,
        deflate: Deflation | None = None,
    ) -> None:
        out_features, in_features = shape
        self._dtype = dtype
        self._rounded = dtype.itemsize < 4
        self._wide = in_features > out_features
        self._rest = min(shape)
        self._deflate: Tensor | None = None
        self._leading = torch.zeros(0, dtype=torch.float64)
        if deflate is not None:
            self._rest -= deflate.sigma.numel()
            self._deflate, self._leading = deflate.vectors, deflate.sigma
        side = out_features if self._wide else in_features
        probe = random_block(side, min(block, self._rest), seed=seed, name=name, role=role)
        self._probe = probe.to(device)
        if deflate is not None:
            remove_components(self._probe, _left(deflate) if self._wide else deflate.vectors)
        self._start = self._probe
        self._krylov: BlockKrylov | None = None
        if self._wide:
            self._probe = orthonormalize(self._probe).to(dtype)
        else:
            self._begin()

    def _begin(self) -> None:
        self._krylov = BlockKrylov(self._start, dtype=self._dtype, deflate=self._deflate)

    @property
    def krylov(self) -> BlockKrylov:
        """Return the subspace; it exists once the preliminary pass, if any, is absorbed."""
        assert self._krylov is not None
        return self._krylov

    @property
    def depth(self) -> int:
        """Return how many Krylov blocks were absorbed so far."""
        return 0 if self._krylov is None else self._krylov.depth

    def next_pass(self) -> Pass:
        """Return the pass whose products the next `absorb` expects.

        The first pass of a wide matrix is preliminary.
        """
        if self._krylov is not None:
            return self._krylov.next_pass()
        return Pass(project=self._probe)

    def absorb(self, products: Products) -> None:
        """Extend the sketch by the products of the last `next_pass`."""
        if self._krylov is not None:
            self._krylov.absorb(products)
            return
        assert products.projected is not None
        self._start = products.projected
        if self._deflate is not None:
            remove_components(self._start, self._deflate)
        self._begin()

    def doubted(self, squared_norm: float) -> Tensor | None:
        """Return the vectors [in, c] float32 whose products `recheck` needs; None if it needs none.

        If the deflated vectors hold nearly all of B, the remainder is a difference of two large
        sums, and needs float32 products.
        """
        if self._deflate is None or not self._rounded or not self._deflate.shape[1]:
            return None
        if self._remaining(squared_norm) > _NEARLY_ALL * squared_norm:
            return None
        return self._deflate.float()

    def recheck(self, times: Tensor) -> None:
        """Correct the deflated singular values by `times` [out, c] float32: B times `doubted`."""
        assert self._deflate is not None
        vectors = self._deflate.float()
        # Without this metric, vectors whose lengths are not quite 1 would falsify the remainder.
        pairs = generalized_ritz(gram64(times, times), gram64(vectors, vectors))
        self._leading = pairs.theta.sqrt()

    def _remaining(self, squared_norm: float) -> float:
        return squared_norm - float((self._leading**2).sum())

    def sums(self, squared_norm: float) -> SingularSums:
        """Return the spectrum's sums, given the exact ||B||_F^2."""
        if self._rest <= 0 or squared_norm == 0.0:
            return SingularSums.of_spectrum(self._leading)
        return _estimate(self._leading, self._rest, self._rules(), squared_norm)

    def own_sums(self, squared_norm: float, found: int) -> SingularSums | None:
        """Return the sums from this sketch alone, without any deflation.

        The `found` leading directions have converged, so each counts once, however much of it the
        probes hold. The probes' parts in other directions represent the rest of the spectrum, just
        as the probes of a second sketch that leaves out the found directions would.

        Return None if only a second sketch can give the sums. That is so if there are few probes,
        or if the remainder is lost in the rounding of products, or if the probes hold more of the
        found directions than chance explains. The last happens if so many singular values are alike
        that the probes themselves decided which of their directions were found.
        """
        probes, rest = self._probe.shape[1], self._rest - found
        leading = self.krylov.right().theta[:found].sqrt()
        remaining = squared_norm - float((leading**2).sum())
        blurred = _NEARLY_ALL if self._rounded else _ROUNDING
        if probes < FEWEST_PROBES or rest <= 0 or remaining <= blurred * squared_norm:
            return None
        gauss, radau, total = self._rules()
        held = float(gauss.mass[:found].sum())
        chance = found / self._rest * (1 + _CHANCE * math.sqrt(2 / max(1, probes * found)))
        gauss, radau, total = gauss.beyond(found), radau.beyond(found), total - held
        if held > chance * (total + held) or not _is_sound(radau, total):
            return None
        return _estimate(leading, rest, (gauss, radau, total), squared_norm)

    def _rules(self) -> tuple[_Rule, _Rule, float]:
        """Return the Gauss rule, the Gauss-Radau rule, and the probes' whole mass."""
        krylov = self.krylov
        right = krylov.right()
        if not self._wide:
            probes = krylov.q[0].shape[1]
            left = krylov.left()
            gauss = _Rule(right.theta, _mass(krylov.qq[:probes], right))
            mass = _mass(krylov.yy[:probes], left) / left.theta.clamp_min(1e-300)
            radau = _Rule(left.theta, mass)
            return gauss, radau, float(krylov.qq[:probes, :probes].trace())
        # On the left side the Gauss rule's blocks are P, y_1 .. y_(d-1); their images B^T P, z_1 ..
        metric = numerator = torch.zeros(0, 0, dtype=torch.float64)
        blocks, images = [self._probe, *krylov.y[:-1]], [self._start, *krylov.z[:-1]]
        for index, (block, image) in enumerate(zip(blocks, images, strict=True)):
            metric = grow_gram(metric, blocks[:index], block, rounded=self._rounded)
            numerator = grow_gram(numerator, images[:index], image, rounded=self._rounded)
        probes = self._probe.shape[1]
        ritz = generalized_ritz(numerator, metric, independent=krylov.rounding)
        starts = torch.cat([gram64(self._start, q) for q in krylov.q], dim=1)
        gauss = _Rule(ritz.theta, _mass(metric[:probes], ritz))
        radau = _Rule(right.theta, _mass(starts, right) / right.theta.clamp_min(1e-300))
        return gauss, radau, float(metric[:probes, :probes].trace())


def _estimate(
    leading: Tensor, rest: int, rules: tuple[_Rule, _Rule, float], squared_norm: float
) -> SingularSums:
    """Return the sums of the `leading` singular values and of `rest` more, which the rules give."""
    gauss, radau, total = rules
    remaining = squared_norm - float((leading**2).sum())
    # The difference of two large sums tells nothing once it is of the size of their rounding.
    seen = float((gauss.mass * gauss.theta).sum()) / total
    trusted = _ROUNDING * squared_norm < remaining <= _UNSEEN * seen * rest
    second_moment = remaining / rest if trusted else None
    above = _mean_root(gauss, total, second_moment)
    below = _mean_root(radau, total, second_moment) if _is_sound(radau, total) else above
    tail = rest * max(0.0, (2 * above + below) / 3)
    # By Cauchy and Schwarz the rest of the norm bounds the sum, even if only up to rounding.
    tail = min(tail, math.sqrt(rest * max(remaining, _ROUNDING * squared_norm)))
    nuclear = float(leading.sum()) + tail
    nodes, counts = gauss.theta.sqrt(), rest * gauss.mass / total
    nodes = nodes * (tail / max(float((nodes * counts).sum()), 1e-300))
    values = torch.cat([leading, nodes])
    order = torch.argsort(values, descending=True)
    return SingularSums(
        values=values[order],
        counts=torch.cat([torch.ones_like(leading), counts])[order],
        nuclear=nuclear,
        spread=rest * abs(above - below) / nuclear if nuclear > 0 else 0.0,
        doubt=0.0 if trusted or nuclear <= 0 else tail / nuclear,
    )


def _is_sound(radau: _Rule, total: float) -> bool:
    """Return whether the Radau rule holds more than rounding error.

    If only rounding error is left, the rule has more mass than the probes.
    """
    return float(radau.mass.sum()) <= 1.05 * total


def _left(deflate: Deflation) -> Tensor:
    """Return the orthonormal left singular vectors [out, c] of the settled directions."""
    inverse = torch.where(deflate.sigma > 0, 1 / deflate.sigma, torch.zeros_like(deflate.sigma))
    return deflate.images * inverse.float().to(deflate.images.device)


def _mass(start: Tensor, ritz: Ritz) -> Tensor:
    return (start @ ritz.coefficients).square().sum(0)


def _mean_root(rule: _Rule, total: float, second_moment: float | None) -> float:
    """Return the mean of sqrt(theta) under `rule`.

    The known mean of theta, `second_moment`, corrects it as a control variate.
    """
    theta, mass = rule.theta, rule.mass / total
    root, mean = float((mass * theta.sqrt()).sum()), float((mass * theta).sum())
    if second_moment is None:
        return root
    variance = float((mass * theta**2).sum()) - mean**2
    covariance = float((mass * theta**1.5).sum()) - root * mean
    if variance > 1e-12 * mean**2:
        slope = covariance / variance
    else:
        slope = 0.5 * root / mean if mean > 0 else 0.0
    # By Jensen no mean of roots exceeds the root of the mean.
    return min(root + slope * (second_moment - mean), math.sqrt(second_moment))
