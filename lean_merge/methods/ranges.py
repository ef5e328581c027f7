"""Checks that methods share of what their parameters may be."""

from __future__ import annotations

from collections.abc import Sequence

from lean_merge.errors import RecipeError, shown


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raise RecipeError unless `value` lies from `least` to `most`."""
    if not least <= value <= most:
        raise RecipeError(f"{name} must lie in {least} .. {most}, not {value}.")


def check_word(name: str, value: str, words: Sequence[str]) -> None:
    """Raise RecipeError unless `value` is one of `words`."""
    if value not in words:
        raise RecipeError(f"{name} must be one of {', '.join(words)}, not {shown(value)}.")


def check_density(name: str, value: float) -> None:
    """Raise RecipeError unless `value` is a share of entries that are kept, and not none."""
    if not 0 < value <= 1:
        raise RecipeError(f"{name} must lie above 0 and up to 1, not {value}.")


__all__ = ["check_density", "check_range", "check_word"]
