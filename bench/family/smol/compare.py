"""Measure the family: task vectors, and the reproduction's candidates on it, by lean_merge.

    python bench/family/smol/compare.py --family DIR --out bench/family/smol

Every row is written to ``results.json`` as it is measured; those that are there are not measured
again, so that this can be stopped at any time. Without ``--out`` it only looks at the task vectors,
those of any family with these three folders. docs/reproduction.md takes its rows from there, by
`python bench/reproduce.py --render`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the first family's modules
sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the package, when not installed
sys.path.append(str(Path(__file__).resolve().parents[2]))  # the reproduction's modules

import torch
from anatomy import anatomy, decompose, dominant_inputs, silenced, summarise
from measure import commit, machine, today
from merging import SmolFamily
from reproduction import results as reproduced
from reproduction.candidates import SHOWN, Candidate, candidates, role
from reproduction.grids import GRIDS
from reproduction.measuring import facts, measure, summary
from telling import told
from transformers.utils import logging

from lean_merge.demo.run import FAMILY

PROBLEMS = 500
COMMAND = "python bench/family/smol/compare.py --family DIR --out bench/family/smol"
PLAIN = (  # text without digits, unlike anything in either tuning
    "The river had been rising since the morning, and by noon the lower fields were under water. "
    "Nobody in the village was surprised: old people remembered worse, and the younger ones had "
    "carried their chairs and their books upstairs the evening before. What worried them was the "
    "bridge. It was built of wood, by a carpenter who had never seen the sea, and every tree that "
    "came down with the flood struck it like a hammer."
)
_FIRST: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("models", ("base", "expert", SHOWN)),
    ("task arithmetic", ("1", "0.5")),
    ("threshold", ("0.4", "0")),
    ("stages: select", ("0.4",)),
    ("stages: select, rescale", ("0.4",)),
    ("stages: select, project", ("0.4",)),
    ("threshold", ("0.6", "0.2")),
    ("ties", ("1",)),
    ("linear", ("0.5",)),
    ("threshold auto", ("auto",)),
    ("task arithmetic", ("0.3",)),
    ("temperature at 0.4", ("8", "128")),
    ("relative at 0", ("2", "0")),
    ("similarity_weight: sigma", ("0.4", "0")),
    ("base + dM cut to rank", ("1", "4", "16", "64")),
    ("dM on the MLLM's leading directions", ("4", "16", "64")),
    ("ties", ("0.5",)),
    ("task arithmetic", ("0.7", "0.1")),
    ("linear", ("0.3", "1")),
    ("scale at 0.4", ("4",)),
    ("stages: select", ("0.6", "0.2")),
    ("stages: select, project", ("0", "0.6", "0.2")),
    ("stages: select, rescale", ("0", "0.6", "0.2")),
    ("stages: select", ("0",)),
    ("threshold", ("0.8", "0.5", "0.3", "0.7", "0.1", "0.9")),
    ("update as long as lambda dM", ("each weight, 0.4", "the whole, 0.4")),
    ("select_by: max", ("0.4",)),
    ("nuclear: top_q", ("0.4",)),
    ("stored in bf16", ("0.4",)),
    ("relative at 0.4", ("2", "8", "32")),
    ("dM cut to rank", ("1", "4", "16", "64")),
    ("temperature at 0.4", ("1", "4", "16", "64")),
    ("scale at 0.4", ("2", "8")),
    ("linear", ("0.1", "0.7", "0.9")),
    ("ties", ("0.3", "0.7")),
    ("task arithmetic", ("1.5",)),
    ("relative at 0", ("8", "32")),
    ("temperature at 0", ("8", "128")),
    ("scale at 0", ("4", "8")),
)


def _all_methods() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every method over its grid, without the values that stand in _FIRST."""
    before = {(group, name) for group, names in _FIRST for name in names}
    for grid in GRIDS:
        every = [f"{value:g}" for value in grid.values]
        yield grid.group, tuple(name for name in every if (grid.group, name) not in before)


# What of the reproduction's candidates is measured, in the order of what is wanted first.
WANTED = (*_FIRST, *_all_methods())


def wanted(weights: int) -> Iterator[Candidate]:
    """The candidates in order, for a family with so many weights in scope; the MLLM is first.

    All are asked everything, whatever the first family has time for.
    """
    known = {(each.group, each.name): each for each in candidates(weights)}
    known["models", SHOWN] = Candidate("models", SHOWN, partial(role, "base"), exam=SHOWN)
    yield known["models", "mllm"]
    for group, names in WANTED:
        for name in names:
            yield replace(known[group, name], tasks=None, limit=None)


def anatomies(family: SmolFamily) -> dict[str, dict[str, Any]]:
    """Every matrix measured."""
    ids = torch.tensor([family.text.ids(PLAIN)])
    inputs = dominant_inputs(family.llm, ids)  # still the base: nothing was put into it
    return {
        name: anatomy(base, family.mllm[name], family.expert[name], inputs[name])
        for name, base in family.base.items()
    }


def silent_channels(family: SmolFamily) -> dict[str, Any]:
    """Of every matrix behind an MLP's norm: whether both spectra end where that is smallest."""
    return {
        name: silenced(
            family.llm.model.layers[int(name.split(".")[1])].post_attention_layernorm.weight,
            (family.of_mllm[name], family.of_expert[name]),
        )
        for name in family.base
        if name.split(".")[-2] in ("gate_proj", "up_proj")
    }


def storage(family: SmolFamily, states: Mapping[str, Path]) -> dict[str, Any]:
    """What storing in bf16 does to nuclear norms: stored task vectors against those trained.

    Parameters
    ----------
    states : mapping of str to Path
        The trainings' states of "mllm" and "expert", with the float32 weights before rounding.
    """
    ratios: dict[str, list[float]] = {kind: [] for kind in states}
    errors: dict[str, list[float]] = {kind: [] for kind in states}
    for kind, file in states.items():
        trained = torch.load(file, weights_only=True, mmap=True)["weights"]
        stored_vectors = family.of_mllm if kind == "mllm" else family.of_expert
        for name, start in family.base.items():
            exact = trained[name] - start
            stored = stored_vectors[name]
            nuclear = [float(decompose(each).sigma.sum()) for each in (stored, exact)]
            ratios[kind].append(nuclear[0] / nuclear[1])
            errors[kind].append(float((stored - exact).norm() / exact.norm()))
    factors = [v / e for v, e in zip(ratios["mllm"], ratios["expert"], strict=True)]
    found = {"lambda": factors}
    found |= {f"nuclear_norm_{kind}": values for kind, values in ratios.items()}
    found |= {f"error_{kind}": values for kind, values in errors.items()}
    return {
        name: {"low": min(v), "median": sorted(v)[len(v) // 2], "high": max(v)}
        for name, v in found.items()
    }


def rounded(value: Any) -> Any:
    """Four significant digits: the rest is noise in a diff."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write(file: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write JSON, rounded."""
    text = json.dumps(rounded(value), indent=indent)
    if indent is None:  # one matrix a line
        text = text.replace('}, "layers', '},\n"layers')
    file.write_text(text + "\n", encoding="utf-8")


def begun(file: Path, family: SmolFamily, problems: int) -> dict[str, Any]:
    """What an earlier run left, or the start of a new one.

    Raises
    ------
    ValueError
        What lies there is of other models, or of another number of problems.
    """
    fingerprint = {
        name: float(sum(each.double().square().sum() for each in of.values()))
        for name, of in (("mllm", family.of_mllm), ("expert", family.of_expert))
    }
    fresh: dict[str, Any] = {
        "version": 1,
        "run": {
            "command": f"{COMMAND} --problems {problems}",
            "minutes": 0.0,
            "commit": commit(),
            "date": today(),
            "machine": machine(),
            "python": platform.python_version(),
        },
        "seeds": [0],
        "problems": problems,
        "weights": len(family.base),
        "squared_norms": rounded(fingerprint),
        "facts": [],
        "candidates": [],
    }
    if not file.exists():
        return fresh
    old: dict[str, Any] = reproduced.read(file).data
    for key in ("problems", "weights", "squared_norms"):
        if old.get(key) != fresh[key]:
            raise ValueError(f"{file} is of another run ({key}); delete it to measure anew")
    return old


def describe(family: SmolFamily, results: dict[str, Any], out: Path, trained: Path) -> None:
    """Add what is known of the task vectors, before any weights are changed."""
    if "anatomy" not in results:
        matrices = anatomies(family)
        results["anatomy"] = rounded(summarise(matrices))
        write(out / "spectra.json", matrices, indent=None)
        print(time.strftime("%H:%M:%S"), "anatomy", flush=True)
    if "first" not in results:
        first = SmolFamily(FAMILY, problems=1)
        results["first"] = rounded(summarise(anatomies(first))["all"])
    if not results["facts"]:
        results["facts"] = [facts(family)]
        print(time.strftime("%H:%M:%S"), "facts", flush=True)
    if "silenced" not in results:
        results["silenced"] = rounded(silent_channels(family))
    states = {role: trained / f"{role}.state" for role in ("mllm", "expert")}
    if "storage" not in results and all(state.exists() for state in states.values()):
        results["storage"] = rounded(storage(family, states))
        print(time.strftime("%H:%M:%S"), "storage", flush=True)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="without it, only the task vectors, printed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="of each task")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    family = SmolFamily(options.family, problems=options.problems)
    if options.out is None:
        print(json.dumps(rounded(summarise(anatomies(family))["all"]), indent=1))
        return
    file = options.out / "results.json"
    results = begun(file, family, options.problems)
    describe(family, results, options.out, options.family)
    reproduced.write(results, file)
    listed = list(wanted(results["weights"]))
    known: dict[str, Any] = {}
    mllm = measure(family, listed[0], known)
    for candidate in listed:
        done = {(entry["group"], entry["name"]) for entry in results["candidates"]}
        if (candidate.group, candidate.name) in done:
            continue
        began = time.perf_counter()
        entry = summary(candidate, [measure(family, candidate, known)], [mllm])
        entry["seconds"] = round(time.perf_counter() - began, 1)
        results["candidates"].append(entry)
        results["run"]["minutes"] = round(results["run"]["minutes"] + entry["seconds"] / 60, 2)
        reproduced.write(results, file)
        (options.out / "results.md").write_text(told(results), encoding="utf-8")
        shares = (
            f"{task} {of['right'][0] / of['asked']:.3f}" for task, of in entry["tasks"].items()
        )
        print(time.strftime("%H:%M:%S"), entry["group"], entry["name"], *shares, flush=True)


if __name__ == "__main__":
    main()
