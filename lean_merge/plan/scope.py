"""The recipe's `include` and `exclude` decide which weights are merged.

An entry is a regular expression that is searched for in a weight's canonical name and in the
MLLM's, or a range of layers such as `layers: 0-15`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from lean_merge.errors import RecipeError, shown
from lean_merge.mapping import Coverage, LogicalWeight, MappedWeight, layer_of
from lean_merge.recipe import ANY

COMPILER: ContextVar[Callable[[str], Any]] = ContextVar("compiler", default=re.compile)
"""What compiles the filters of a recipe; it is another for a recipe that nobody has read."""
_RANGES = re.compile(r"layers:\s*(?P<ranges>.*)")
_RANGE = re.compile(r"(?P<first>\d+)(?P<dash>\s*-\s*(?P<last>\d+)?)?")


@dataclass(frozen=True, slots=True)
class Position:
    """The place of a logical weight in the model, for filters and interpolated values.

    Attributes
    ----------
    canonical
        Its canonical name, such as "layers.3.self_attn.q_proj".
    mllm
        The name of its tensor in the MLLM. For a part of a fused tensor the last word is the
        part's own, so that a filter "up_proj" does not match all of gate_up_proj.
    layers
        How many layers the language model has.
    is_matrix
        Whether it is a matrix of attention or of a feed-forward layer.
    """

    canonical: str
    mllm: str
    layers: int
    is_matrix: bool = True

    @property
    def layer(self) -> int:
        """Return the number of its layer from 0; it is also 0 outside of layers."""
        return layer_of(self.canonical) or 0

    @property
    def depth(self) -> float:
        """Return its layer's place between the first, 0.0, and the last, 1.0.

        Embeddings stand with the first layer; the last norm and the head stand with the last.
        """
        if layer_of(self.canonical) is None:
            return 0.0 if self.canonical.startswith("embed") else 1.0
        return self.layer / (self.layers - 1) if self.layers > 1 else 0.0

    def matches(self, entry: str) -> bool:
        """Return whether a filter matches this weight. Raises RecipeError if it makes no sense."""
        found = _RANGES.fullmatch(entry.strip())
        if found:
            layer = layer_of(self.canonical)
            return any(layer in layers for layers in _ranges(entry, found["ranges"]))
        if entry == ANY:
            return True
        search = _pattern(entry, COMPILER.get()).search
        return bool(search(self.canonical) or search(self.mllm))


@cache
def _pattern(entry: str, compiler: Callable[[str], Any]) -> Any:
    try:
        return compiler(entry)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise RecipeError(
            f"The filter {shown(entry)} is not a regular expression ({error}); write one such as "
            "mlp, self_attn, q_proj or layers: 0-15."
        ) from error


@cache
def _ranges(entry: str, text: str) -> tuple[range, ...]:
    ranges = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first = int(match["first"]) if match else 0
        last = first
        if match and match["dash"]:
            # A range without an end reaches beyond the layers of any model.
            last = int(match["last"]) if match["last"] else 10**6
        if match is None or last < first:
            raise RecipeError(
                f"The filter {shown(entry)} is no range of layers; write layers: 0-15, "
                "layers: 16- or layers: 0-3,8."
            )
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def positions_of(coverage: Coverage) -> dict[str, Position]:
    """Return the positions of all logical weights, by canonical name."""
    places = [
        Position(part.canonical, _mllm_name(weight, part), 0, part.is_matrix)
        for weight in coverage.weights
        for part in weight.slices
        if not part.stays
    ]
    layers = 1 + max((place.layer for place in places), default=0)
    return {each.canonical: replace(each, layers=layers) for each in places}


def _mllm_name(weight: MappedWeight, part: LogicalWeight) -> str:
    if len(weight.slices) == 1:
        return weight.mllm.name
    name, _, kind = weight.mllm.name.rpartition(".")
    leaf = part.canonical.removesuffix(".bias").rpartition(".")[2]
    return f"{name.rpartition('.')[0]}.{leaf}.{kind}"


@dataclass(frozen=True, slots=True)
class Scope:
    """The weights that filters leave out, with the reason, by canonical name."""

    filtered: dict[str, str]

    def reason(self, weight: LogicalWeight) -> str:
        """Return why a weight is left out; empty for a weight that is merged."""
        return weight.stays or self.filtered.get(weight.canonical, "")

    def merged(self, coverage: Coverage) -> tuple[MappedWeight, ...]:
        """Return the tensors of which at least one logical weight is merged."""
        return tuple(
            weight
            for weight in coverage.weights
            if not all(self.reason(part) for part in weight.slices)
        )


def filter_weights(
    places: Sequence[Position], *, include: Sequence[str], exclude: Sequence[str]
) -> Scope:
    """Find the weights that `include` leaves out or `exclude` takes out.

    Raises
    ------
    RecipeError
        An entry makes no sense or matches no weight, or no weight is left.
    """
    for name, entries in (("include", include), ("exclude", exclude)):
        for entry in entries:
            if not any(place.matches(entry) for place in places):
                raise RecipeError(
                    f"{name}: {shown(entry)} matches no weight in scope; {nearest(entry, places)}"
                )
    filtered = {}
    for place in places:
        excluded = next((entry for entry in exclude if place.matches(entry)), None)
        if excluded is not None:
            filtered[place.canonical] = f"excluded by {shown(excluded)}"
        elif include and not any(place.matches(entry) for entry in include):
            filtered[place.canonical] = "not in include"
    if places and len(filtered) == len(places):
        raise RecipeError("include and exclude leave no weight to merge; loosen one of them.")
    return Scope(filtered)


def nearest(entry: str, places: Sequence[Position]) -> str:
    """Return a hint at what a filter that matches nothing may have meant."""
    layers = max((place.layers for place in places), default=0)
    if _RANGES.fullmatch(entry.strip()):
        return f"the layers are 0-{layers - 1}."
    words = {word for place in places for word in place.canonical.split(".") if word != "layers"}
    near = difflib.get_close_matches(entry, sorted(words - set("0123456789")), n=1)
    example = places[0].canonical if places else "layers.0.self_attn.q_proj"
    hint = f"the nearest part of a name is {near[0]!r}, " if near else ""
    return f"{hint}and a name is {example!r}."
