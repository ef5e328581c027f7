"""The points of a sweep are combinations of parameters' values, each with its own name."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from lean_merge.errors import RecipeError, shown
from lean_merge.methods import canonical_name
from lean_merge.methods.ip_parameters import AUTO
from lean_merge.recipe import MergeRecipe

AXES: Mapping[str, str] = {
    "threshold": "thresholds",
    "stages": "stages",
    "scale": "scales",
    "temperature": "temperatures",
}
"""The parameters that can be swept, each with the field of `Grid` that holds its values."""
MAX_POINTS = 1000
_NUMBER = re.compile(r"[+-]?(?:\d{1,9}(?:\.\d{0,12})?|\.\d{1,12})", re.ASCII)
_TRUTH: Mapping[str, Value] = {"true": True, "false": False}
_WORD = re.compile(r"[a-z][a-z_-]{0,40}", re.ASCII)
_STAGE_SET = re.compile(r"[a-z]{1,16}(?:,[a-z]{1,16}){0,7}", re.ASCII)
_HOW = "write numbers as 0.3, lists as 0.2,0.4 and ranges as 0.1:0.9:0.1 (start:stop:step)"

Value = float | str
METHOD = "method"
"""The axis of the methods, if several are swept."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a grid.

    Attributes
    ----------
    name
        The name of its folder, such as threshold-0.3_scale-0.5, which has lower-case letters,
        digits, dots and hyphens, and depends on the point's values alone.
    values
        Each swept parameter and its value here, in the order of `AXES`. Where methods are swept,
        the method comes first.
    """

    name: str
    values: tuple[tuple[str, Value], ...]

    @property
    def parameters(self) -> dict[str, Value]:
        """Return `values` as a mapping."""
        return dict(self.values)

    def recipe(self, recipe: MergeRecipe) -> MergeRecipe:
        """Return the recipe with this point's values, which hold for every expert and weight.

        A method that is not the recipe's own takes none of its parameters.
        """
        swept = self.parameters
        method = str(swept.pop(METHOD, recipe.merge_method))
        keeps = canonical_name(method) == canonical_name(recipe.merge_method)
        experts = tuple(
            replace(
                each,
                parameters=tuple((n, v) for n, v in each.parameters if keeps and n not in swept),
            )
            for each in recipe.experts
        )
        common = {**(dict(recipe.parameters) if keeps else {}), **swept}
        return replace(
            recipe, merge_method=method, experts=experts, parameters=tuple(common.items())
        )


@dataclass(frozen=True, slots=True, init=False)
class Grid:
    """The values of parameters; a sweep tries all of their combinations.

    The values of a parameter may be given as text, as on the command line, or as a sequence. A
    value that is given twice counts once.

    Parameters
    ----------
    thresholds : text or numbers
        "0.1:0.9:0.1" is start:stop:step, both ends included, in exact decimals; lists have commas;
        "auto" is a threshold too.
    stages : text or texts
        Sets of stages, with semicolons between them: "select;select,rescale".
    scales, temperatures : text or numbers
        Numbers as for thresholds, without "auto".

    Raises
    ------
    RecipeError
        A value cannot be read, there is none at all, or there are more than 1000 points.
    """

    thresholds: tuple[Value, ...]
    stages: tuple[str, ...]
    scales: tuple[float, ...]
    temperatures: tuple[float, ...]

    def __init__(
        self,
        *,
        thresholds: str | float | Sequence[Value] = (),
        stages: str | Sequence[str | Sequence[str]] = (),
        scales: str | float | Sequence[Value] = (),
        temperatures: str | float | Sequence[Value] = (),
    ) -> None:
        fields: dict[str, Sequence[Value]] = {
            "thresholds": _numbers(thresholds, "thresholds"),
            "stages": _stage_sets(stages, "stages"),
            "scales": _numbers(scales, "scales"),
            "temperatures": _numbers(temperatures, "temperatures"),
        }
        for field, values in fields.items():
            if AUTO in values and field != "thresholds":
                raise RecipeError(f"{field}: only a threshold can be auto; {_HOW}.")
            object.__setattr__(self, field, tuple(dict.fromkeys(values)))
        if not self.axes:
            raise RecipeError(
                "A sweep needs values of at least one of thresholds, stages, scales and "
                "temperatures; give --thresholds 0.1:0.9:0.1."
            )
        _check_size(self.size)

    @property
    def axes(self) -> dict[str, tuple[Value, ...]]:
        """Return the values of the parameters that are swept."""
        found = {axis: tuple(getattr(self, field)) for axis, field in AXES.items()}
        return {axis: values for axis, values in found.items() if values}

    @property
    def size(self) -> int:
        """Return how many points there are."""
        size = 1
        for values in self.axes.values():
            size *= len(values)
        return size

    def points(self) -> Iterator[Point]:
        """Yield every combination; thresholds vary fastest."""
        axes = self.axes
        slowest_first = sorted(axes, key=("stages", "scale", "temperature", "threshold").index)
        for combination in itertools.product(*(axes[axis] for axis in slowest_first)):
            values = dict(zip(slowest_first, combination, strict=True))
            ordered = tuple((axis, values[axis]) for axis in axes)
            yield Point("_".join(f"{axis}-{_word(value)}" for axis, value in ordered), ordered)


@dataclass(frozen=True, slots=True, init=False)
class MethodGrid:
    """Several methods, each with values of its own parameters; a sweep tries every combination.

    Parameters
    ----------
    methods : mapping
        For each method, the values of its parameters by name, which may be none:
        `{"ties": {"scale": "0.5:1.5:0.5", "density": [0.1, 0.2]}, "star": {}}`. Values are written
        as those of a `Grid`, or are words.

    Raises
    ------
    RecipeError
        A value cannot be read, there is no method, or there are more than 1000 points.
    """

    methods: tuple[tuple[str, tuple[tuple[str, tuple[Value, ...]], ...]], ...]

    def __init__(self, methods: Mapping[str, Mapping[str, Any]]) -> None:
        found = tuple(
            (
                canonical_name(method),
                tuple(
                    (name, tuple(dict.fromkeys(_values(given, f"{method} {name}", name))))
                    for name, given in values.items()
                ),
            )
            for method, values in methods.items()
        )
        object.__setattr__(self, "methods", found)
        if not found:
            raise RecipeError("A sweep over methods needs one at least.")
        size = sum(math.prod(len(values) for _, values in each) for _, each in found)
        _check_size(size)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> MethodGrid:
        """Read texts such as "ties scale=0.5:1.5:0.5 density=0.1,0.2", one for each method.

        Raises
        ------
        RecipeError
            A text is none, or a method comes twice.
        """
        methods: dict[str, dict[str, str]] = {}
        for text in texts:
            method, *pairs = text.split()[:100] or [""]
            values = dict(pair.partition("=")[::2] for pair in pairs)
            if not _WORD.fullmatch(method) or "" in values.values() or len(values) < len(pairs):
                raise RecipeError(
                    f"{shown(text)} cannot be read; write a method and values of its parameters, "
                    "each once: 'ties scale=0.5:1.5:0.5 density=0.1,0.2'."
                )
            if canonical_name(method) in methods:
                raise RecipeError(f"The method {shown(method)} is given twice; give it once.")
            methods[canonical_name(method)] = values
        return cls(methods)

    @property
    def axes(self) -> dict[str, tuple[Value, ...]]:
        """Return the methods, and all values that any of them has of each parameter."""
        axes: dict[str, dict[Value, None]] = {METHOD: {name: None for name, _ in self.methods}}
        for _, parameters in self.methods:
            for name, values in parameters:
                axes[name] = axes.get(name, {}) | dict.fromkeys(values)
        return {axis: tuple(values) for axis, values in axes.items()}

    def points(self) -> Iterator[Point]:
        """Yield every combination, method by method; the last parameter's values vary fastest."""
        for method, parameters in self.methods:
            names = [name for name, _ in parameters]
            for combination in itertools.product(*(values for _, values in parameters)):
                values = tuple(zip(names, combination, strict=True))
                words = [method, *(f"{name}-{_word(value)}" for name, value in values)]
                yield Point("_".join(words), ((METHOD, method), *values))


def _values(given: Any, field: str, name: str) -> list[Value]:
    """Return the values of any parameter: sets of stages, numbers, or words such as `true`."""
    if name == "stages":
        return list(_stage_sets(given, field))
    items = given.split(",") if isinstance(given, str) else _sequence(given, field)
    found: list[Value] = []
    for item in items:
        text = item.strip() if isinstance(item, str) else written(item)
        if _WORD.fullmatch(text):
            found.append(_TRUTH.get(text, text))
        else:
            whole = "." not in text
            found += [
                int(each) if whole and not isinstance(each, str) else each
                for each in _items(text, field)
            ]
    if not found:
        raise RecipeError(f"{field}: there are no values; {_HOW}.")
    return found


def written(value: Value) -> str:
    """Return a value in plain decimals or words, a form in which it can also be given."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else format(Decimal(repr(value)).normalize(), "f")


def _check_size(size: int) -> None:
    if size > MAX_POINTS:
        raise RecipeError(
            f"The grid has {size} points, and a sweep makes at most {MAX_POINTS}; give "
            "fewer values."
        )


def _word(value: Value) -> str:
    """Return a value as a part of a file name."""
    if isinstance(value, (str, bool)):
        return written(value).replace(",", "-")
    return f"minus-{written(-value)}" if value < 0 else written(value)


def _numbers(given: Any, field: str) -> list[Value]:
    if isinstance(given, str):
        return [value for item in given.split(",") for value in _items(item.strip(), field)]
    return [
        value
        for each in _sequence(given, field)
        for value in _items(each if isinstance(each, str) else _text(each, field), field)
    ]


def _sequence(given: Any, field: str) -> Sequence[Any]:
    if isinstance(given, (list, tuple)):
        return given
    return [given]


def _text(value: Any, field: str) -> str:
    """Return a Python number in plain decimals."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9:
        return format(Decimal(repr(value)), "f")
    raise RecipeError(f"{field}: {shown(value)} cannot be a value of a grid; {_HOW}.")


def _items(item: str, field: str) -> list[Value]:
    """Return the values that one item of a list, a number, a range or auto, stands for."""
    if item == AUTO:
        return [AUTO]
    parts = [part.strip() for part in item.split(":")]
    if len(parts) not in (1, 3) or not all(map(_NUMBER.fullmatch, parts)):
        raise RecipeError(f"{field}: {shown(item)} cannot be read; {_HOW}.")
    numbers = [Decimal(part) for part in parts]
    if len(numbers) == 1:
        return [_float(numbers[0])]
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise RecipeError(
            f"{field}: the range {shown(item)} leads nowhere; its stop must not lie below its "
            "start, and its step must be positive."
        )
    count = int((stop - start) // step) + 1
    if count > MAX_POINTS:
        raise RecipeError(
            f"{field}: the range {shown(item)} has {count} values, and a sweep makes at most "
            f"{MAX_POINTS} points; take a larger step."
        )
    return [_float(start + index * step) for index in range(count)]


def _float(number: Decimal) -> float:
    # Adding 0.0 turns -0.0 into 0.0.
    return float(number) + 0.0


def _stage_sets(given: Any, field: str) -> list[str]:
    texts = [given] if isinstance(given, str) else _sequence(given, field)
    found = []
    for text in texts:
        if isinstance(text, (list, tuple)) and all(isinstance(each, str) for each in text):
            text = ",".join(text)
        if not isinstance(text, str):
            raise RecipeError(
                f"{field}: {shown(text)} is not a set of stages; write select,rescale."
            )
        for part in text.split(";"):
            words = ",".join(word.strip() for word in part.split(","))
            if not _STAGE_SET.fullmatch(words):
                raise RecipeError(
                    f"{field}: {shown(part)} is not a set of stages; write select,rescale, with "
                    "semicolons between sets."
                )
            found.append(words)
    return found
