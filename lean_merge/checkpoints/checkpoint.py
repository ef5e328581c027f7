"""A checkpoint: the folder or hub id that a user names, opened without reading any weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lean_merge.checkpoints.header import TensorSpec, read_header
from lean_merge.checkpoints.hub import is_hub_id, snapshot
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, is_plain, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_INDEX = 100_000_000
_MAX_CONFIG = 10_000_000
_MAX_FILE_NAME = 255
_MAX_TENSORS = 500_000
"""Five times those of the largest mixtures of experts; bounds what all shards take together."""
_WORD = re.compile(r"[\w.-]{1,40}", re.ASCII)
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Buffers that older models saved and newer ones compute: loaders skip them too.
_COMPUTED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's tensors and configuration; no file is held open.

    Attributes
    ----------
    source
        As the user named it: a path or a hub id.
    path
        The folder of its files.
    tensors
        Its tensors by name, ordered by (file name, offset): the order to read them in.
    config
        The content of config.json, None where there is none.
    files
        Its weight files.
    """

    source: str
    path: Path
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | None
    files: tuple[Path, ...]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Finds a checkpoint and reads the headers of its weight files.

    Parameters
    ----------
    source
        A folder with safetensors weights, one .safetensors file, or a hub id "org/name" or
        "org/name@revision". What exists as a path is a path; a hub id is looked up in the local
        cache first, then, unless HF_HUB_OFFLINE is set, downloaded.

    Raises
    ------
    CheckpointError
        There is nothing there, it is of an unsupported kind, unfinished, or damaged.
    """
    try:
        path = Path(source).expanduser()
        is_file, is_dir = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: cannot be looked up ({error}); check the path."
        ) from error
    if is_file:
        return _open_file(str(source), path)
    if is_dir:
        return _open_folder(str(source), path)
    if is_hub_id(str(source)):
        return _open_folder(str(source), snapshot(str(source), is_complete=_has_all_weights))
    raise CheckpointError(
        f"{source}: there is no such folder or file, and it is no hub id like org/name; "
        "check the spelling."
    )


def _open_file(source: str, file: Path) -> Checkpoint:
    if file.name.endswith(".safetensors.partial"):
        raise _unfinished(file)
    if file.suffix == ".gguf":
        raise CheckpointError(f"{file}: {_GGUF}")
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file}: is not a .safetensors file; pass one, or the checkpoint's folder."
        )
    return _assemble(source, file.parent, (file,), named=None)


def _open_folder(source: str, folder: Path) -> Checkpoint:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be listed ({error.strerror}); check its rights."
        ) from error
    if INDEX in names:
        named = read_index(folder / INDEX)
        if SINGLE in names and SINGLE not in named.values():
            raise CheckpointError(
                f"{folder}: holds {SINGLE} and an {INDEX} that names other files; remove the one "
                "that is left over from an older save."
            )
        files = tuple(checked_file(folder, folder / name) for name in sorted(set(named.values())))
        return _assemble(source, folder, files, named=named)
    files = tuple(checked_file(folder, file) for file in _without_index(folder, names))
    return _assemble(source, folder, files, named=None)


_GGUF = "GGUF weights are quantised and cannot be merged; pass the original safetensors checkpoint."


def _unfinished(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: is an unfinished lean-merge output (*.partial); run the merge again to finish it."
    )


def _without_index(folder: Path, names: list[str]) -> tuple[Path, ...]:
    if SINGLE in names:
        return (folder / SINGLE,)
    if any(name.endswith((".safetensors.partial", f"{INDEX}.partial")) for name in names):
        raise _unfinished(folder)
    weights = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names and all("adapter" in name for name in weights):
        raise CheckpointError(
            f"{folder}: holds an adapter, not a whole model; merge it into its base first."
        )
    if len(weights) == 1 and not _NUMBERED.fullmatch(weights[0]):
        return (folder / weights[0],)
    if weights:
        _check_numbered(folder, weights)
        return tuple(folder / name for name in weights)
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{folder}: {_GGUF}")
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    if others:
        raise CheckpointError(
            f"{folder}: holds weights only as {others[0]}, which may run code when loaded; convert "
            "it to safetensors first, e.g. with transformers' save_pretrained."
        )
    raise CheckpointError(
        f"{folder}: holds no .safetensors weights; pass a checkpoint's folder, and convert a "
        "repository that has only .bin weights to safetensors first (the README shows how)."
    )


def _check_numbered(folder: Path, weights: list[str]) -> None:
    """Raises CheckpointError unless the files are all the shards of one model."""
    matches = [_NUMBERED.fullmatch(name) for name in weights]
    groups = {(match["stem"], match["count"]) if match else None for match in matches}
    if len(groups) != 1 or None in groups:
        raise CheckpointError(
            f"{folder}: holds several weight files ({', '.join(weights[:4])}, ...) and no {INDEX} "
            "that says which belong to the model; pass one file or add the index."
        )
    present = {int(match["number"]) for match in matches if match}
    count = int(next(match["count"] for match in matches if match))
    # The count comes from a file name, so it must not size anything.
    if present != set(range(1, len(weights) + 1)) or len(weights) != count:
        raise CheckpointError(
            f"{folder}: holds {len(weights)} of the {count} shards that their names announce and "
            f"no {INDEX}; download the missing ones."
        )


def read_index(file: Path) -> dict[str, str]:
    """The weight map of an index file: tensor name -> name of a file in the same folder.

    Raises
    ------
    CheckpointError
        The file is damaged, or a name in it leads out of the folder.
    """
    mend = "download or save the checkpoint again"
    index = read_object(checked_file(file.parent, file), limit=_MAX_INDEX, what="index", mend=mend)
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{file}: has no weight_map; {mend}.")
    for tensor, name in named.items():
        plain = isinstance(name, str) and is_plain(name) and not re.search(r"[/\\:]", name)
        if (
            not plain
            or len(name) > _MAX_FILE_NAME
            or not name.endswith(".safetensors")
            or name.startswith(".")
        ):
            raise CheckpointError(
                f"{file}: puts tensor {shown(tensor)} into {shown(name)}, which is not "
                f"the name of a .safetensors file in this folder; {mend}."
            )
    return named


def _assemble(
    source: str, folder: Path, files: tuple[Path, ...], *, named: Mapping[str, str] | None
) -> Checkpoint:
    config = _read_config(folder)
    tensors: dict[str, TensorSpec] = {}
    for file in files:
        specs, _ = read_header(file)
        for name, spec in specs.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: holds tensor {shown(name)}, and so does {tensors[name].file.name}; "
                    "remove the file that is left over from another save."
                )
            tensors[name] = spec
        if len(tensors) > _MAX_TENSORS:
            raise CheckpointError(
                f"{file}: brings the checkpoint to more than {_MAX_TENSORS} tensors, which no "
                "model has; pass another."
            )
    if named is not None:
        tensors = _match_index(folder, tensors, named)
    return Checkpoint(source, folder, MappingProxyType(tensors), config, files)


def _match_index(
    folder: Path, tensors: dict[str, TensorSpec], named: Mapping[str, str]
) -> dict[str, TensorSpec]:
    for name, file_name in named.items():
        spec = tensors.get(name)
        if spec is None or spec.file.name != file_name:
            raise CheckpointError(
                f"{folder / file_name}: lacks tensor {shown(name)}, which {INDEX} says it holds; "
                "download the checkpoint again."
            )
    for name, spec in tensors.items():
        if name not in named and not name.endswith(_COMPUTED):
            raise CheckpointError(
                f"{spec.file}: holds tensor {shown(name)}, which {INDEX} does not name; the "
                "index and the shards are of different saves, so download the checkpoint again."
            )
    return {name: spec for name, spec in tensors.items() if name in named}


def _read_config(folder: Path) -> Mapping[str, Any] | None:
    file = folder / "config.json"
    if not file.is_symlink() and not file.exists():
        return None
    config = read_object(
        checked_file(folder, file),
        limit=_MAX_CONFIG,
        what="config",
        mend="download or save the checkpoint again",
        unique=False,
    )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        quantization = part.get("quantization_config")
        if isinstance(quantization, dict) and quantization:
            method = quantization.get("quant_method", "an unnamed method")
            is_word = isinstance(method, str) and _WORD.fullmatch(method)
            raise CheckpointError(
                f"{folder}: is quantised with {method if is_word else shown(method)}; merging "
                "needs the original weights in bf16, fp16 or fp32, so pass that checkpoint."
            )
    return MappingProxyType(config)


def _has_all_weights(folder: Path) -> bool:
    """Whether a snapshot in the cache holds all its weight files, by name only."""
    if (folder / INDEX).exists():
        return all((folder / name).exists() for name in set(read_index(folder / INDEX).values()))
    return any(folder.glob("*.safetensors"))
