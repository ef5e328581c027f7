"""Values that differ between tensors: from mergekit's filters and lists to ours.

mergekit takes the first entry whose words a tensor's name contains. It interpolates a list over the
layers of an output slice, and gives tensors outside of the layers its first value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lean_merge.errors import RecipeError, shown
from lean_merge.recipe.recipe import reject_unknown

Setting = Any
"""A number, a word or a truth value; or a tuple of numbers, interpolated over the layers."""
_OUTSIDE = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
"""Names of tensors outside of the layers: ours, and mergekit's."""


@dataclass(frozen=True, slots=True)
class WordedValue:
    """A value for the tensors whose names contain `words`, or for all if that is None."""

    words: str | None
    value: Setting


@dataclass(frozen=True, slots=True)
class _Filtering:
    """A value for the tensors whose names a filter of ours matches, or for all if that is None."""

    filter: str | None
    value: Setting

    def fits(self, ours: str) -> bool:
        """Return whether the filter matches a tensor outside of the layers."""
        if self.filter is None:
            return True
        names = ours, _OUTSIDE[ours]
        in_layers = self.filter.startswith("layers:")
        return not in_layers and any(re.search(self.filter, name) for name in names)


def rules_of(setting: Any, name: str) -> list[WordedValue]:
    """Read one of mergekit's settings of the parameter `name`. Raises RecipeError."""
    entries = [setting] if isinstance(setting, Mapping) else setting
    if not (isinstance(entries, list) and any(isinstance(each, Mapping) for each in entries)):
        return [] if entries == [] else [WordedValue(None, _value(entries, name))]
    rules = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise RecipeError(f"{name}: write value: {entry} beside entries with a filter.")
        reject_unknown(entry, ("filter", "value"), name)
        words = entry.get("filter")
        if words is not None and not isinstance(words, str):
            raise RecipeError(f"{name}: a filter must be words of a name, not {shown(words)}.")
        rules.append(WordedValue(None if words == "*" else words, _value(entry.get("value"), name)))
    return rules


def _value(raw: Any, name: str) -> Setting:
    """Return a value; YAML reads numbers such as 1e-3 as words."""
    if isinstance(raw, list):
        parts = tuple(_value(each, name) for each in raw)
        if not parts or any(type(each) not in (int, float) for each in parts):
            raise RecipeError(f"{name}: {shown(raw)} is no list of numbers.")
        return parts if len(parts) > 1 else parts[0]
    if isinstance(raw, str):
        try:
            return float(raw)
        except ValueError:
            pass
    if not isinstance(raw, (bool, int, float)):
        raise RecipeError(f"{name} must be a number, a truth value or a list, not {shown(raw)}.")
    return raw


def _at(value: Setting, place: float) -> Setting:
    """Return a value at the place from 0, the first layer of its slice, to 1, the last one."""
    if not isinstance(value, tuple):
        return value
    position = place * (len(value) - 1)
    before = int(position)
    after = min(before + 1, len(value) - 1)
    share = position - before
    return (1 - share) * value[before] + share * value[after]


def filtered(
    rules: Sequence[Sequence[WordedValue]], layers: Sequence[range | None], *, is_whole: bool
) -> Any:
    """Return one value, a list over the layers, or entries with filters, as our recipes have them.

    Parameters
    ----------
    rules, layers
        For each output slice, its rules, of which the last fits all tensors, and its layers; None
        if it has all.
    is_whole
        Whether tensors outside of the layers are merged too.
    """
    entries: list[_Filtering] = []
    for own, of_slice in zip(rules, layers, strict=True):
        if len(rules) == 1:
            entries += [_Filtering(e.words and _pattern(e.words), e.value) for e in own]
        else:
            assert of_slice is not None
            entries += _in_layers(own, of_slice)
    if len(rules) > 1:
        entries.append(_Filtering(None, _outside("embed_tokens", rules[0])))
    if is_whole:
        entries = [*_beside_layers(rules[-1], entries), *entries]
    if len({repr(each.value) for each in entries}) == 1:
        return _plain(entries[0].value)
    return [
        {**({} if each.filter is None else {"filter": each.filter}), "value": _plain(each.value)}
        for each in entries
    ]


def _in_layers(rules: Sequence[WordedValue], layers: range) -> Iterator[_Filtering]:
    """Yield a slice's values with filters that name its layers."""
    for rule in rules:
        if not isinstance(rule.value, tuple):
            yield _Filtering(_within(rule.words, layers), rule.value)
            continue
        for layer in layers:
            place = (layer - layers.start) / (len(layers) - 1) if len(layers) > 1 else 1.0
            here = range(layer, layer + 1)
            yield _Filtering(_within(rule.words, here), _at(rule.value, place))


def _beside_layers(last: Sequence[WordedValue], entries: Sequence[_Filtering]) -> list[_Filtering]:
    """Return entries for the last norm and the head, where our own reading would differ.

    mergekit gives them the first value of a list, of the last slice; we give them the last value.
    """
    found: dict[str, tuple[list[str], Setting]] = {}
    for ours in ("norm", "lm_head"):
        wanted = _outside(ours, last)
        if _at(next(each.value for each in entries if each.fits(ours)), 1.0) != wanted:
            found.setdefault(repr(wanted), ([], wanted))[0].append(ours)
    return [_Filtering(f"^(?:{'|'.join(names)})$", value) for names, value in found.values()]


def _outside(ours: str, rules: Sequence[WordedValue]) -> Setting:
    """Return mergekit's value for a tensor outside of the layers."""
    name = _OUTSIDE[ours]
    return next(_at(e.value, 0.0) for e in rules if e.words is None or e.words in name)


def _pattern(words: str) -> str:
    """Return the regular expression for names that contain `words`; ours lack a leading model."""
    if words.startswith("model."):
        return rf"(?:^|model\.){re.escape(words.removeprefix('model.'))}"
    return re.escape(words)


def _within(words: str | None, layers: range) -> str:
    """Return the filter for the tensors of these layers whose names contain `words`."""
    if words is None:
        last = f"-{layers[-1]}" if len(layers) > 1 else ""
        return f"layers: {layers.start}{last}"
    numbers = "|".join(map(str, layers))
    return rf"^(?=.*{_pattern(words)})(?:.*\.)?layers\.(?:{numbers})\."


def _plain(value: Setting) -> Any:
    return list(value) if isinstance(value, tuple) else value


__all__ = ["Setting", "WordedValue", "filtered", "rules_of"]
