"""A checkpoint: the folder or hub id that a user names, opened without reading any weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lean_merge.checkpoints.adapters import AdapterConfig, find_adapter
from lean_merge.checkpoints.header import TensorSpec, read_header
from lean_merge.checkpoints.hub import snapshot, split_hub_id
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.picklefile import read_pickle_header
from lean_merge.checkpoints.quantised import Scale, split_scales
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.checkpoints.weightfiles import (
    GGUF,
    INDEX,
    PICKLE_SUFFIXES,
    SINGLE,
    WeightFiles,
    find_weights,
    unfinished,
)
from lean_merge.errors import CheckpointError, shown

__all__ = ["INDEX", "SINGLE", "Checkpoint", "open_checkpoint", "open_expert"]

_MAX_CONFIG = 10_000_000
_MAX_TENSORS = 500_000
"""Five times those of the largest mixtures of experts; bounds what all shards take together."""
# Buffers that older models saved and newer ones compute: loaders skip them too.
_COMPUTED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")


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
        Its tensors by name, ordered by (file name, offset): the order to read them in. Scales of
        fp8 weights are not among them.
    config
        The content of config.json, None where there is none.
    files
        Its weight files.
    scales
        What the numbers of each fp8 tensor are to be multiplied by, by the tensor's name.
    adapter
        What adapter_config.json says, for an adapter; its tensors are then the factors.
    """

    source: str
    path: Path
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | None
    files: tuple[Path, ...]
    scales: Mapping[str, Scale] = field(default_factory=lambda: MappingProxyType({}))
    adapter: AdapterConfig | None = None


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Finds a checkpoint and reads the headers of its weight files.

    Parameters
    ----------
    source
        A folder with weights, one weight file, or a hub id "org/name" or "org/name@revision".
        What exists as a path is a path; a hub id is looked up in the local cache first, then,
        unless HF_HUB_OFFLINE is set, downloaded. Of safetensors and PyTorch weights beside each
        other the former are read.

    Raises
    ------
    CheckpointError
        There is nothing there, it is an adapter or of an unsupported kind, unfinished, or damaged.
    """
    checkpoint = open_expert(source)
    if checkpoint.adapter is not None:
        raise CheckpointError(
            f"{source}: holds an adapter, not a whole model, which only an expert may be; merge it "
            "into its base first (PEFT's merge_and_unload)."
        )
    return checkpoint


def open_expert(source: str | Path) -> Checkpoint:
    """`open_checkpoint`, but a folder or hub id with a LoRA adapter will do too."""
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
    if split_hub_id(str(source)) is not None:
        return _open_folder(str(source), snapshot(str(source)))
    raise CheckpointError(
        f"{source}: there is no such folder or file, and it is no hub id like org/name; "
        "check the spelling."
    )


def _open_file(source: str, file: Path) -> Checkpoint:
    if file.name.endswith(".safetensors.partial"):
        raise unfinished(file)
    if file.suffix == ".gguf":
        raise CheckpointError(f"{file}: {GGUF}")
    if file.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise CheckpointError(
            f"{file}: is not a .safetensors file, nor a PyTorch .bin; pass one, or the "
            "checkpoint's folder."
        )
    return _assemble(source, file.parent, WeightFiles((file,)))


def _open_folder(source: str, folder: Path) -> Checkpoint:
    adapter = find_adapter(folder)
    if adapter is None:
        return _assemble(source, folder, find_weights(folder))
    config, file = adapter
    tensors = _read_tensors((file,))
    return Checkpoint(source, folder, MappingProxyType(tensors), None, (file,), adapter=config)


def _assemble(source: str, folder: Path, weights: WeightFiles) -> Checkpoint:
    config = _read_config(folder)
    tensors = _read_tensors(weights.files)
    if weights.named is not None:
        tensors = _match_index(folder, tensors, weights)
    tensors = _without_ties(tensors, config)
    tensors, scales = split_scales(folder, config, tensors)
    return Checkpoint(
        source,
        folder,
        MappingProxyType(tensors),
        config,
        weights.files,
        MappingProxyType(scales),
    )


def _read_tensors(files: tuple[Path, ...]) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for file in files:
        specs = read_header(file)[0] if _is_safetensors(file) else read_pickle_header(file)
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
    return tensors


def _is_safetensors(file: Path) -> bool:
    return file.suffix not in PICKLE_SUFFIXES


def _match_index(
    folder: Path, tensors: dict[str, TensorSpec], weights: WeightFiles
) -> dict[str, TensorSpec]:
    named = weights.named or {}
    for name, file_name in named.items():
        spec = tensors.get(name)
        if spec is None or spec.file.name != file_name:
            raise CheckpointError(
                f"{folder / file_name}: lacks tensor {shown(name)}, which {weights.index} says "
                "it holds; download the checkpoint again."
            )
    for name, spec in tensors.items():
        if name not in named and not name.endswith(_COMPUTED):
            raise CheckpointError(
                f"{spec.file}: holds tensor {shown(name)}, which {weights.index} does not name; "
                "the index and the shards are of different saves, so download the checkpoint again."
            )
    return {name: spec for name, spec in tensors.items() if name in named}


def _without_ties(
    tensors: dict[str, TensorSpec], config: Mapping[str, Any] | None
) -> dict[str, TensorSpec]:
    """Without a head that is stored as the embedding's own bytes, where the config ties them.

    A PyTorch file names shared bytes twice; transformers writes them once, under the embedding's
    name, and so does the output. Other shared bytes stay under each of their names.
    """
    parts = [config or {}, *(v for v in (config or {}).values() if isinstance(v, dict))]
    if not any(part.get("tie_word_embeddings") for part in parts):
        return tensors
    places = {
        (spec.file, spec.offset)
        for name, spec in tensors.items()
        if name.endswith("embed_tokens.weight")
    }
    return {
        name: spec
        for name, spec in tensors.items()
        if not (name.endswith("lm_head.weight") and (spec.file, spec.offset) in places)
    }


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
    return MappingProxyType(config)
