"""Choose whether downloads show their progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOWN = ContextVar("downloads are shown", default=True)


@contextmanager
def downloads_shown(shown: bool) -> Iterator[None]:
    """Choose whether downloads inside the block show their progress on standard error."""
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def are_shown() -> bool:
    """Return whether progress is shown here; outside of `downloads_shown` blocks it is."""
    return _SHOWN.get()
