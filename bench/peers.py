"""IP-Merging beside mergekit's task_arithmetic and ties, and beside the naive way, in one run.

    python bench/peers.py [--size 1b] [--layers 22] [--rounds 1] [--environment FOLDER]

mergekit 0.1.5 is installed into an environment of its own. It merges text models of one shape, so
it gets the MLLM's language model as a plain checkpoint, where lean-merge gets the MLLM with its
vision tower. Its flags are the leanest: lazy unpickling, small shards, no tokenizer, no card. It
leaves its output to the system, so the time until that is on the disk is counted too. The inputs'
cache is dropped before each run. The naive way loads all three checkpoints and takes full
float32 SVDs of both task vectors of each weight; it runs on one layer and is extrapolated.

Asserted: what we decide agrees with the naive way, and mergekit's task_arithmetic is what its
formula says. The aims, faster than its task_arithmetic at a tenth of its memory, are stated with
what misses them; in a triple of few layers the interpreter outweighs the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
import truth
import yaml
from measure import GB, MIB, ROOT, Finished, note
from probe import Probed, probe
from safetensors.torch import load_file
from speed import triple_of
from synthetic import Shapes, add_size, shapes_of

PINNED = ("mergekit==0.1.5", "torch==2.13.0+cpu", "transformers==5.23.0")
"""What is installed; of torch the build without CUDA, which an index of such builds must offer."""
FLAGS = ("--lazy-unpickle", "--low-cpu-memory", "--no-copy-tokenizer", "--no-write-model-card")
FLAGS += ("--out-shard-size", "100M", "--quiet")
EXPERT_WEIGHT = 0.5
MEMORY_SHARE = 0.1


def environment(folder: Path) -> Path:
    """The folder of mergekit's commands, installed there unless they are."""
    commands = folder / "bin"
    if not (commands / "mergekit-yaml").exists():
        note(f"installing {' '.join(PINNED)}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(commands / "python"), "-m", "pip", "install", "--quiet", *PINNED]
        subprocess.run(install, check=True, stdout=sys.stderr)
    return commands


def configuration(triple: Path, method: str) -> dict[str, Any]:
    """mergekit's recipe of `method` for the three text models."""
    shares = {"text": 1.0, "expert": EXPERT_WEIGHT}
    models = []
    for role, weight in shares.items():
        parameters = {"weight": weight} | ({"density": 0.2} if method == "ties" else {})
        models.append({"model": str(triple / role), "parameters": parameters})
    return {
        "merge_method": method,
        "base_model": str(triple / "base"),
        "models": models,
        "dtype": "bfloat16",
    }


@dataclass(frozen=True, slots=True)
class Run:
    """A merge as a process, and the seconds after its end until its output was on the disk."""

    process: Finished
    sync: float

    @property
    def seconds(self) -> float:
        """From the start until the output is on the disk."""
        return self.process.seconds + self.sync


def peer(commands: Path, triple: Path, out: Path, method: str) -> Run:
    """mergekit's merge, cold; the output is checked and removed."""
    out.mkdir(parents=True)
    config = out / "recipe.yml"
    config.write_text(yaml.safe_dump(configuration(triple, method)))
    _cold(triple, ("base", "text", "expert"))
    threads = str(len(os.sched_getaffinity(0)))
    command = [commands / "mergekit-yaml", config, out / "merged", *FLAGS, "-j", threads]
    done = measure.watch(command, HF_HUB_OFFLINE="1")
    sync = measure.until_synced(measure.weight_files(out / "merged"))
    check_peer(triple, out / "merged", method)
    shutil.rmtree(out)
    return Run(done, sync)


def check_peer(triple: Path, out: Path, method: str) -> None:
    """Assert that one weight is what the method's formula says, or at least a merge."""
    name = "model.layers.0.self_attn.q_proj.weight"
    base, text, expert = (
        truth.tensor(triple / r, name).double() for r in ("base", "text", "expert")
    )
    merged = truth.tensor(out, name).double()
    assert bool(torch.isfinite(merged).all())
    change = float((merged - base).norm())
    if method == "task_arithmetic":
        wanted = text + EXPERT_WEIGHT * (expert - base)
        assert float((merged - wanted).norm()) < 0.2 * change
    assert change > 0.1 * float((text - base).norm()), method


def _cold(triple: Path, roles: Sequence[str]) -> None:
    os.sync()
    measure.drop_cache(measure.weight_files(*(triple / role for role in roles)))


def ours(triple: Path, out: Path) -> tuple[Run, Probed]:
    """Our merge, cold, and its report; the output is removed."""
    _cold(triple, ("base", "mllm", "expert"))
    run = probe(triple, "--keep", out)
    sync = measure.until_synced(measure.weight_files(out))
    run.check()
    shutil.rmtree(out)
    return Run(run.process, sync), run


def starting(*command: str | Path) -> float:
    """Seconds of a command that only starts; the second time, so that its files are cached."""
    measure.watch(command)
    return measure.watch(command).seconds


def naive(triple: Path) -> dict[str, Any]:
    """Load everything, then take full SVDs for the weights of the first layer."""
    start = time.perf_counter()
    base, mllm, expert = (
        {k: v for file in measure.weight_files(triple / r) for k, v in load_file(file).items()}
        for r in ("base", "mllm", "expert")
    )
    # Loading maps the files; the naive way reads them whole.
    for weights in (base, mllm, expert):
        for name in list(weights):
            weights[name] = weights[name].clone()
    loaded = time.perf_counter() - start
    found = {}
    start = time.perf_counter()
    for name in [n for n in base if n.startswith("model.layers.0.") and base[n].ndim == 2]:
        first = mllm[f"language_model.{name}"].float() - base[name].float()
        second = expert[name].float() - base[name].float()
        _, sigma_v, right_v = torch.linalg.svd(first, full_matrices=False)
        _, sigma_m, right_m = torch.linalg.svd(second, full_matrices=False)
        similarity = (right_v * right_m).sum(1).abs()[:1024]
        gamma = torch.softmax(32 * similarity, 0)
        ratio = float(sigma_v.sum() / sigma_m.sum())
        right = right_v[: gamma.numel()]
        update = ratio * ((second @ right.T) * gamma**2) @ right
        found[truth.canonical(name)] = {
            "similarity": float(similarity[0]),
            "lambda": ratio,
            "update_norm": float(update.norm()),
        }
    return {"load": loaded, "layer": time.perf_counter() - start, "weights": found}


def check_naive(found: dict[str, Any], run: Probed) -> None:
    """Assert that the naive way and ours decide alike."""
    for row in run.report["weights"]:
        theirs = found["weights"].get(row["weight"])
        if theirs is None or abs(theirs["similarity"] - 0.4) < truth.CLEAR:
            continue
        assert row["selected"] == (theirs["similarity"] >= 0.4), row
        if row["selected"]:
            assert abs(row["lambda"] / theirs["lambda"] - 1) <= truth.RATIO, row
            assert abs(row["update_norm"] / theirs["update_norm"] - 1) <= truth.UPDATE, row


def main() -> None:
    """Parse the arguments, install, run, check, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_size(parser, size="1b", layers=None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--environment", type=Path, help="where mergekit is, or is to be kept")
    parser.add_argument("--triple", type=Path, help="an existing one, written with --text")
    parser.add_argument("--scratch", type=Path, help="where to write")
    parser.add_argument("--naive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.naive is not None:
        print(json.dumps(naive(arguments.naive)))
        return
    shapes = shapes_of(arguments)
    with triple_of(arguments, shapes, text=True) as triple, measure.scratch(triple, 0) as out:
        commands = environment(arguments.environment or out / "environment")
        print(compare(commands, triple, out, shapes, arguments))


def compare(
    commands: Path, triple: Path, out: Path, shapes: Shapes, arguments: argparse.Namespace
) -> str:
    """Run everything in turn, assert, and tell it in a table."""
    runs: dict[str, list[Run]] = {}
    for _ in range(arguments.rounds):
        run, probed = ours(triple, out / "ours")
        runs.setdefault("lean-merge ip_merging", []).append(run)
        for method in ("task_arithmetic", "ties"):
            note(f"mergekit {method}")
            runs.setdefault(f"mergekit {method}", []).append(
                peer(commands, triple, out / method, method)
            )
    note("the naive way")
    _cold(triple, ("base", "mllm", "expert"))
    whole = measure.watch([sys.executable, __file__, "--naive", triple], PYTHONPATH=str(ROOT))
    found = json.loads(whole.output)
    check_naive(found, probed)
    starts = {
        "lean-merge": starting(sys.executable, "-c", "import lean_merge"),
        "mergekit": starting(commands / "mergekit-yaml", "--help"),
    }
    read = measure.total_bytes(
        measure.weight_files(*(triple / r for r in ("base", "mllm", "expert")))
    )
    rows = [
        [
            name,
            measure.spread([run.seconds for run in each], 1),
            measure.spread([run.sync for run in each], 1),
            f"{starts[name.split()[0]]:.1f}",
            f"{max(run.process.peak_anonymous for run in each) / MIB:.0f}",
            f"{max(run.process.peak_rss for run in each) / MIB:.0f}",
            measure.cpu([run.process for run in each]),
        ]
        for name, each in runs.items()
    ]
    total = found["load"] + found["layer"] * shapes.layers
    rows.append(
        [
            f"naive, extrapolated from {found['layer']:.0f} s for 1 layer",
            f"{total:.0f}, nothing written",
            "",
            "",
            f"{whole.peak_anonymous / MIB:.0f}",
            f"{whole.peak_rss / MIB:.0f}",
            "",
        ]
    )
    header = [
        f"{arguments.size}, {shapes.layers} layers, {read / GB:.1f} GB",
        "s until on the disk",
    ]
    header += [
        "of which after the end",
        "of which starting",
        "peak anonymous MiB",
        "peak RSS MiB",
        "CPU s, user + system",
    ]
    return measure.table(header, rows) + "\n\n" + verdict(*list(runs.values())[:2])


def verdict(mine: Sequence[Run], theirs: Sequence[Run]) -> str:
    """Ours against its task_arithmetic, in sentences that say what misses the aim."""
    first, second = (median(run.seconds for run in each) for each in (mine, theirs))
    anonymous, rss = (
        max(getattr(run.process, kind) for run in mine)
        / max(getattr(run.process, kind) for run in theirs)
        for kind in ("peak_anonymous", "peak_rss")
    )
    faster = "faster" if first < second else "MISSED: slower"
    leaner = "" if rss <= MEMORY_SHARE else f"; MISSED: more than {MEMORY_SHARE:.0%} of its RSS"
    return (
        f"IP-Merging is {faster} than mergekit's task_arithmetic, {first:.1f} s to {second:.1f} s, "
        f"at {rss:.1%} of its peak RSS and {anonymous:.1%} of its anonymous memory{leaner}."
    )


if __name__ == "__main__":
    main()
