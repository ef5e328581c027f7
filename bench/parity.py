"""Whether our methods and mergekit's of the same name give the same numbers, from the same recipe.

    python bench/parity.py [--environment FOLDER] [--size tiny]

mergekit 0.1.5 is installed into an environment of its own, as for `peers.py`. Both programs merge
the same three text models from recipes in mergekit's words: models and results in float32, and
models and results in bfloat16 with arithmetic in float32. Compared is every tensor.

The rules differ in two points. Where mergekit keeps int(density n) entries of n, we keep
round(density n): the densities here make these equal. Of the entries whose magnitude is that of the
last one that is kept it keeps some, and we keep all: these are left out, and counted.

Asserted: no other entry differs by more than 1e-6 of its tensor's largest entry in float32, and in
bfloat16 at least 99.9 % have the same bits. DARE and DELLA draw other random numbers, so the share
of entries that are kept, their mean and their mean square are compared, which may be 5 standard
errors apart.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peers import environment
from safetensors.torch import load_file
from synthetic import SIZES, Recipe, write_triple

from lean_merge import MergeRecipe, Resources, merge
from lean_merge.recipe.mergekit import translated

APART = 1e-6
SAME = 0.999
ERRORS = 5.0
Model = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A method with its parameters in mergekit's words.

    Attributes
    ----------
    method
        Its name.
    models
        The parameters of each model that is merged.
    common
        Those of all.
    base
        The model that is the base.
    """

    method: str
    models: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    base: str = "base"

    def recipe(self, folders: dict[str, Path], out_dtype: str) -> dict[str, Any]:
        """mergekit's recipe."""
        return {
            "merge_method": self.method,
            "base_model": str(folders[self.base]),
            "models": [
                {"model": str(folders[role]), "parameters": own}
                for role, own in self.models.items()
            ],
            "parameters": self.common,
            "dtype": "float32",
            "out_dtype": out_dtype,
        }

    def words(self) -> str:
        """The parameters on one line."""
        parts = [f"{role}: {own}" for role, own in self.models.items() if own]
        parts += [str(self.common)] if self.common else []
        return ", ".join(parts).replace("'", "").replace("|", "/")


def both(first: dict[str, Any], second: dict[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of both models; the second's are the first's unless they are given."""
    return {"text": first, "expert": first if second is None else second}


LAYERED = [{"filter": "self_attn", "value": [0.2, 0.9]}, {"value": 0.4}]
EXACT = (
    Case("linear", both({"weight": 0.5}, {"weight": 0.75}) | {"base": {"weight": 1.0}}),
    Case("linear", {"base": {"weight": 0.3}, "expert": {"weight": 0.7}}, {"normalize": False}),
    Case("slerp", {"expert": {}}, {"t": 0.3}, "text"),
    Case("slerp", {"expert": {}}, {"t": LAYERED}, "text"),
    Case("task_arithmetic", both({"weight": 0.3})),
    Case("task_arithmetic", both({"weight": LAYERED}), {"lambda": 0.8, "normalize": True}),
    Case("ties", both({"weight": 1.0, "density": 0.25})),
    Case(
        "ties",
        both({"weight": 1.3, "density": 0.5}, {"weight": 0.7, "density": 0.25}),
        {"lambda": 0.6, "normalize": False},
    ),
    Case("ties", both({"weight": 1.0})),
    Case("breadcrumbs", both({"weight": 0.6, "density": 0.5, "gamma": 0.0625})),
    Case("breadcrumbs_ties", both({"weight": 1.0, "density": 0.75, "gamma": 0.125})),
)
CHANCE = (
    Case("dare_linear", {"expert": {"weight": 1.0, "density": 0.3}}),
    Case("dare_ties", {"expert": {"weight": 0.7, "density": 0.5}}, {"rescale": False}),
    Case("della", {"expert": {"weight": 1.0, "density": 0.4, "epsilon": 0.2}}),
    Case("della_linear", {"expert": {"weight": 1.0, "density": 0.6}}, {"rescale": False}),
)


MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=1)
options.apply_global_options()
for config, out in yaml.safe_load(sys.stdin):
    run_merge(MergeConfiguration.model_validate(config), out, options)
"""


def theirs(commands: Path, jobs: list[tuple[dict[str, Any], Path]]) -> None:
    """Have mergekit write all merges, in one process, since it takes long to start."""
    command = [str(commands / "python"), "-c", MERGEKIT]
    work = yaml.safe_dump([[config, str(out)] for config, out in jobs])
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environ, input=work, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def ours(config: dict[str, Any], out: Path) -> Model:
    """What we write."""
    merge(MergeRecipe.from_dict(translated(config).recipe), out, resources=Resources(device="cpu"))
    return tensors(out)


def tensors(folder: Path) -> Model:
    """All of a checkpoint."""
    found: Model = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


@dataclass(slots=True)
class Compared:
    """How two merges of the same models differ.

    Attributes
    ----------
    entries, edge, equal : int
        How many were compared, how many were left out, and how many have the same bits.
    apart : float
        The largest difference, as a share of its tensor's largest entry.
    """

    entries: int = 0
    edge: int = 0
    equal: int = 0
    apart: float = 0.0

    @property
    def same(self) -> float:
        """The share that has the same bits."""
        return self.equal / self.entries


def compare(models: dict[str, Model], one: Model, other: Model, case: Case) -> Compared:
    """Compare all tensors, but for entries at the edges of what is kept."""
    assert one.keys() == other.keys()
    found = Compared()
    for name, ours_of in one.items():
        assert ours_of.dtype == other[name].dtype
        differs = (ours_of.double() - other[name].double()).abs()
        compared = torch.ones_like(differs, dtype=torch.bool)
        base = models[case.base][name].float()
        for role, own in case.models.items():
            if own.get("density", 1.0) < 1:
                magnitudes = (models[role][name].float() - base).abs()
                compared &= ~at_an_edge(magnitudes, own["density"], own.get("gamma", 0.0))
        found.entries += int(compared.sum())
        found.edge += int((~compared).sum())
        found.equal += int((differs[compared] == 0).sum())
        if bool(compared.any()):
            apart = float(differs[compared].max()) / float(other[name].double().abs().max())
            found.apart = max(found.apart, apart)
    return found


def at_an_edge(magnitudes: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Where magnitudes equal the last one kept and the first one dropped, unless they are 0."""
    ordered = magnitudes.flatten().sort(descending=True).values
    dropped = int(gamma * len(ordered))
    edges = torch.zeros_like(magnitudes, dtype=torch.bool)
    for place in (dropped, dropped + int(density * len(ordered))):
        if 0 < place < len(ordered) and ordered[place - 1] == ordered[place] > 0:
            edges |= magnitudes == ordered[place]
    return edges


def moments(base: Model, merged: Model) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The entries that changed: their number, sum and sum of squares; sums of their squares."""
    total, squares, entries = torch.zeros(3).double(), torch.zeros(3).double(), 0
    for name, tensor in merged.items():
        change = tensor.double() - base[name].double()
        parts = torch.stack([each.flatten() for each in ((change != 0), change, change.square())])
        total += parts.double().sum(dim=1)
        squares += parts.double().square().sum(dim=1)
        entries += change.numel()
    return total, squares, entries


def main() -> None:
    """Parse the arguments, install, merge by both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--environment", type=Path, help="where mergekit is, or is to be kept")
    arguments = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        scratch = Path(folder)
        commands = environment(arguments.environment or scratch / "environment")
        print("| method | parameters | dtype | entries | at the edge | same bits | apart |")
        print("|---|---|---|---|---|---|---|")
        for dtype in (torch.float32, torch.bfloat16):
            word = str(dtype).removeprefix("torch.")
            inputs = scratch / word
            folders = write_triple(inputs, SIZES[arguments.size], Recipe(dtype=dtype), text=True)
            models = {role: tensors(folders[role]) for role in ("base", "text", "expert")}
            cases = [*EXACT, *(CHANCE if dtype is torch.float32 else ())]
            jobs = [
                (case.recipe(folders, word), scratch / f"theirs {word} {number}")
                for number, case in enumerate(cases)
            ]
            theirs(commands, jobs)
            for case, (config, out) in zip(cases, jobs, strict=True):
                one, other = ours(config, out.with_name(out.name + " ours")), tensors(out)
                if case in CHANCE:
                    if by_chance(case, models["base"], one, other) > ERRORS:
                        missed.append(case.method)
                    continue
                found = compare(models, one, other, case)
                told = f"{found.entries} | {found.edge} | {found.same:.3%} | {found.apart:.1e}"
                print(f"| {case.method} | {case.words()} | {word} | {told} |", flush=True)
                exact = dtype is torch.float32
                if found.apart > APART if exact else found.same < SAME:
                    missed.append(f"{case.method} in {word}")
    assert not missed, f"Missed: {', '.join(missed)}."


def by_chance(case: Case, base: Model, one: Model, other: Model) -> float:
    """Compare what is random and print it; return how many standard errors it is apart."""
    found = [moments(base, each) for each in (one, other)]
    # A sum over entries that stay independently has at most the variance of its squares' sum.
    spread = (found[0][1] + found[1][1]).sqrt()
    apart = float(((found[0][0] - found[1][0]) / spread).abs().max())
    means = [total / entries for total, _, entries in found]
    pairs = [f"{float(ours):.5g} and {float(its):.5g}" for ours, its in zip(*means, strict=True)]
    told = f"kept {pairs[0]}, mean {pairs[1]}, mean square {pairs[2]} | | {apart:.1f} errors"
    print(f"| {case.method} | {case.words()} | float32 | {found[0][2]} | {told} |", flush=True)
    return apart


if __name__ == "__main__":
    main()
