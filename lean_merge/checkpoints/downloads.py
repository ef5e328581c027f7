"""Whether downloads show their progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOWN = ContextVar("downloads are shown", default=True)


@contextmanager
def downloads_shown(shown: bool) -> Iterator[None]:
    """Says whether downloads inside the block show their progress on standard error."""
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def are_shown() -> bool:
    """Whether progress is to be shown here; it is, outside of any `downloads_shown` block."""
    return _SHOWN.get()
