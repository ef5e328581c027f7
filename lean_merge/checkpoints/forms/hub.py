"""Fetch hub ids, org/name@revision, from the local cache or else only the files needed."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lean_merge.checkpoints.forms import Form, Origin, are_downloads_shown, weight_names
from lean_merge.checkpoints.sidefiles import README, comes_along
from lean_merge.checkpoints.weightfiles import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    adapter_file,
    find_weights,
    read_index,
)
from lean_merge.errors import CheckpointError

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,255}))?",
    re.ASCII,
)
# No loader needs what is shown to readers.
_SHOWN = re.compile(r".+\.(png|jpe?g|gif|webp|svg|mp4|mov|pdf)", re.IGNORECASE)
_TEMPLATES = "additional_chat_templates/"


class Hub(Form):
    """The form of addresses of the Hugging Face hub: org/name or org/name@revision."""

    def fetch(self, source: str) -> Origin | None:
        """Return a repository's snapshot, and download the files that the cache lacks.

        A cached snapshot with all its weights is used as it is, without asking the network. Else
        the repository is listed, and its weights in one form are fetched (safetensors if there are
        any), with the small files beside them. Progress is shown on standard error.

        Raises
        ------
        CheckpointError
            The repository or revision is absent, gated, without weights, or cannot be reached.
        """
        match = HUB_ID.fullmatch(source)
        if match is None:
            return None
        repo, revision = match["repo"], match["revision"]
        folder = _snapshot(source, repo, revision)
        return Origin(folder, repo, revision)


FORM = Hub()


def _snapshot(source: str, repo: str, revision: str | None) -> Path:
    cached = _cached(source, repo, revision)
    if cached is not None and _is_complete(cached):
        return cached
    if is_offline():
        state = "is not" if cached is None else "is only in part"
        raise CheckpointError(
            f"{source}: {state} in the local Hugging Face cache, there is no such folder, and "
            "HF_HUB_OFFLINE forbids a download; unset it or pass a folder."
        )
    try:
        with progress_bars():
            return _download(source, repo, revision)
    except CheckpointError:
        raise
    except Exception as error:
        raise explain_hub(source, error) from error


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids to ask the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


@contextmanager
def progress_bars() -> Iterator[None]:
    """Hide the client's progress bars inside the block unless downloads are shown."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_downloads_shown() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _is_complete(folder: Path) -> bool:
    """Return whether a snapshot holds all its weight files, judged by their names only."""
    try:
        found = find_weights(folder, weight_names())
        if found is None:
            return (folder / ADAPTER_CONFIG).exists() and adapter_file(folder) is not None
        return all(file.exists() for file in found.files)
    except CheckpointError:
        return False


def _cached(source: str, repo: str, revision: str | None) -> Path | None:
    """Return the folder of the cached snapshot, which may lack files; None if there is none."""
    # It is imported only here, because it takes a third of a second.
    from huggingface_hub import try_to_load_from_cache

    try:
        for name in _anchors():
            file = try_to_load_from_cache(repo, name, revision=revision)
            if isinstance(file, str):
                return Path(file).parent
    except Exception as error:
        raise explain_hub(source, error) from error
    return None


def _anchors() -> Iterator[str]:
    """Yield file names, at least one of which is in every snapshot that can be used."""
    yield from ("config.json", ADAPTER_CONFIG)
    for form in weight_names():
        yield from (form.index, form.single)


def _download(source: str, repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(repo, revision=revision)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    # The listed commit is named, so that all files belong to one save.
    commit = info.sha or revision

    def read_weight_map(index: str) -> dict[str, str]:
        return read_index(Path(hf_hub_download(repo, index, revision=commit)))

    wanted = needed_files(source, names, read_weight_map)
    return Path(
        snapshot_download(
            repo, revision=revision, allow_patterns=[glob.escape(name) for name in wanted]
        )
    )


def needed_files(
    source: str, names: Sequence[str], read_weight_map: Callable[[str], dict[str, str]]
) -> list[str]:
    """Return the files of a repository that are needed: weights in one form, and small files.

    Parameters
    ----------
    source
        The repository, for messages.
    names
        The names of all its files.
    read_weight_map
        A function that returns the weight map of an index, given the index's name.

    Raises
    ------
    CheckpointError
        None of the files are weights that can be read.
    """
    weights = _weights(names, read_weight_map)
    if ADAPTER_CONFIG in names:
        # A model may have an adapter beside it.
        weights += [name for name in ADAPTER_FILES if name in names][:1]
    if not weights:
        other = next((name for name in names if name.endswith((".gguf", ".onnx", ".h5"))), None)
        found = f"only others such as {other}" if other else "none at all"
        raise CheckpointError(
            f"{source}: has no weights as model.safetensors or pytorch_model.bin on the hub, "
            f"{found}; pass the repository of the original model."
        )
    beside = [
        name
        for name in names
        if ("/" not in name and comes_along(name) and not _SHOWN.fullmatch(name))
        or name == README
        or (name.startswith(_TEMPLATES) and name.endswith(".jinja"))
    ]
    return sorted({*weights, *beside})


def _weights(names: Sequence[str], read_weight_map: Callable[[str], dict[str, str]]) -> list[str]:
    top = [name for name in names if "/" not in name]
    for form in weight_names():
        if form.index in top:
            return [form.index, *sorted(set(read_weight_map(form.index).values()))]
        if form.single in top:
            return [form.single]
        numbered = [name for name in top if form.numbered.fullmatch(name)]
        if numbered:
            return numbered
        others = [n for n in top if n.endswith(form.suffix) and "adapter" not in n]
        if len(others) == 1 and not form.only_these:
            return others
        adapters = [name for name in ADAPTER_FILES if name in top and name.endswith(form.suffix)]
        if adapters:
            return adapters
    return []


def explain_hub(
    source: str, error: Exception, what: str = "is not in the local cache and cannot be downloaded"
) -> CheckpointError:
    """Return the error for what the hub's client raised, without the client's long text."""
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
        why = f"{what} ({detail}); check the connection"
    return CheckpointError(f"{source}: {why}.")
