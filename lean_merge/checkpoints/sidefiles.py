"""Find a model's files other than weights: configuration, tokenizer, processor, remote code."""

from __future__ import annotations

import re
from pathlib import Path

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, is_plain

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|msgpack|h5|keras|ot|npz|npy|pkl"
    r"|pickle|tflite|pdparams|partial)(\.index(\.\w+)?\.json)?",
    re.IGNORECASE,
)
_OWN = re.compile(r"lean[_-]merge.*", re.IGNORECASE)
_TEMPLATES = "additional_chat_templates"
_TOKENIZERS = re.compile(r"(tokenizer|vocab|merges|spiece|tekken).*", re.IGNORECASE)
_LONGEST_NAME = 255


def side_files(mllm_path: Path) -> tuple[Path, ...]:
    """Return the files that come along with the MLLM's weights, sorted by name.

    Weights of every kind, their indices, the README (the output has its own), hidden files, and
    files that an earlier run of this program wrote are left out.

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

    That happens when only a model was loaded before, because a snapshot with all its weights is
    used without asking the hub for other files.
    """
    if mllm.origin is None:
        return []
    if any(_TOKENIZERS.fullmatch(file.name) for file in side_files(mllm.path)):
        return []
    return [
        f"The snapshot of {mllm.source} in the local cache has no tokenizer, and so the output has "
        "none; fetch tokenizer and processor into the cache first, or save them into the output."
    ]


def remote_code(mllm: Checkpoint) -> tuple[str, ...]:
    """Return the code that comes with the MLLM, which transformers runs if it is trusted.

    The result names its *.py files, which are copied as data and never imported, and the references
    to other repositories in its configuration's `auto_map`.
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
