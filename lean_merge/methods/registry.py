"""The table of methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from lean_merge.methods.base import Method

M = TypeVar("M", bound=type[Method[Any]])
_METHODS: dict[str, type[Method[Any]]] = {}


def canonical_name(name: str) -> str:
    """Return a method's name in lower case with underscores: ip-merging becomes ip_merging."""
    return name.strip().lower().replace("-", "_")


def register(method: M) -> M:
    """Register a method class under its `name`; use this as a class decorator."""
    _METHODS[canonical_name(method.name)] = method
    return method


def registered() -> Mapping[str, type[Method[Any]]]:
    """Return the methods registered so far, by their canonical names."""
    return MappingProxyType(_METHODS)
