"""Name the modules of an adapter as a loader names them once it has loaded the MLLM.

The loader's own rules say it where they can be had (`loading`), and the names of the files where
not. A tensor that no adapter would change is refused here, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lean_merge.checkpoints import Checkpoint
from lean_merge.errors import RecipeError
from lean_merge.mapping import MappedWeight
from lean_merge.outputs.loading import ask

RowRuns = tuple[tuple[int, int, int], ...]
"""Runs of rows as (first row here, first row there, count)."""
_ALONE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from lean_merge.outputs.loading import answer_stdin; answer_stdin()"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a stored tensor that become rows of the module's weight."""

    module: str
    runs: RowRuns


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of the tensors in scope, and the places of their rows in them.

    Attributes
    ----------
    pieces
        The parts of each tensor, by its name.
    sizes
        (out, in) of each module.
    beside
        Other modules that PEFT would take for these, since their names end alike.
    task
        PEFT's type of task; None for a class that generates no text.
    notes
        Sentences for people.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    sizes: Mapping[str, tuple[int, int]]
    beside: tuple[str, ...] = ()
    task: str | None = "CAUSAL_LM"
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what decides an adapter's names and rows."""
        known = {name: [[p.module, p.runs] for p in each] for name, each in self.pieces.items()}
        text = json.dumps([known, dict(self.sizes), self.beside, self.task], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def modules_of(mllm: Checkpoint, weights: Sequence[MappedWeight]) -> Modules:
    """Return the modules of all weights in scope.

    Raises
    ------
    RecipeError
        A loader would not apply an update of one of them; or it cannot build the MLLM.
    """
    wanted = [weight.mllm.name for weight in weights]
    found: dict[str, Any] = {"unknown": "the MLLM has no config.json"}
    if mllm.config is not None and not mllm.config.get("architectures"):
        found = {"unknown": "its config.json names no class under architectures"}
    elif mllm.config is not None:
        shapes = {name: list(spec.shape) for name, spec in mllm.tensors.items()}
        found = _asked({"config": dict(mllm.config), "shapes": shapes, "wanted": wanted})
    if "failed" in found:
        raise RecipeError(
            f"{mllm.source}: no adapter can be made, for {found['failed']}; correct the config, "
            "install what it asks for, or write --output checkpoint."
        )
    if "unknown" in found:
        return _as_files_name_them(weights, found["unknown"])
    _refuse(weights, found["refused"])
    pieces = {
        name: tuple(Piece(module, tuple(map(tuple, runs))) for module, runs in each)
        for name, each in found["pieces"].items()
    }
    sizes = {name: (out, into) for name, (out, into) in found["sizes"].items()}
    return Modules(pieces, sizes, tuple(found["beside"]), found["task"])


def _as_files_name_them(weights: Sequence[MappedWeight], reason: str) -> Modules:
    faults = {}
    for weight in weights:
        name = weight.mllm.name
        if ".experts." in name or len(weight.mllm.shape) != 2:
            faults[name] = (
                "transformers stacks the experts of a mixture when it loads them, each with a rank "
                "of its own"
            )
        elif not name.endswith(".weight"):
            faults[name] = "it is not the weight of a module"
    _refuse(weights, faults)
    pieces, sizes = {}, {}
    for weight in weights:
        module = weight.mllm.name.removesuffix(".weight")
        rows, columns = weight.mllm.shape
        pieces[weight.mllm.name] = (Piece(module, ((0, 0, rows),)),)
        sizes[module] = (rows, columns)
    note = (
        f"the adapter's modules are named as the MLLM's files name them, since {reason}; where a "
        "loader renames modules, look whether it applies them all"
    )
    return Modules(pieces, sizes, notes=(note,))


def _refuse(weights: Sequence[MappedWeight], faults: Mapping[str, str]) -> None:
    """Raise RecipeError if there are faults, and name what leaves these tensors out."""
    if not faults:
        return
    refused = [weight for weight in weights if weight.mllm.name in faults]
    kinds: dict[str, None] = {}
    for part in (part for weight in refused for part in weight.slices):
        inside = re.sub(r"^layers\.\d+\.", "", part.canonical)
        # "mlp.experts" leaves shared experts in.
        parent, experts, _ = inside.partition(".experts.")
        kinds[f"{parent}.experts" if experts else inside] = None
    pattern = "|".join(kinds)
    # One tensor stands for those of all layers and experts.
    examples: dict[str, str] = {}
    for name in (weight.mllm.name for weight in refused):
        examples.setdefault(re.sub(r"\d+", "", faults[name]), name)
    first = "; nor ".join(f"{name}, since {faults[name]}" for name in [*examples.values()][:3])
    raise RecipeError(
        f"An adapter cannot hold {first}. Leave the {len(refused)} tensors of this kind out with "
        f"--exclude '{pattern}', or write a checkpoint."
    )


def rows_inside(runs: Sequence[tuple[int, int]], piece: RowRuns) -> RowRuns:
    """Return the rows of a weight in the module that a piece of its tensor lies in.

    Parameters
    ----------
    runs
        (first, count) of the tensor's rows, which are counted through, in this order, from 0.
    piece
        (row of the tensor, row of the module, count).

    Returns
    -------
    tuple of (int, int, int)
        (row counted from 0, row of the module, count), without the rows that lie elsewhere.
    """
    ordered = sorted(piece)
    starts = [first for first, _, _ in ordered]
    found, done = [], 0
    for first, count in runs:
        index = max(0, bisect_right(starts, first) - 1)
        while index < len(ordered) and starts[index] < first + count:
            here, there, length = ordered[index]
            low, high = max(first, here), min(first + count, here + length)
            if low < high:
                found.append((done + low - first, there + low - here, high - low))
            index += 1
        done += count
    return tuple(found)


# --- asking -------------------------------------------------------------------------------------

_ANSWERS: dict[str, dict[str, Any]] = {}
"""The last answer by the digest of its question, because a merge plans more than once."""


def _asked(question: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(question).encode()
    key = hashlib.sha256(text).hexdigest()
    if key not in _ANSWERS:
        if not find_spec("transformers"):
            return {"unknown": "transformers is not installed"}
        # Where transformers is at work already, it costs nothing to ask it here; elsewhere its
        # memory and its settings are kept out of this process.
        found = ask(**question) if "transformers" in sys.modules else _asked_alone(text)
        _ANSWERS.clear()
        _ANSWERS[key] = found
    return _ANSWERS[key]


def _asked_alone(question: bytes) -> dict[str, Any]:
    """Ask in a process of its own, and return the answer."""
    root = str(Path(__file__).parents[2])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ALONE, root],
            input=question,
            capture_output=True,
            env={**os.environ, **offline},
            check=False,
        )
        found: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        raise RecipeError(
            "transformers could not be asked for the names of the MLLM's modules "
            f"({type(error).__name__}); see whether python -c 'import transformers' works, or "
            "write --output checkpoint."
        ) from error
    return found


__all__ = ["Modules", "Piece", "RowRuns", "modules_of", "rows_inside"]
