"""The table of methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from lean_merge.methods.base import Method

M = TypeVar("M", bound=type[Method[Any]])
_METHODS: dict[str, type[Method[Any]]] = {}


def canonical_name(name: str) -> str:
    """Method names are written with hyphens or underscores: ip-merging is ip_merging."""
    return name.strip().lower().replace("-", "_")


def register(method: M) -> M:
    """Class decorator that makes a method known by its `name`."""
    _METHODS[canonical_name(method.name)] = method
    return method


def registered() -> Mapping[str, type[Method[Any]]]:
    """The methods registered so far."""
    return MappingProxyType(_METHODS)
