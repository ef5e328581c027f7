"""Write the files beside the weights of a merge: recipe, report, and the MLLM's side files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lean_merge.checkpoints import Checkpoint, torch_dtype
from lean_merge.checkpoints.jsonfile import read_object, to_json
from lean_merge.checkpoints.safepaths import open_regular
from lean_merge.checkpoints.sidefiles import remote_code
from lean_merge.errors import CheckpointError
from lean_merge.methods import all_methods, canonical_name
from lean_merge.outputs.base import RECIPE, REPORT, Outcome, Output
from lean_merge.outputs.card import CardFacts, front_matter_of
from lean_merge.outputs.summary import SUMMARY, summary_lines
from lean_merge.store import OutputFolder

_QUANTISATION = ("quantization_config", "compression_config")
# ModelOpt states it again in this file beside config.json, and vLLM reads it there.
_QUANTISATION_FILE = "hf_quant_config.json"
_MAX_CONFIG = 10_000_000
_PART = 1 << 20


def write_report(output: Output, folder: OutputFolder, outcome: Outcome) -> None:
    """Write recipe and report, and for a merge its summary. Raises OutputError, BudgetError."""
    folder.write_file(RECIPE, output.recipe.to_yaml().encode())
    if output.in_recipes:
        folder.write_file(SUMMARY, ("\n".join(summary_lines(outcome.report)) + "\n").encode())
    folder.write_file(REPORT, to_json({**outcome.report}))


def card_facts(output: Output, outcome: Outcome) -> CardFacts:
    """Return the facts that every card states. Raises CheckpointError."""
    counts = outcome.report["counts"]
    told = (
        f"{counts['merged']} weights of the language model were merged, {counts['unchanged']} were "
        f"in scope but kept as they were, and {counts['copied']} tensors out of scope are copied "
        f"byte for byte. `{REPORT}` tells for each weight what was decided and why."
        if output.writes_rows
        else f"The adapter has an update for {counts['merged']} weights of the language model, and "
        f"none for {counts['unchanged']} others in scope. `{REPORT}` tells for each weight what "
        "was decided and why."
    )
    lines = "\n".join(summary_lines(outcome.report))
    method = all_methods()[canonical_name(output.recipe.merge_method)]
    return CardFacts(
        recipe=output.recipe,
        config=output.mllm.config or {},
        front=front_matter_of(output.mllm.path),
        reference=method.reference,
        summary=f"{told}\n\n```text\n{lines}\n```",
    )


def code_warnings(mllm: Checkpoint) -> list[str]:
    """Warn that the MLLM brings code, which this program has not checked."""
    code = remote_code(mllm)
    told = ", ".join(code[:4]) + (", ..." if len(code) > 4 else "")
    if not code:
        return []
    return [
        f"the MLLM brings code of its own ({told}); it was copied as data and not run, and is run "
        "by whoever loads the output with trust_remote_code=True"
    ]


def copy_side_files(
    mllm_path: Path,
    files: Iterable[Path],
    folder: OutputFolder,
    *,
    out_dtype: str | None,
    decoded: str | None = None,
) -> tuple[str, ...]:
    """Copy the MLLM's side files into the output, as data, and return their names.

    Parameters
    ----------
    mllm_path, files
        The MLLM's folder, and those of its files that are copied.
    folder
        The output.
    out_dtype
        The dtype that the weights were converted to, as "BF16" or "bfloat16", which config.json
        then states. None copies config.json byte for byte.
    decoded
        The dtype, without an `out_dtype`, of the MLLM's quantised weights, which were written as
        plain numbers; the files then no longer say how they are quantised. None if it has none.

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
    for file in files:
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
    """Yield a file's bytes a few at a time, up to the length that it has when it is opened."""
    try:
        with open_regular(file) as stream:
            for start in range(0, size := os.fstat(stream.fileno()).st_size, _PART):
                yield stream.read(min(_PART, size - start))
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}); check its rights."
        ) from error


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
    # It is written as ASCII, because a text may hold half of a surrogate pair, which UTF-8 cannot.
    return (json.dumps(config, indent=2) + "\n").encode("ascii")


def _set_dtype(config: dict[str, Any], dtype: str, *, only: str = "") -> bool:
    """Set the dtype in `config` and in nested configs; return whether `config` itself has one.

    Values that do not begin with `only` stay as they are.
    """
    stated = [key for key in ("torch_dtype", "dtype") if key in config]
    stated = [key for key in stated if str(config[key]).startswith(only)]
    config.update(dict.fromkeys(stated, dtype))
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            _set_dtype(value, dtype, only=only)
    return bool(stated)
