"""The table of output kinds by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from lean_merge.outputs.base import Output

K = TypeVar("K", bound=type[Output])
_KINDS: dict[str, type[Output]] = {}


def register(kind: K) -> K:
    """Make a kind known by its `name`; used as a decorator of its class."""
    _KINDS[kind.name] = kind
    return kind


def registered() -> Mapping[str, type[Output]]:
    """Give the kinds that were registered so far."""
    return MappingProxyType(_KINDS)
