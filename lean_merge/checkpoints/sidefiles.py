"""Find a model's files other than weights: configuration, tokenizer, processor, remote code."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.identity import look_at
from lean_merge.checkpoints.safepaths import checked_file
from lean_merge.errors import CheckpointError, is_plain, shown

# The names that libraries give to a model's weights, whole or in shards, and to their variants.
_WEIGHTS = re.compile(
    r"(pytorch_|tf_|flax_|rust_)?model(\.[\w-]+)?(-\d+-of-\d+)?(\.\w+)?"
    r"\.(safetensors|bin|h5|msgpack|ot)(\.index(\.\w+)?\.json)?"
    r"|(pytorch_)?model\.(pt|pth|ckpt|npz|onnx|onnx_data|tflite|keras|pdparams)"
    r"|consolidated(\.\d+)?\.(safetensors|pth|pt)(\.index\.json)?"
    r"|.*\.(gguf|ggml|partial)",
    re.IGNORECASE,
)
_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler)(_\d+)?\.(pt|pth|bin)|training_args\.bin|trainer_state\.json"
    r"|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|(bf16_)?zero_pp_rank_.*|mp_rank_.*"
)
_INDEX = re.compile(r".*\.index(\.\w+)?\.json", re.IGNORECASE)
_OWN = re.compile(r"lean[_-]merge.*|readme\.md|\..*", re.IGNORECASE)
_TEMPLATES = "additional_chat_templates"
_TOKENIZERS = re.compile(r"(tokenizer|vocab|merges|spiece|tekken).*", re.IGNORECASE)
_LONGEST_NAME = 255
_MOST_NAMED = 8
README = "README.md"


def comes_along(name: str) -> bool:
    """Tell whether a file of this name belongs beside a model's weights.

    Weights under the names of any library do not, since they are those of the model before it was
    merged, and neither does the state of a training.
    """
    return not any(pattern.fullmatch(name) for pattern in (_WEIGHTS, _TRAINING, _OWN))


def side_files(
    mllm_path: Path, own: Collection[Path] = ()
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the files that come along with the MLLM's weights, and the names of what is left out.

    Not named are the weights that were read (`own`) and their index, the README, because the output
    has its own, hidden files, and what an earlier run of this program wrote.

    Raises
    ------
    CheckpointError
        The folder cannot be listed, or a file cannot be copied: it is a link out of the folder, no
        regular file, or has a name that cannot be written down.
    """
    readme, templates = mllm_path / README, mllm_path / _TEMPLATES
    try:
        entries = sorted(mllm_path.iterdir())
        inner = sorted(templates.iterdir()) if templates.is_dir() else []
    except OSError as error:
        raise CheckpointError(
            f"{mllm_path}: cannot be listed ({error.strerror}); check the path and its rights."
        ) from error
    copied, left, read = [], [], set(own)
    for each in (*entries, *inner):
        if each in read or each == templates or _OWN.fullmatch(each.name):
            continue
        if comes_along(each.name) and (each.is_symlink() or not each.is_dir()):
            copied.append(each)
        elif not _INDEX.fullmatch(each.name):
            left.append(each.name)
    for each in (*copied, *[readme] * readme.exists()):
        checked_file(mllm_path, each)
        if not is_plain(each.name):
            raise CheckpointError(
                f"{mllm_path}: file {shown(each.name)} has a name with control characters, or that "
                "is not valid Unicode; rename it."
            )
    return tuple(sorted(copied)), tuple(left)


def with_side_files(mllm: Checkpoint) -> Checkpoint:
    """Return the MLLM with what comes along with its weights. Raises as `side_files`."""
    files, left = side_files(mllm.path, mllm.files)
    readme = mllm.path / README
    seen = look_at(mllm.path, [], [*files, *[readme] * readme.exists()])
    return replace(mllm, beside=files, left=left, seen={**seen, **mllm.seen})


def left_out(mllm: Checkpoint) -> list[str]:
    """Return a sentence that names what lies beside the MLLM's weights and is not copied."""
    if not mllm.left:
        return []
    names = ", ".join(map(shown, mllm.left[:_MOST_NAMED])) + ", ..." * (
        len(mllm.left) > _MOST_NAMED
    )
    return [
        f"{len(mllm.left)} entries of the MLLM's folder are not copied, since they are folders, "
        f"other copies of its weights, or the state of a training: {names}"
    ]


def missing_from_cache(mllm: Checkpoint) -> list[str]:
    """Return a sentence if a hub repository's snapshot in the local cache holds no tokenizer.

    That happens when only a model was loaded before, because a snapshot with all its weights is
    used without asking the hub for other files.
    """
    if mllm.origin is None:
        return []
    if any(_TOKENIZERS.fullmatch(file.name) for file in mllm.beside):
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
    files = [each.name for each in mllm.beside if each.suffix.lower() == ".py"]
    referred = (mllm.config or {}).get("auto_map")
    entries = referred.values() if isinstance(referred, dict) else []
    elsewhere = {
        name
        for entry in entries
        for name in (entry if isinstance(entry, list) else [entry])
        if isinstance(name, str) and "--" in name and is_plain(name) and len(name) <= _LONGEST_NAME
    }
    return (*files, *sorted(elsewhere))
