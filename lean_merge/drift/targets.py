"""Pull the gradient of one weight along its difference D.

The gradient g of a weight becomes g - alpha f, so that descent moves along D too:

    absolute     f = D
    grad-norm    f = ||g|| D / ||D||
    adaptive     f = (1 + cos(g, D)) / 2 ||g|| D / ||D||

(arXiv:2510.15050, which writes g + alpha f with alpha = -1 for it). Norms and cosine are those of
one logical weight. If either norm is zero, the cosine is 0, and so is f unless it is absolute.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lean_merge.drift.live import Match, Pair
from lean_merge.drift.pieces import Brought, WeightDifference
from lean_merge.drift.rectangles import Box, Rectangle
from lean_merge.drift.shards import add_up, box_of, local, whole
from lean_merge.errors import DataError, shown

PullMode = Literal["absolute", "grad-norm", "adaptive"]
PULL_MODES: tuple[PullMode, ...] = get_args(PullMode)
_RANK_CUTOFF = 1e-10
"""Squared singular values of A and B below this share of the largest count as zero."""


@dataclass(frozen=True, slots=True)
class Pulling:
    """The strength of a pull.

    Attributes
    ----------
    alpha, mode
        As the formula has them.
    scale
        The factor that all gradients still have, of a loss scaler.
    """

    alpha: float
    mode: PullMode
    scale: float | Tensor = 1.0

    def length(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factor of D by which a gradient is to be lessened, and figures.

        Parameters
        ----------
        sums
            <g, D>, ||g||^2 and ||D||^2.

        Returns
        -------
        Tensor, Tensor
            The factor, which is 0 where a gradient is NaN or infinite. Then cos(g, D), ||g|| and
            the length of the pull; NaN stands in their place for such a gradient.
        """
        dot, gradient, difference = sums[0], sums[1].sqrt(), sums[2].sqrt()
        both = gradient * difference
        cosine = torch.where(both > 0, dot / both, both * 0).clamp(-1, 1)
        share = torch.where(difference > 0, gradient / difference, gradient * 0)
        if self.mode == "absolute":
            share = gradient * 0 + self.scale
        elif self.mode == "adaptive":
            share = share * (1 + cosine) / 2
        factor = self.alpha * share
        figures = torch.stack([cosine, gradient / self.scale, factor * difference / self.scale])
        return torch.where(factor.isfinite(), factor, torch.zeros_like(factor)), figures


@dataclass(slots=True)
class Target(abc.ABC):
    """One tensor, or two factors of one, whose gradients are pulled.

    Attributes
    ----------
    names
        The canonical names of the logical weights in it, in order.
    """

    names: list[str] = field(init=False, default_factory=list)

    @property
    @abc.abstractmethod
    def trained(self) -> Sequence[nn.Parameter]:
        """Return the parameters whose gradients are pulled."""

    @property
    @abc.abstractmethod
    def differences(self) -> Sequence[WeightDifference]:
        """Return the differences of the logical weights, in the order of `names`."""

    @abc.abstractmethod
    def pull(
        self, brought: Iterator[Brought], pulling: Pulling, gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Pull the gradients of `trained`, in place.

        Parameters
        ----------
        brought
            The differences, in order.
        pulling
            How strongly.
        gradients
            Those of `trained`.

        Yields
        ------
        Tensor
            The figures of every logical weight, as `Pulling.length` gives them.
        """


def working_dtype(gradient: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, and float32 for all others."""
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32


def _checked_square(total: Tensor, name: str) -> Tensor:
    """Return ||D||^2, or raise DataError if D holds NaN or infinity."""
    if not bool(total.isfinite()):
        raise DataError(f"The prior's {shown(name)} holds NaN or Inf; make the prior again.")
    return total


@dataclass(slots=True)
class WholeTarget(Target):
    """A parameter that is trained itself, whole or as this process's shard of it."""

    parameter: nn.Parameter
    parts: list[tuple[Match, WeightDifference]]
    _squares: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.names = [each.name for each, _ in self.parts]

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        return (self.parameter,)

    @property
    def differences(self) -> Sequence[WeightDifference]:
        return [each for _, each in self.parts]

    def pull(
        self, brought: Iterator[Brought], pulling: Pulling, gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        # A difference that is done is let go before the next one is asked for.
        for match, _ in self.parts:
            yield self._pull_part(match, next(brought), pulling, local(gradients[0]))

    def _pull_part(
        self, match: Match, strips: Brought, pulling: Pulling, gradient: Tensor
    ) -> Tensor:
        box, dtype = box_of(self.parameter), working_dtype(gradient)
        sums = torch.zeros(3, dtype=torch.float64, device=gradient.device)
        square = self._squares.get(match.name)
        for block, first, stop, strip in strips:
            own = _rows(block, gradient, box, first, stop).to(dtype)
            sums[0] += (own * strip).sum()
            sums[1] += (own * own).sum()
            if square is None:
                sums[2] += (strip * strip).sum()
        sums = add_up(sums, self.parameter)
        if square is None:
            square = self._squares[match.name] = _checked_square(sums[2], match.source)
        sums[2] = square
        factor, figures = pulling.length(sums)
        for block, first, stop, strip in strips:
            _rows(block, gradient, box, first, stop).sub_(strip * factor.to(dtype))
        return figures


def _rows(block: Rectangle, tensor: Tensor, box: Box, first: int, stop: int) -> Tensor:
    """Return rows of a logical weight as a view of the part `box` of its tensor."""
    return block.of(tensor, box)[first - block.first : stop - block.first]


@dataclass(slots=True)
class PairTarget(Target):
    """The factors of a change s B A, which are trained while the weight itself is not.

    With the gradient G of the weight, those of the factors are g_B = s G A^T and g_A = s B^T G, so
    to pull G by f is to pull g_B by s f A^T and g_A by s B^T f. G itself is never formed. The two
    gradients tell of it

        G_hat = P_B G + G P_A - P_B G P_A,

    with the projections P_B on the columns of B and P_A on the rows of A. ||G|| and cos(G, D) are
    taken from that. It is held as X g_A / s + E Y, with X = B (B^T B)^+, Y = (A A^T)^+ A and
    E = (1 - P_B) g_B / s; a factor that is frozen tells nothing.
    """

    pair: Pair
    parts: list[tuple[Match, WeightDifference]]
    _squares: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        suffix = f" ({self.pair.adapter})" if len(self.pair.module.active_adapters) > 1 else ""
        self.names = [f"{each.name}{suffix}" for each, _ in self.parts]

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        return self.pair.trained

    @property
    def differences(self) -> Sequence[WeightDifference]:
        return [each for _, each in self.parts]

    def pull(
        self, brought: Iterator[Brought], pulling: Pulling, gradients: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        dtype = working_dtype(gradients[0])
        a, b = (whole(each.detach()).to(dtype) for each in (self.pair.a, self.pair.b))
        left, right = self._known_gradient(a, b, gradients)
        pull_a, pull_b = torch.zeros_like(a), torch.zeros_like(b)
        for match, _ in self.parts:
            yield self._pull_part(
                match, next(brought), pulling, (a, b), (left, right), (pull_a, pull_b)
            )
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            pull = pull_a if parameter is self.pair.a else pull_b
            held = tuple(slice(*each) for each in box_of(parameter))
            local(gradient).sub_(pull[held])

    def _pull_part(
        self,
        match: Match,
        strips: Brought,
        pulling: Pulling,
        factors: tuple[Tensor, Tensor],
        known: tuple[Tensor, Tensor],
        pulls: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Add the pull of one logical weight to that of A, and put it into that of B."""
        (a, b), (left, right), s = factors, known, self.pair.scale
        gram, both = right.double() @ right.double().T, torch.cat([right, a]).T
        sums = torch.zeros(3, dtype=torch.float64, device=a.device)
        square = self._squares.get(match.name)
        from_a, spans = torch.zeros_like(a), list[tuple[slice, Tensor]]()
        for block, first, stop, strip in strips:
            start = block.start + first - block.first
            rows = slice(start, start + stop - first)
            along, own = strip @ both, left[rows]
            sums[0] += (own * along[:, : own.shape[1]]).sum()
            sums[1] += ((own.double().T @ own.double()) * gram).sum()
            if square is None:
                sums[2] += (strip * strip).sum()
            from_a += b[rows].T @ strip
            spans.append((rows, along[:, own.shape[1] :]))
        if square is None:
            square = self._squares[match.name] = _checked_square(sums[2], match.source)
        sums[1], sums[2] = sums[1].clamp(min=0), square
        factor, figures = pulling.length(sums)
        step = (factor * s).to(a.dtype)
        pulls[0].add_(step * from_a)
        for rows, from_b in spans:
            pulls[1][rows] = step * from_b
        return figures

    def _known_gradient(
        self, a: Tensor, b: Tensor, gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return G_hat as the product of [out, 2 r] and [2 r, in]."""
        s = self.pair.scale or 1.0
        known = {
            id(each): whole(gradient).to(a.dtype) / s
            for each, gradient in zip(self.trained, gradients, strict=True)
        }
        of_a, of_b = known.get(id(self.pair.a)), known.get(id(self.pair.b))
        x, y = b @ _inverse(b.T, a.dtype), _inverse(a, a.dtype) @ a
        x, of_a = (torch.zeros_like(b), torch.zeros_like(a)) if of_a is None else (x, of_a)
        y, of_b = (torch.zeros_like(a), torch.zeros_like(b)) if of_b is None else (y, of_b)
        return torch.cat([x, of_b - x @ (b.T @ of_b)], dim=1), torch.cat([of_a, y])


def _inverse(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the pseudo-inverse of rows @ rows.T, for r rows."""
    gram = torch.nan_to_num(rows.double() @ rows.double().T)
    found: Tensor = torch.linalg.pinv(gram, rtol=_RANK_CUTOFF, hermitian=True)
    return found.to(dtype)
