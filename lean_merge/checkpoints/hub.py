"""Hub ids: org/name@revision, from the local cache first."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from lean_merge.errors import CheckpointError

# Weights, configuration, tokenizers and remote code; never pickles or other formats' weights.
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja", "README.md"]
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,255}))?",
    re.ASCII,
)


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form org/name or org/name@revision."""
    return _HUB_ID.fullmatch(source) is not None


def snapshot(source: str, *, is_complete: Callable[[Path], bool]) -> Path:
    """The local folder of a hub repository's snapshot, downloading what the cache lacks.

    Parameters
    ----------
    source
        org/name or org/name@revision.
    is_complete
        Whether a cached folder holds all it should; else it is downloaded.

    Raises
    ------
    CheckpointError
        The repository or revision is absent, gated, or cannot be reached.
    """
    # Not at import: it costs a third of a second that a merge of local folders need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source}: is no hub id; write one like org/name@revision.")
    repo, revision = match["repo"], match["revision"]
    try:
        cached = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=_PATTERNS, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        cached = None
    except Exception as error:
        raise _explain(source, error) from error
    if cached is not None and is_complete(cached):
        return cached
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        state = "is not" if cached is None else "is only in part"
        raise CheckpointError(
            f"{source}: {state} in the local Hugging Face cache, there is no such folder, and "
            "HF_HUB_OFFLINE forbids a download; unset it or pass a folder."
        )
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:
        raise _explain(source, error) from error


def _explain(source: str, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # A gated repository is also a RepositoryNotFoundError, so it comes first.
    if isinstance(error, GatedRepoError):
        why = "is gated; accept its licence on the hub and log in with `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        why = "has no such revision; check what follows the @"
    elif isinstance(error, RepositoryNotFoundError):
        why = (
            "is neither a folder here nor a model on the hub that you may read; check the "
            "spelling, or log in with `hf auth login` if it is private"
        )
    else:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        why = f"is not in the local cache and cannot be downloaded ({detail}); check the connection"
    return CheckpointError(f"{source}: {why}.")
