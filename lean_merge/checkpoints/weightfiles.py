"""Find a folder's files with the model's weights, by their names and indices alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, is_plain, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
GGUF = "GGUF weights are quantised and cannot be merged; pass the original safetensors checkpoint."
_MAX_INDEX = 100_000_000
_MAX_FILE_NAME = 255
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The names of weight files in one form.

    Attributes
    ----------
    single
        The name of a file that holds all the weights. The index has that name with ".index.json"
        added, and shards have "-00001-of-00003" before the suffix.
    only_these
        Whether other files with that suffix, such as optimizer.bin, are not weights.
    """

    single: str
    only_these: bool = False

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    @property
    def suffix(self) -> str:
        return f".{self.single.partition('.')[2]}"

    @property
    def numbered(self) -> re.Pattern[str]:
        """Return the pattern of a shard's name."""
        stem = re.escape(self.single.removesuffix(self.suffix)) if self.only_these else ".+"
        shard = r"-(?P<number>\d{5})-of-(?P<count>\d{5})"
        return re.compile(rf"(?P<stem>{stem}){shard}{re.escape(self.suffix)}")


SAFETENSORS = WeightNames(SINGLE)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files with a model's weights.

    Attributes
    ----------
    files
        The files in the order of their names.
    index
        The name of the index that lists them; None if there is none.
    named
        For each tensor, the name of its file, as the index states it.
    """

    files: tuple[Path, ...]
    index: str | None = None
    named: Mapping[str, str] | None = None


def find_weights(folder: Path, forms: Iterable[WeightNames]) -> WeightFiles | None:
    """Return the weight files of a model's folder in the first form that is there, if any is.

    An adapter's files are not among them.

    Raises
    ------
    CheckpointError
        Some are missing, or it cannot be told which belong to the model.
    """
    names = _names(folder)
    for form in forms:
        found = _in_form(folder, names, form)
        if found is not None:
            for file in found.files:
                checked_file(folder, file)
            return found
    return None


def no_weights(folder: Path) -> CheckpointError:
    """Return the error for a folder that holds neither a model's weights nor an adapter."""
    return CheckpointError(f"{folder}: {_why_none(folder, _names(folder))}")


def _names(folder: Path) -> list[str]:
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be listed ({error.strerror}); check its rights."
        ) from error
    return sorted(names - set(ADAPTER_FILES))


def _in_form(folder: Path, names: list[str], form: WeightNames) -> WeightFiles | None:
    if form.index in names:
        named = read_index(folder / form.index)
        if form.single in names and form.single not in named.values():
            raise CheckpointError(
                f"{folder}: holds {form.single} and an {form.index} that names other files; remove "
                "the one that is left over from an older save."
            )
        files = tuple(folder / name for name in sorted(set(named.values())))
        return WeightFiles(files, form.index, named)
    if form.single in names:
        return WeightFiles((folder / form.single,))
    if any(name.endswith((f"{form.suffix}.partial", f"{form.index}.partial")) for name in names):
        raise unfinished(folder)
    weights = [name for name in names if name.endswith(form.suffix)]
    if form.only_these:
        weights = [name for name in weights if form.numbered.fullmatch(name)]
    if len(weights) == 1 and not form.numbered.fullmatch(weights[0]):
        return WeightFiles((folder / weights[0],))
    if not weights:
        return None
    _check_numbered(folder, weights, form)
    return WeightFiles(tuple(folder / name for name in weights))


def unfinished(path: Path) -> CheckpointError:
    """Return the error for an output that is not complete."""
    return CheckpointError(
        f"{path}: is an unfinished lean-merge output (*.partial); run the merge again to finish it."
    )


def adapter_file(folder: Path) -> Path | None:
    """Return the file with an adapter's tensors, if there is one."""
    files = (folder / name for name in ADAPTER_FILES)
    return next((file for file in files if file.exists()), None)


def _why_none(folder: Path, names: list[str]) -> str:
    if (adapter := adapter_file(folder)) is not None:
        return f"has {adapter.name} but no {ADAPTER_CONFIG}; download the adapter again."
    if any(name.endswith(".gguf") for name in names):
        return GGUF
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    if others:
        return (
            f"holds no model.safetensors or pytorch_model.bin, and {others[0]} is none that is "
            "read from a folder; save the checkpoint with transformers' save_pretrained."
        )
    return "holds no .safetensors weights and no pytorch_model.bin; pass a checkpoint's folder."


def _check_numbered(folder: Path, weights: list[str], form: WeightNames) -> None:
    """Raise CheckpointError unless the files are all the shards of one model."""
    matches = [form.numbered.fullmatch(name) for name in weights]
    groups = {(match["stem"], match["count"]) if match else None for match in matches}
    if len(groups) != 1 or None in groups:
        raise CheckpointError(
            f"{folder}: holds several weight files ({', '.join(weights[:4])}, ...) and no "
            f"{form.index} that says which belong to the model; pass one file or add the index."
        )
    present = {int(match["number"]) for match in matches if match}
    count = int(next(match["count"] for match in matches if match))
    # The count comes from a file name, so nothing may be allocated by it.
    if present != set(range(1, len(weights) + 1)) or len(weights) != count:
        raise CheckpointError(
            f"{folder}: holds {len(weights)} of the {count} shards that their names announce and "
            f"no {form.index}; download the missing ones."
        )


def read_index(file: Path) -> dict[str, str]:
    """Return the weight map of an index file: tensor name -> name of a file in the same folder.

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
    suffix = f".{file.name.split('.')[1]}"
    for tensor, name in named.items():
        plain = isinstance(name, str) and is_plain(name) and not re.search(r"[/\\:]", name)
        if (
            not plain
            or len(name) > _MAX_FILE_NAME
            or not name.endswith(suffix)
            or name.startswith(".")
        ):
            raise CheckpointError(
                f"{file}: puts tensor {shown(tensor)} into {shown(name)}, which is not "
                f"the name of a {suffix} file in this folder; {mend}."
            )
    return named
