"""Whether our methods and mergekit's of the same name give the same numbers.

    python bench/parity.py [--environment FOLDER] [--size tiny]

mergekit 0.1.5 is installed into an environment of its own, as for `peers.py`. Both merge the same
three text models in float32. Compared are the matrices that we merge; mergekit merges the rest of
the model too. The rules differ in two points. Where it keeps int(density n) entries of n, we keep
round(density n): the densities here make these equal. Of the entries whose magnitude is that of the
smallest that is kept it keeps some, and we keep all: these are left out, and counted.

Asserted: no other entry differs by more than `BOUND` units in the last place of its matrix' largest
entry.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peers import environment
from safetensors.torch import load_file
from synthetic import SIZES, Recipe, write_triple

from lean_merge import Expert, MergeRecipe, Resources, merge

BOUND = 2.0
Model = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A method with its parameters in both programs' words.

    Attributes
    ----------
    method
        Its name in both.
    theirs, text, expert
        mergekit's parameters: common ones, those of the MLLM's language model, and the expert's.
    ours
        Ours.
    """

    method: str
    theirs: dict[str, Any]
    text: dict[str, Any]
    expert: dict[str, Any]
    ours: dict[str, Any]


CASES = (
    Case(
        "task_arithmetic",
        {"lambda": 1.0},
        {"weight": 0.3},
        {"weight": 0.3},
        {"symmetric": True, "scale": 0.3},
    ),
    Case(
        "ties",
        {"lambda": 1.0, "normalize": True},
        {"weight": 1.0, "density": 0.25},
        {"weight": 1.0, "density": 0.25},
        {"density": 0.25},
    ),
    Case(
        "ties",
        {"lambda": 0.6, "normalize": True},
        {"weight": 1.3, "density": 0.5},
        {"weight": 0.7, "density": 0.5},
        {"density": 0.5, "mllm_weight": 1.3, "weight": 0.7, "scale": 0.6},
    ),
    Case(
        "ties",
        {"lambda": 1.0, "normalize": True},
        {"weight": 1.0, "density": 1.0},
        {"weight": 1.0, "density": 1.0},
        {"density": 1.0},
    ),
)


def theirs(commands: Path, models: dict[str, Path], out: Path, case: Case) -> Path:
    """The folder of what mergekit writes."""
    config = out.with_suffix(".yml")
    config.write_text(
        yaml.safe_dump(
            {
                "merge_method": case.method,
                "base_model": str(models["base"]),
                "models": [
                    {"model": str(models["text"]), "parameters": case.text},
                    {"model": str(models["expert"]), "parameters": case.expert},
                ],
                "parameters": case.theirs,
                "dtype": "float32",
            }
        )
    )
    command = [str(commands / "mergekit-yaml"), str(config), str(out)]
    command += ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return out


def ours(models: dict[str, Path], out: Path, case: Case) -> Path:
    """The folder of what we write."""
    recipe = MergeRecipe(
        str(models["base"]),
        str(models["text"]),
        (Expert(str(models["expert"])),),
        merge_method=case.method,
        parameters=tuple(case.ours.items()),
    )
    merge(recipe, out, resources=Resources(device="cpu"))
    return out


def tensors(folder: Path) -> Model:
    """All of a checkpoint."""
    found: Model = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


@dataclass(frozen=True, slots=True)
class Compared:
    """How two merges of the same models differ.

    Attributes
    ----------
    entries, edge, equal : int
        How many were compared, how many were left out, and how many have the same bits.
    apart : float
        The largest difference, in units in the last place of its matrix' largest entry.
    """

    entries: int
    edge: int
    equal: int
    apart: float


def compare(models: dict[str, Model], one: Model, other: Model, density: float) -> Compared:
    """Compare the matrices of the layers."""
    base = models["base"]
    names = [name for name in base if ".layers." in name and base[name].dim() == 2]
    entries = edge = equal = 0
    apart = 0.0
    for name in names:
        differs = (one[name].double() - other[name].double()).abs()
        compared = torch.ones_like(differs, dtype=torch.bool)
        for role in ("text", "expert") if density < 1 else ():
            magnitude = (models[role][name] - base[name]).abs()
            dropped = magnitude.numel() - round(density * magnitude.numel())
            compared &= magnitude != magnitude.flatten().kthvalue(dropped + 1).values
        entries += int(compared.sum())
        edge += int((~compared).sum())
        equal += int((differs[compared] == 0).sum())
        unit = torch.finfo(torch.float32).eps * float(other[name].abs().max()) / 2
        apart = max(apart, float(differs[compared].max()) / unit)
    return Compared(entries, edge, equal, apart)


def main() -> None:
    """Parse the arguments, install, merge by both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--environment", type=Path, help="where mergekit is, or is to be kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        scratch = Path(folder)
        commands = environment(arguments.environment or scratch / "environment")
        recipe = Recipe(dtype=torch.float32)
        folders = write_triple(scratch / "in", SIZES[arguments.size], recipe, text=True)
        models = {role: tensors(folders[role]) for role in ("base", "text", "expert")}
        print("| method | ours | entries | at the edge | same bits | largest difference, units |")
        print("|---|---|---|---|---|---|")
        worst = 0.0
        for number, case in enumerate(CASES):
            one = tensors(ours(folders, scratch / f"ours{number}", case))
            other = tensors(theirs(commands, folders, scratch / f"theirs{number}", case))
            found = compare(models, one, other, case.ours.get("density", 1.0))
            worst = max(worst, found.apart)
            words = ", ".join(f"{name} {value}" for name, value in case.ours.items())
            share = found.equal / found.entries
            counts = f"{found.entries} | {found.edge} | {share:.2%}"
            print(f"| {case.method} | {words} | {counts} | {found.apart:.2f} |", flush=True)
    assert worst <= BOUND, f"{worst} units are more than {BOUND}"


if __name__ == "__main__":
    main()
