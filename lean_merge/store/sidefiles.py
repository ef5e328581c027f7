"""Everything of the MLLM that is not weights: configuration, tokenizer, processor, remote code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.dtypes import torch_dtype
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, is_plain
from lean_merge.store.folder import OutputFolder

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|msgpack|h5|keras|ot|npz|npy|pkl"
    r"|pickle|tflite|pdparams|partial)(\.index(\.\w+)?\.json)?",
    re.IGNORECASE,
)
_OWN = re.compile(r"lean[_-]merge.*", re.IGNORECASE)
_TEMPLATES = "additional_chat_templates"
_QUANTISATION = ("quantization_config", "compression_config")
# Beside config.json ModelOpt says it again, and vLLM goes by it.
_QUANTISATION_FILE = "hf_quant_config.json"
_MAX_CONFIG = 10_000_000
_TOKENIZERS = re.compile(r"(tokenizer|vocab|merges|spiece|tekken).*", re.IGNORECASE)
_PART = 1 << 20
_LONGEST_NAME = 255


def side_files(mllm_path: Path) -> tuple[Path, ...]:
    """Return the files that come along with the MLLM's weights, sorted by name.

    Left out are weights of every kind and their indices, the README (the output has its own),
    hidden files, and what an earlier run of this program wrote.

    Raises
    ------
    CheckpointError
        The folder cannot be listed, or a file is a link out of it.
    """
    try:
        files = [each for each in mllm_path.iterdir() if _comes_along(each)]
        templates = mllm_path / _TEMPLATES
        if templates.is_dir():
            files += [each for each in templates.iterdir() if _comes_along(each)]
    except OSError as error:
        raise CheckpointError(
            f"{mllm_path}: cannot be listed ({error.strerror}); check the path and its rights."
        ) from error
    return tuple(checked_file(mllm_path, each) for each in sorted(files))


def _comes_along(file: Path) -> bool:
    name = file.name
    if name.startswith(".") or name.lower() == "readme.md":
        return False
    if _WEIGHTS.fullmatch(name) or _OWN.fullmatch(name):
        return False
    return file.is_symlink() or file.is_file()


def missing_from_cache(mllm: Checkpoint) -> list[str]:
    """Return a sentence if a hub repository's snapshot in the local cache holds no tokenizer.

    So it is after loading a model alone, and a snapshot with all its weights is used without asking
    the hub for what else there is.
    """
    if mllm.origin is None:
        return []
    if any(_TOKENIZERS.fullmatch(file.name) for file in side_files(mllm.path)):
        return []
    return [
        f"The snapshot of {mllm.source} in the local cache has no tokenizer, and so the output has "
        "none; fetch tokenizer and processor into the cache first, or save them into the output."
    ]


def copy_side_files(
    mllm_path: Path, folder: OutputFolder, *, out_dtype: str | None, decoded: str | None = None
) -> tuple[str, ...]:
    """Copy the MLLM's side files into the output, as data, and return their names.

    Parameters
    ----------
    mllm_path
        The MLLM's folder.
    folder
        The output.
    out_dtype
        What the weights were converted to, as "BF16" or "bfloat16": config.json then says so. None
        copies config.json byte for byte.
    decoded
        The dtype without an `out_dtype`, if quantised weights of the MLLM were written as plain
        numbers: no file then says any longer how they are quantised. None if there were none.

    Raises
    ------
    CheckpointError
        A file cannot be read or is a link out of the folder.
    OutputError, BudgetError
        A file cannot be written.
    ValueError
        There is no such `out_dtype`.
    """
    names = []
    for file in side_files(mllm_path):
        name = file.relative_to(mllm_path).as_posix()
        if decoded and name == _QUANTISATION_FILE:
            continue
        if name == "config.json" and (out_dtype is not None or decoded):
            folder.write_file(name, _rewritten(file, out_dtype, decoded))
        else:
            folder.write_file(name, _parts(file))
        names.append(name)
    return tuple(names)


def _parts(file: Path) -> Iterator[bytes]:
    """Yield a file's bytes, a little at a time, as many as it has when it is opened."""
    try:
        with open(file, "rb") as stream:
            for start in range(0, size := os.fstat(stream.fileno()).st_size, _PART):
                yield stream.read(min(_PART, size - start))
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}); check its rights."
        ) from error


def remote_code(mllm: Checkpoint) -> tuple[str, ...]:
    """Name the code that the MLLM brings along or points to: transformers run it if it is trusted.

    These are its *.py files, which are copied as data and never imported, and the references to
    other repositories in its configuration's `auto_map`.
    """
    files = [each.name for each in side_files(mllm.path) if each.suffix.lower() == ".py"]
    referred = (mllm.config or {}).get("auto_map")
    entries = referred.values() if isinstance(referred, dict) else []
    elsewhere = {
        name
        for entry in entries
        for name in (entry if isinstance(entry, list) else [entry])
        if isinstance(name, str) and "--" in name and is_plain(name) and len(name) <= _LONGEST_NAME
    }
    return (*files, *sorted(elsewhere))


def _config_word(dtype: str) -> str:
    words = {name: str(torch_dtype(name)).removeprefix("torch.") for name in ("F16", "BF16", "F32")}
    if dtype in words.values():
        return dtype
    if dtype not in words:
        raise ValueError(f"{dtype!r} is not a dtype of an output; write one of {sorted(words)}.")
    return words[dtype]


def _rewritten(file: Path, out_dtype: str | None, decoded: str | None) -> bytes:
    mend = "download or save the checkpoint again"
    config = read_object(file, limit=_MAX_CONFIG, what="config", mend=mend, unique=False)
    if decoded is not None:
        for part in (config, *(v for v in config.values() if isinstance(v, dict))):
            for key in _QUANTISATION:
                part.pop(key, None)
        _set_dtype(config, _config_word(decoded), only="float8")
    if out_dtype is not None and not _set_dtype(config, word := _config_word(out_dtype)):
        config["dtype"] = word
    # As ASCII, since a text may hold half of a surrogate pair, which UTF-8 cannot.
    return (json.dumps(config, indent=2) + "\n").encode("ascii")


def _set_dtype(config: dict[str, Any], dtype: str, *, only: str = "") -> bool:
    """Set what `config` and its nested configs say of a dtype; return whether `config` itself did.

    Values that do not begin with `only` stay as they are.
    """
    stated = [key for key in ("torch_dtype", "dtype") if key in config]
    stated = [key for key in stated if str(config[key]).startswith(only)]
    config.update(dict.fromkeys(stated, dtype))
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            _set_dtype(value, dtype, only=only)
    return bool(stated)
