"""Turn an address into the list of its files: of a repository of the hub, or below a URL."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote, unquote, urljoin, urlsplit

from lean_merge.checkpoints.forms.hub import (
    HUB_ID,
    explain_hub,
    is_offline,
    needed_files,
    progress_bars,
)
from lean_merge.checkpoints.remote.client import (
    AbsentError,
    AgainError,
    Location,
    RangedFile,
    raise_if_busy,
)
from lean_merge.checkpoints.weightfiles import SAFETENSORS, read_index
from lean_merge.errors import CheckpointError

_SUFFIX = SAFETENSORS.suffix
_BESIDE = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
)
"""The small files that are looked for beside weights whose folder cannot be listed."""
_LARGEST_SMALL = 100 << 20


@dataclass(frozen=True, slots=True)
class Listing:
    """The files at an address.

    Attributes
    ----------
    address
        The address, with the commit if there are commits.
    name, revision
        The name that the publisher gave it, and the revision that was asked for.
    weights
        The files with weights, by name, which stay where they are.
    small
        The other files, by name: their content here, and the mark of it.
    """

    address: str
    name: str
    revision: str | None
    weights: dict[str, RangedFile]
    small: dict[str, tuple[bytes, str]]


def of_hub(source: str) -> Listing:
    """List a repository of the hub, hf://org/name or hf://org/name@revision.

    The revision is looked up once, and everything is read at the commit that it then names.

    Raises
    ------
    CheckpointError
        The repository is absent, gated, without safetensors weights, or cannot be reached.
    """
    match = HUB_ID.fullmatch(source.partition("://")[2])
    if match is None:
        raise CheckpointError(
            "An address with hf:// is none of the hub; write hf://org/name, or "
            "hf://org/name@revision."
        )
    _refuse_offline(source)
    from huggingface_hub import HfApi, hf_hub_download

    repo, revision = match["repo"], match["revision"]
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        commit = info.sha
        if commit is None:
            raise CheckpointError(f"{source}: the hub names no commit for it; pass a revision.")
        siblings = {each.rfilename: each for each in info.siblings or ()}
        fetch = partial(hf_hub_download, repo, revision=commit)

        def read_weight_map(index: str) -> dict[str, str]:
            return read_index(Path(fetch(index)))

        with progress_bars():
            wanted = needed_files(source, [*siblings], read_weight_map)
            weights = [name for name in wanted if name.endswith(_SUFFIX)]
            other = [name for name in wanted if name.endswith((".bin", ".pt"))]
            if not weights:
                raise CheckpointError(
                    f"{source}: has no safetensors weights but {other[0]}, which is not read from "
                    f"afar; pass {repo} without hf://, which downloads it."
                )
            address = f"hf://{repo}@{commit}"
            small = {
                name: (Path(fetch(name)).read_bytes(), siblings[name].blob_id or "")
                for name in wanted
                if name not in weights
            }
    except CheckpointError:
        raise
    except Exception as error:
        raise explain_hub(source, error, "cannot be reached") from error
    files = {}
    for name in weights:
        each = siblings[name]
        mark = each.lfs.sha256 if each.lfs else each.blob_id
        locate = partial(_on_hub, f"{address}/{name}", repo, name, commit, mark, each.size)
        files[name] = RangedFile(f"{address}/{name}", each.size, mark or "", locate)
    return Listing(address, repo, revision, files, small)


def _on_hub(
    label: str, repo: str, name: str, commit: str, mark: str | None, size: int | None
) -> Location:
    """Ask the hub where a file's bytes are now; it must still be the file that was listed."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(repo, name, revision=commit)
    try:
        found = get_hf_file_metadata(url)
    except Exception as error:
        response = getattr(error, "response", None)
        if response is None and not isinstance(error, OSError):
            raise AgainError("no connection to the hub") from None
        if response is not None:
            raise_if_busy(response.status_code, response.headers)
        raise explain_hub(label, error, "cannot be reached") from None
    etag, length = found.etag, found.size
    is_same = length in (size, None) and found.commit_hash in (commit, None)
    if not is_same or (mark is not None and etag is not None and etag != mark):
        raise RangedFile(label, None, "", lambda: Location("")).changed()
    at_hub = urlsplit(found.location).netloc == urlsplit(url).netloc
    headers = dict(build_hf_headers()) if at_hub else {}
    return Location(found.location, headers, is_passing=not at_hub)


def of_url(source: str) -> Listing:
    """List the file at a URL, or the files that the index there names, and small ones beside them.

    Raises
    ------
    CheckpointError
        The URL may hold a secret or leads to nothing that can be read by ranges.
    """
    parts = urlsplit(source)
    clean = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise CheckpointError(
            f"{clean}: has a login, a query or a fragment, which may hold a secret, and addresses "
            "are told in reports and cards; pass the URL without it."
        )
    if parts.scheme.lower() == "http" and not _is_here(parts.hostname or ""):
        raise CheckpointError(f"{clean}: anyone may change what comes so; write https://.")
    _refuse_offline(source)
    folder, _, last = parts.path.rpartition("/")
    name, below = unquote(last), f"{parts.scheme}://{parts.netloc}{folder}/"
    small: dict[str, tuple[bytes, str]] = {}
    if name.endswith(f"{_SUFFIX}.index.json"):
        small[name] = _whole(urljoin(below, last))
        with TemporaryDirectory() as place:
            index = Path(place) / name
            index.write_bytes(small[name][0])
            names = sorted(set(read_index(index).values()))
    elif name.endswith(_SUFFIX):
        names = [name]
    else:
        raise CheckpointError(
            f"{clean}: is no {_SUFFIX} file and no index of them (*{_SUFFIX}.index.json); pass "
            "the URL of one."
        )
    for beside in _BESIDE:
        try:
            small[beside] = _whole(urljoin(below, quote(beside)))
        except AbsentError:
            continue
    weights = {each: _at(urljoin(below, quote(each))) for each in names}
    return Listing(clean, clean, None, weights, small)


def _at(url: str) -> RangedFile:
    return RangedFile(url, None, "", lambda: Location(url))


def _whole(url: str) -> tuple[bytes, str]:
    """Fetch a small file; return its content and the mark of it."""
    file = _at(url)
    if (size := file.learn_size()) > _LARGEST_SMALL:
        raise CheckpointError(f"{url}: is too large for what its name says; pass another.")
    content = bytearray(size)
    file.fetch(0, [memoryview(content)])
    return bytes(content), file.etag


def _is_here(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_offline(source: str) -> None:
    if is_offline():
        raise CheckpointError(
            f"{source}: lies on another machine, and HF_HUB_OFFLINE forbids to ask it; unset it or "
            "pass a folder."
        )
