"""Open the folder or hub id that a user names, without reading any weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lean_merge.checkpoints.dtypes import FLOATING
from lean_merge.checkpoints.forms import Adapter, Encoding, Origin, all_forms, weight_names
from lean_merge.checkpoints.header import TensorSpec, read_header
from lean_merge.checkpoints.identity import look_at
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.rows import Place, StoredRows, WeightSource
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.checkpoints.weightfiles import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    GGUF,
    SAFETENSORS,
    WeightFiles,
    adapter_file,
    find_weights,
    no_weights,
    unfinished,
)
from lean_merge.errors import CheckpointError, shown

_CONFIG = "config.json"
_MAX_CONFIG = 10_000_000
_TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config", "decoder")
_MAX_TENSORS = 500_000
"""Five times the tensors of the largest mixtures of experts; it bounds what all shards take."""
# These are buffers that older models saved and newer ones compute; loaders skip them too.
COMPUTED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")
# These are the dtypes of plain models. Every quantised model has codes of another dtype.
_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's tensors and configuration; no file is held open.

    Attributes
    ----------
    source
        The path or hub id that the user named.
    path
        The folder of its files.
    tensors
        Its tensors by name, in the order to read them: by (file name, offset). Tensors that only
        serve to decode others, such as the scales of fp8 weights, are not among them.
    config
        The content of config.json; None if there is none.
    files
        Its weight files.
    configs
        The JSON files that decide how its tensors are understood.
    encodings
        By name, the encodings of the tensors whose numbers have to be computed from stored ones.
    adapter
        What it adds to a base model, if it is an adapter; its tensors are then the factors.
    attached
        An adapter that lies beside its weights and is added to them, as transformers adds it.
    origin
        The place that it was fetched from; None for a local path.
    seen
        What `look_at` told of each of its files before it was opened.
    beside, left
        Of the MLLM alone: the files that are copied beside its weights, and the names of what is
        not copied although it is no part of the weights that were read.
    """

    source: str
    path: Path
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] | None
    files: tuple[Path, ...]
    configs: tuple[Path, ...] = ()
    encodings: Mapping[str, Encoding] = field(default_factory=lambda: MappingProxyType({}))
    adapter: Adapter | None = None
    attached: Checkpoint | None = None
    origin: Origin | None = None
    seen: Mapping[Path, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    beside: tuple[Path, ...] = ()
    left: tuple[str, ...] = ()

    def rows(self, place: Place) -> WeightSource:
        """Return the source of a logical weight's rows, given its place in one of `tensors`."""
        encoding = self.encodings.get(place.tensor.name)
        return StoredRows(place) if encoding is None else encoding.rows(place)

    def fault(self, tensor: TensorSpec) -> str | None:
        """Return why the numbers of a tensor cannot be read, as a predicate; None if they can."""
        if tensor.name in self.encodings or tensor.dtype in FLOATING:
            return None
        return f"has the dtype {tensor.dtype}, which cannot be merged"

    def decoded(self, tensor: TensorSpec) -> tuple[WeightSource, ...]:
        """Return the matrices [out, in] of a tensor with an encoding, in order; none without."""
        encoding = self.encodings.get(tensor.name)
        if encoding is None or 0 in tensor.shape:
            return ()
        height, width = (1, *tensor.shape)[-2:]
        return tuple(
            encoding.rows(Place(tensor, (height, width), first, height, height))
            for first in range(0, math.prod(tensor.shape), height * width)
        )


def by_role(
    base: Checkpoint,
    mllm: Checkpoint,
    experts: Sequence[Checkpoint],
    parents: Mapping[int, Checkpoint],
) -> dict[str, Checkpoint]:
    """Return the checkpoints by role: "base", "mllm" if it is not the base, "expert 1", ...

    The parent of an expert, by the expert's number, is "parent of expert 1".
    """
    numbered = {f"expert {number}": each for number, each in enumerate(experts, 1)}
    roles = {"base": base, **({} if mllm is base else {"mllm": mllm}), **numbered}
    return roles | {f"parent of expert {number}": each for number, each in parents.items()}


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find a checkpoint, and read the headers of its weight files.

    Parameters
    ----------
    source
        A folder with weights, one weight file, or a hub id "org/name" or "org/name@revision".
        If a path of that name exists, it is meant. A hub id is looked up in the local cache, and
        then downloaded unless HF_HUB_OFFLINE is set. If there are both safetensors and PyTorch
        weights, the former are read.

    Raises
    ------
    CheckpointError
        It does not exist, is an adapter or of an unsupported kind, or is unfinished or damaged.
    """
    checkpoint = _open(source, expert=False)
    if checkpoint.adapter is not None:
        raise CheckpointError(
            f"{source}: holds an adapter, not a whole model, which only an expert may be; merge it "
            "into its base first (PEFT's merge_and_unload)."
        )
    return checkpoint


def open_expert(source: str | Path) -> Checkpoint:
    """Open a checkpoint as `open_checkpoint` does, or an adapter in a folder or under a hub id.

    A model with an adapter beside it is what transformers makes of the two: the adapter is added
    to the model's weights.
    """
    return _open(source, expert=True)


def _open(source: str | Path, *, expert: bool) -> Checkpoint:
    name = str(source)
    try:
        path = Path(source).expanduser()
        is_file, is_dir = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: cannot be looked up ({error}); check the path."
        ) from error
    if is_file:
        return _open_file(name, path)
    if is_dir:
        return _open_folder(name, path, None, expert)
    for form in all_forms():
        origin = form.fetch(name)
        if origin is not None:
            return _open_folder(name, origin.folder, origin, expert)
    raise CheckpointError(
        f"{source}: there is no such folder or file, and it is no hub id like org/name; "
        "check the spelling."
    )


def _open_file(source: str, file: Path) -> Checkpoint:
    if file.name.endswith(f"{SAFETENSORS.suffix}.partial"):
        raise unfinished(file)
    return _assemble(source, file.parent, WeightFiles((file,)), None)


def _open_folder(source: str, folder: Path, origin: Origin | None, expert: bool) -> Checkpoint:
    weights = find_weights(folder, weight_names())
    config, file = folder / ADAPTER_CONFIG, adapter_file(folder)
    model = None if weights is None else _assemble(source, folder, weights, origin)
    if not config.exists() or (model is not None and (file is None or not expert)):
        if model is None:
            raise no_weights(folder)
        return model
    if file is None:
        raise CheckpointError(
            f"{folder}: has {ADAPTER_CONFIG} but neither {' nor '.join(ADAPTER_FILES)}; download "
            "the adapter again."
        )
    adapter = _open_adapter(source, folder, file, origin)
    if model is None:
        return adapter
    assert adapter.adapter is not None
    stated = adapter.adapter.base
    if model.config is None or (stated is not None and Path(stated).name != folder.name):
        raise CheckpointError(
            f"{folder}: holds a whole model and an adapter{f' of {shown(stated)}' * bool(stated)}, "
            f"and either may be meant. Pass a copy without {ADAPTER_CONFIG} for the model, and "
            f"one with {file.name} and {ADAPTER_CONFIG} alone for the adapter; if both are "
            "meant together, merge them first (PEFT's merge_and_unload)."
        )
    return replace(
        model,
        files=(*model.files, file),
        configs=(*model.configs, config),
        attached=adapter,
        seen={**model.seen, **adapter.seen},
    )


def _open_adapter(source: str, folder: Path, file: Path, origin: Origin | None) -> Checkpoint:
    config = folder / ADAPTER_CONFIG
    seen = look_at(folder, [checked_file(folder, file)], [checked_file(folder, config)])
    content = _read_config(folder, config, mend="save the adapter again with PEFT")
    found = (form.adapter(config, content) for form in all_forms())
    adapter = next((each for each in found if each is not None), None)
    if adapter is None:
        raise CheckpointError(
            f"{config}: is an adapter of the type {shown(content.get('peft_type'))}, and only "
            "LORA is understood; merge the adapter into its base first (PEFT's merge_and_unload) "
            "and pass the result."
        )
    return Checkpoint(
        source,
        folder,
        MappingProxyType(_read_tensors((file,))),
        None,
        (file,),
        (config,),
        adapter=adapter,
        origin=origin,
        seen=seen,
    )


def _assemble(source: str, folder: Path, weights: WeightFiles, origin: Origin | None) -> Checkpoint:
    file, config = folder / _CONFIG, None
    configs = (file,) if file.is_symlink() or file.exists() else ()
    seen = look_at(folder, weights.files, [checked_file(folder, each) for each in configs])
    if configs:
        config = _read_config(folder, file, mend="download or save the checkpoint again")
    tensors = _read_tensors(weights.files)
    if weights.named is not None:
        tensors = _match_index(folder, tensors, weights)
    own, encodings = _decode(_without_ties(tensors, config), config)
    return Checkpoint(
        source,
        folder,
        MappingProxyType(dict(own)),
        config,
        weights.files,
        configs,
        MappingProxyType(dict(encodings)),
        origin=origin,
        seen=seen,
    )


def _read_tensors(files: tuple[Path, ...]) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for file in files:
        for name, spec in _read_file(file).items():
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


def _read_file(file: Path) -> dict[str, TensorSpec]:
    if file.suffix == SAFETENSORS.suffix:
        return read_header(file)[0]
    for form in all_forms():
        if file.suffix in form.suffixes:
            return form.read(file)
    if file.suffix == ".gguf":
        raise CheckpointError(f"{file}: {GGUF}")
    raise CheckpointError(
        f"{file}: is not a .safetensors file, nor a PyTorch .bin; pass one, or the checkpoint's "
        "folder."
    )


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
        if name not in named and not name.endswith(COMPUTED):
            raise CheckpointError(
                f"{spec.file}: holds tensor {shown(name)}, which {weights.index} does not name; "
                "the index and the shards are of different saves, so download the checkpoint again."
            )
    return {name: spec for name, spec in tensors.items() if name in named}


def language_configs(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return config.json, and its parts down to that of the language model, which is last.

    Flags of the language model may stand in any of them.
    """
    found: list[Mapping[str, Any]] = [config or {}]
    for key in _TEXT_CONFIGS:
        inner = found[-1].get(key)
        if isinstance(inner, dict):
            found.append(inner)
    return found


def _without_ties(
    tensors: dict[str, TensorSpec], config: Mapping[str, Any] | None
) -> dict[str, TensorSpec]:
    """Leave out a head that shares the embedding's stored bytes, if the config ties the two.

    A PyTorch file names shared bytes twice. Transformers writes them once, under the embedding's
    name, and so does the output. Other shared bytes stay under each of their names.
    """
    if not any(part.get("tie_word_embeddings") for part in language_configs(config)):
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


def _decode(
    tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
) -> tuple[Mapping[str, TensorSpec], Mapping[str, Encoding]]:
    """Return the model's own tensors, and the encodings of those that have one."""
    stated = [
        part.get(key)
        for part in [config or {}, *(v for v in (config or {}).values() if isinstance(v, dict))]
        for key in ("quantization_config", "compression_config")
    ]
    settings = [each for each in stated if isinstance(each, dict) and each]
    if not settings and all(spec.dtype in _PLAIN_DTYPES for spec in tensors.values()):
        return tensors, {}
    for form in all_forms():
        form.check(tensors, settings)
    encodings: dict[str, Encoding] = {}
    for form in all_forms():
        tensors, found = form.decode(tensors, settings)
        encodings |= found
    return tensors, encodings


def _read_config(folder: Path, file: Path, *, mend: str) -> Mapping[str, Any]:
    config = read_object(
        checked_file(folder, file), limit=_MAX_CONFIG, what="config", mend=mend, unique=False
    )
    return MappingProxyType(config)
