"""What `bench/pins.py` runs in each tree: every case, through the public API and the command line.

    PYTHONPATH=TREE python bench/pincases.py INPUTS RESULTS.json [NAME ...]

It works in the folder where it is started, and writes down what each case has written: SHA-256 of
files and tensors, and the parsed content of files that hold times. Paths are relative, so that two
trees write the same ones. Pages (HTML) are left out.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lean_merge import (
    BudgetError,
    Evaluation,
    Event,
    Expert,
    Grid,
    LeanMergeError,
    MergeRecipe,
    MergeResult,
    Resources,
    analyze,
    merge,
    plan,
    stream,
    sweep,
    verify,
)

ROOM = 3 << 30
"""Memory that is ample, so that what is read does not depend on what the process holds."""
SPARE = 8 << 20
"""Bytes by which the process may grow between a plan and its merge."""
NAMED = re.compile(r"the smallest that works is --memory (\d+)MiB")
LEFT_OUT = (".html", ".lock")
PARAMETERS = dataclasses.fields(MergeRecipe)


class Stop(BaseException):
    """A cut, as Ctrl-C is one."""


def stopping(after: int) -> Callable[[Event], None]:
    """Stops a merge after so many tensors."""
    left = [after]

    def on_event(event: Event) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    return on_event


@dataclass
class Run:
    """One case at work.

    Attributes
    ----------
    inputs
        Folder of the triples, relative to where the process works.
    folder
        The case's own; what it holds in the end is what the case has written.
    found
        What is written down beside its files.
    """

    inputs: Path
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    def recipe(
        self, triple: str = "plain", *, own: tuple[Mapping[str, Any], ...] = (), **options: Any
    ) -> MergeRecipe:
        """A recipe of a triple; what is no field of a recipe is a parameter.

        `experts` may count them; `own` are the parameters of each expert by itself.
        """
        fields = {each.name for each in PARAMETERS}
        parameters = {name: options.pop(name) for name in list(options) if name not in fields}
        count = options.pop("experts", 1)
        place = self.inputs / triple
        roots = self.inputs / "plain" if triple == "adapter" else place
        experts = [place / f"expert{number + 1}" for number in range(count)]
        per_expert = [*own, *[{}] * (count - len(own))]
        return MergeRecipe(
            str(roots / "base"),
            str(roots / "mllm"),
            tuple(
                Expert(str(path), tuple(values.items()))
                for path, values in zip(experts, per_expert, strict=True)
            ),
            parameters=tuple(parameters.items()),
            **options,
        )

    def merge(
        self,
        triple: str = "plain",
        *,
        to: str | None = "out",
        memory: int = ROOM,
        threads: int = 2,
        overwrite: bool = False,
        resume: bool = True,
        analysis: Path | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> MergeResult:
        """Merge into a folder of the case, with ample memory."""
        return merge(
            self.recipe(triple, **options),
            None if to is None else self.folder / to,
            resources=Resources(device="cpu", threads=threads, memory=memory),
            overwrite=overwrite,
            resume=resume,
            analysis=analysis,
            on_event=on_event,
        )

    def analyze(self, triple: str = "plain", *, to: str = "analysis", **options: Any) -> Path:
        """Analyse into a folder of the case, without a page; `on_event` and `resume` may be."""
        more = {name: options.pop(name) for name in ("on_event", "resume") if name in options}
        recipe = self.recipe(triple, **options)
        resources = Resources(device="cpu", threads=2, memory=ROOM)
        return analyze(recipe, self.folder / to, resources=resources, page=False, **more).path

    def smallest(self, triple: str, *, threads: int, **options: Any) -> int:
        """The memory that the error names, found as a user finds it."""
        given = 1 << 20
        for _ in range(10):
            try:
                resources = Resources(device="cpu", threads=threads, memory=given)
                plan(self.recipe(triple, **options), resources)
            except BudgetError as error:
                named = NAMED.search(str(error))
                assert named, str(error)
                given = int(named[1]) << 20
            else:
                return given + SPARE
        raise AssertionError("the smallest memory is never reached")

    def refused(self, name: str, act: Callable[[], object]) -> None:
        """Note the error that `act` must raise."""
        try:
            act()
        except LeanMergeError as error:
            text = str(error)
            if isinstance(error, BudgetError):
                # How much fits depends on what the process holds.
                text = re.sub(r"\d+(\.\d+)?", "N", text)
            self.found[name] = {"type": type(error).__name__, "error": text}
        else:
            raise AssertionError(f"{name} was not refused")

    def cut(self, act: Callable[[], object]) -> None:
        """Do what must be cut by `stopping`, and note what is left."""
        try:
            act()
        except Stop:
            return
        raise AssertionError("it was to be cut")

    def command(self, name: str, *arguments: object, code: int = 0) -> None:
        """Run the command line in this process, and note what it prints and its exit code."""
        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["lean-merge", *map(str, arguments)]
        left: Any = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_module("lean_merge", run_name="__main__")
        except SystemExit as end:
            left = end.code or 0
        finally:
            sys.argv = argv
        assert left == code, (left, err.getvalue())
        self.found[name] = {"code": left, "out": parsed(out.getvalue()), "err": err.getvalue()}

    def models(self, triple: str = "plain") -> list[str]:
        """The flags that name a triple with one expert."""
        place = self.inputs / triple
        flags = (("--base", "base"), ("--mllm", "mllm"), ("--expert", "expert1"))
        return [word for flag, role in flags for word in (flag, str(place / role))]


MACHINE = ("--device", "cpu", "--threads", "2", "--memory", "3GiB")
Action = Callable[[Run], object]
CASES: dict[str, Action] = {}
TIGHT: set[str] = set()
"""Cases whose reads depend on what the process holds."""


def case(name: str, *, tight: bool = False) -> Callable[[Action], Action]:
    """Enter a function into the table."""

    def enter(action: Action) -> Action:
        assert name not in CASES, name
        CASES[name] = action
        if tight:
            TIGHT.add(name)
        return action

    return enter


def merging(triple: str = "plain", **options: Any) -> Action:
    """A case that merges once."""
    return lambda run: run.merge(triple, **options)


STEPS = ("select", "rescale", "project")
TWO_VALUES = ({"filter": "mlp", "value": 0.2}, 0.6)
BY_LAYER = ({"filter": "layers: 1-", "value": (0.5, 2.0)}, {"value": 1.0})
ARITHMETIC: dict[str, Any] = {"merge_method": "task_arithmetic"}
HALVES: dict[str, Any] = {"out_dtype": "bfloat16", "rounding": "stochastic"}
MERGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    # Options of IP-Merging.
    "defaults": ("plain", {}),
    "stages select": ("plain", {"stages": ("select",)}),
    "stages select, rescale": ("plain", {"stages": STEPS[:2]}),
    "stages select, project": ("plain", {"stages": ("select", "project")}),
    "select by the largest": ("plain", {"select_by": "max", "threshold": 0.7}),
    "temperature 0": ("plain", {"temperature": 0.0}),
    "temperature 4": ("plain", {"temperature": 4.0}),
    "relative importance": ("plain", {"importance": "relative", "temperature": 8.0}),
    "nuclear norms of q values": ("plain", {"nuclear": "top_q"}),
    "similarity weighed by sigma": ("plain", {"similarity_weight": "sigma", "temperature": 8.0}),
    "rank 5": ("plain", {"rank": 5}),
    "exact svd": ("plain", {"svd": "exact"}),
    "threshold 0": ("plain", {"threshold": 0.0}),
    "threshold 0.9": ("plain", {"threshold": 0.9}),
    "threshold 1, nothing selected": ("plain", {"threshold": 1.0}),
    "threshold auto": ("plain", {"threshold": "auto"}),
    "scale": ("plain", {"scale": -0.5}),
    "a gradient of scales": ("plain", {"scale": (0.25, 1.5)}),
    "a gradient of thresholds": ("plain", {"threshold": (0.0, 1.0)}),
    "values by filters": ("plain", {"threshold": TWO_VALUES, "scale": BY_LAYER}),
    "two experts": ("plain", {"experts": 2}),
    "two experts with their own parameters": (
        "plain",
        {"experts": 2, "own": ({"threshold": 0.1, "scale": 0.5}, {"threshold": (0.2, 0.7)})},
    ),
    "two experts, auto": ("plain", {"experts": 2, "threshold": "auto"}),
    "include": ("plain", {"include": ("layers: 1", "down_proj")}),
    "exclude": ("plain", {"exclude": ("self_attn", "layers: 0")}),
    "float16": ("plain", {"out_dtype": "float16"}),
    "bfloat16, stochastic": ("plain", HALVES),
    "bfloat16, stochastic, seed 7": ("plain", {"seed": 7, **HALVES}),
    "small shards": ("plain", {"shard_size": 40_000}),
    # Task Arithmetic.
    "Task Arithmetic": ("plain", {"scale": 0.5, **ARITHMETIC}),
    "Task Arithmetic, symmetric": ("plain", {"scale": 0.4, "symmetric": True, **ARITHMETIC}),
    "Task Arithmetic, two experts": (
        "plain",
        {"experts": 2, "own": ({"scale": 0.3}, {"scale": [0.1, 0.6]}), **ARITHMETIC},
    ),
    "Task Arithmetic, stacked, stochastic": (
        "stacked columns",
        {"seed": 3, **HALVES, **ARITHMETIC},
    ),
    # Forms of checkpoints.
    "bf16 in shards": ("bf16", {}),
    "bf16 to float32": ("bf16", {"out_dtype": "float32"}),
    "fp16": ("fp16", {}),
    "fp16, stochastic": ("fp16", {"rounding": "stochastic", "seed": 1}),
    "mixed dtypes": ("mixed", {}),
    "bin files": ("bin", {}),
    "fp8": ("fp8", {}),
    "fp8 to float32": ("fp8", {"out_dtype": "float32"}),
    "fp8 by rows, of the expert": ("fp8 rows", {}),
    "a LoRA adapter as expert": ("adapter", {}),
    "a LoRA adapter, Task Arithmetic": ("adapter", {"scale": 0.5, **ARITHMETIC}),
    "fused": ("fused", {}),
    "fused, one part filtered out": ("fused", {"exclude": ("k_proj", "up_proj")}),
    "fused in the MLLM alone": ("fused in the MLLM", {}),
    "interleaved": ("interleaved", {}),
    "interleaved, rescaled alone": ("interleaved", {"stages": STEPS[:2], **HALVES}),
    "stacked experts": ("stacked", {}),
    "stacked experts, columns": ("stacked columns", {}),
    "layers of cross-attention between": ("crossed", {}),
    "allow partial": ("lacking", {"allow_partial": True}),
    "names": (
        "renamed",
        {
            "names": {
                r"^lm\.trunk\.part(\.\d+)\.attn\.": r"model.layers\1.self_attn.",
                r"^lm\.trunk\.part(\.\d+)\.ffn\.": r"model.layers\1.mlp.",
            }
        },
    ),
    "NaN out of scope": ("NaN in the tower", {}),
    # Weights that are sketched, and of several tiles.
    "sketched": ("sketched", {}),
    "sketched, seed 5": ("sketched", {"seed": 5}),
    "sketched, threshold 0": ("sketched", {"threshold": 0.0, "temperature": 4.0}),
    "sketched, rank 40": ("sketched", {"rank": 40}),
    "sketched, sigma, relative": (
        "sketched",
        {"similarity_weight": "sigma", "importance": "relative", "select_by": "max"},
    ),
    "sketched, rescaled alone": ("sketched", {"stages": STEPS[:2]}),
    "sketched, top q": ("sketched", {"nuclear": "top_q", "include": ("q_proj",)}),
    "sketched, exact": ("sketched", {"svd": "exact", "include": ("q_proj",)}),
    "sketched bf16, two experts": ("sketched bf16", {"experts": 2}),
    "sketched bf16, auto": ("sketched bf16", {"threshold": "auto"}),
    "sketched bf16, stochastic": ("sketched bf16", {"rounding": "stochastic", "seed": 9}),
    "tiled": ("tiled", {}),
    "tiled, one thread": ("tiled", {"threads": 1}),
    "tiled, Task Arithmetic, stochastic": (
        "tiled",
        {"rounding": "stochastic", "scale": 0.5, **ARITHMETIC},
    ),
    # Outputs that are no checkpoint.
    "adapter": ("plain", {"output": "lora"}),
    "adapter of rank 3": ("plain", {"output": "lora", "lora_rank": 3}),
    "adapter of two experts, bf16": (
        "plain",
        {"output": "lora", "experts": 2, "out_dtype": "bfloat16", "stages": ("select", "project")},
    ),
    "adapter, auto": ("bf16", {"output": "lora", "threshold": "auto"}),
    "adapter of fused weights": ("fused", {"output": "lora"}),
    "adapter of interleaved weights": ("interleaved", {"output": "lora"}),
    "adapter of fp8": ("fp8", {"output": "lora"}),
    "adapter of a LoRA adapter": ("adapter", {"output": "lora"}),
    "adapter of old names": ("fp16", {"output": "lora", "out_dtype": "float16"}),
    "adapter of sketched weights": ("sketched bf16", {"output": "lora", "experts": 2}),
    "adapter of a tiled weight": ("tiled", {"output": "lora"}),
    "none": ("plain", {"output": "none", "experts": 2}),
    "none, sketched": ("sketched", {"output": "none", "threshold": 0.2}),
}
for _name, (_triple, _options) in MERGES.items():
    CASES[_name] = merging(_triple, **_options)


# --- streams -----------------------------------------------------------------------------------


def streamed(run: Run, triple: str, **options: Any) -> None:
    """Digests of the tensors of a stream, in their order."""
    resources = Resources(device="cpu", threads=2, memory=ROOM)
    run.found["stream"] = [
        {"name": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape), **digest(tensor)}
        for name, tensor in stream(run.recipe(triple, **options), resources=resources)
    ]


def digest(tensor: torch.Tensor) -> dict[str, str]:
    """SHA-256 of a tensor's bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"sha256": hashlib.sha256(data).hexdigest()}


STREAMS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "bin": {},
    "fp8": {},
    "fused": {"rounding": "stochastic"},
    "stacked columns": {"out_dtype": "float16"},
    "sketched bf16": {"experts": 2},
}
for _name, _options in STREAMS.items():
    CASES[f"stream, {_name}"] = partial(streamed, triple=_name, **_options)


@case("none, without a folder")
def _(run: Run) -> None:
    run.found["report"] = run.merge(to=None, output="none").report


# --- analyses ----------------------------------------------------------------------------------

ANALYSES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "analysis": ("plain", {}),
    "analysis of two experts": ("plain", {"experts": 2, "select_by": "max"}),
    "analysis, exact, top q": ("plain", {"svd": "exact", "nuclear": "top_q"}),
    "analysis, filters, temperature 4": ("plain", {"exclude": ("mlp",), "temperature": 4.0}),
    "analysis of fp8": ("fp8", {}),
    "analysis of stacked experts": ("stacked", {}),
    "analysis of an adapter": ("adapter", {}),
    "analysis of interleaved weights": ("interleaved", {}),
    "analysis of sketched weights": ("sketched bf16", {"experts": 2}),
    "analysis of a tiled weight": ("tiled", {}),
}
for _name, (_triple, _options) in ANALYSES.items():
    CASES[_name] = partial(Run.analyze, triple=_triple, **_options)


@case("merges from an analysis")
def _(run: Run) -> None:
    found = run.analyze(experts=2)
    run.merge(to="0.2", analysis=found, experts=2, threshold=0.2)
    run.merge(to="auto", analysis=found, experts=2, threshold="auto", scale=0.5)
    run.merge(to="cold", analysis=found, experts=2, temperature=1.0)
    run.merge(to="rescaled", analysis=found, experts=2, stages=STEPS[:2])
    run.merge(to="adapter", analysis=found, experts=2, output="lora")
    run.merge(to="none", analysis=found, experts=2, output="none", importance="relative")


@case("merges from an analysis, sketched")
def _(run: Run) -> None:
    found = run.analyze("sketched")
    run.merge("sketched", to="0.2", analysis=found, threshold=0.2)
    run.merge("sketched", to="cold", analysis=found, temperature=2.0, similarity_weight="sigma")
    run.merge("sketched", to="adapter", analysis=found, output="lora")


# --- cuts and what is there already ------------------------------------------------------------


def cut_and_resumed(run: Run, triple: str, *, after: int, **options: Any) -> None:
    """A merge that is cut, and then done again: with what was left, and without."""
    for to, resume in (("out", True), ("anew", False)):
        run.cut(partial(run.merge, triple, to=to, on_event=stopping(after), **options))
        again = run.merge(triple, to=to, resume=resume, **options)
        run.found[to] = {"reused": again.reused, "was_complete": again.was_complete}


CUTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "cut": ("plain", {"after": 9, "shard_size": 60_000}),
    "cut, bf16": ("bf16", {"after": 4, "rounding": "stochastic"}),
    "cut adapter": ("plain", {"after": 5, "output": "lora"}),
    "cut, none": ("plain", {"after": 5, "output": "none"}),
    "cut, auto": ("plain", {"after": 7, "threshold": "auto"}),
    "cut, sketched": ("sketched", {"after": 8}),
}
for _name, (_triple, _options) in CUTS.items():
    CASES[_name] = partial(cut_and_resumed, triple=_triple, **_options)


@case("cut analysis")
def _(run: Run) -> None:
    run.cut(partial(run.analyze, experts=2, on_event=stopping(6)))
    run.analyze(experts=2)


@case("what a cut leaves")
def _(run: Run) -> None:
    run.cut(partial(run.merge, on_event=stopping(9), threads=1))
    # What is written ahead of the journal is no promise, but names are.
    for file in sorted(run.folder.rglob("*")):
        if file.is_file():
            run.found.setdefault("names", []).append(file.relative_to(run.folder).as_posix())
            file.unlink()


@case("overwrite")
def _(run: Run) -> None:
    run.merge(scale=0.25, shard_size=60_000)
    run.refused("another merge", partial(run.merge, scale=0.5))
    run.merge(scale=0.5, overwrite=True)
    again = run.merge(scale=0.5)
    run.found["again"] = {"reused": again.reused, "was_complete": again.was_complete}


@case("overwrite by an adapter, cut")
def _(run: Run) -> None:
    run.merge(scale=0.25)
    options: dict[str, Any] = {"output": "lora", "overwrite": True}
    run.cut(partial(run.merge, on_event=stopping(6), **options))
    run.found["reused"] = run.merge(**options).reused


# --- sweeps ------------------------------------------------------------------------------------


def swept(run: Run, triple: str, grid: Grid, *, evaluate: str = "", **options: Any) -> None:
    """A sweep, and which of its files are links."""
    sweep(
        run.recipe(triple, **options),
        grid,
        run.folder / "sweep",
        evaluate=Evaluation(evaluate) if evaluate else None,
        resources=Resources(device="cpu", threads=2, memory=ROOM),
    )
    files = sorted(run.folder.rglob("*.safetensors"))
    run.found["links"] = {str(each.relative_to(run.folder)): each.stat().st_nlink for each in files}


@case("sweep")
def _(run: Run) -> None:
    swept(run, "plain", Grid(thresholds="0.2,0.5,0.9,auto"), shard_size=60_000, evaluate="echo 1.5")


@case("sweep of adapters")
def _(run: Run) -> None:
    grid = Grid(thresholds=[0.3, 1.0], stages="select,project;select,rescale,project")
    swept(run, "bf16", grid, output="lora")


@case("sweep, sketched, none")
def _(run: Run) -> None:
    swept(run, "sketched", Grid(thresholds="0.2:0.6:0.4", temperatures=[8, 32]), output="none")


@case("sweep of Task Arithmetic")
def _(run: Run) -> None:
    swept(run, "plain", Grid(scales="-0.5,0.5"), **ARITHMETIC)


# --- memory and threads ------------------------------------------------------------------------


def tight(run: Run, triple: str, **options: Any) -> None:
    """The smallest memory that works, and a little more, with one to three threads."""
    for threads, more in ((1, 0), (2, 0), (3, 6 << 20)):
        least = run.smallest(triple, threads=threads, **options)
        to = f"{threads}-threads"
        run.merge(triple, to=to, threads=threads, memory=least + more, **options)


TIGHT_MERGES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "little memory, tiled": ("tiled", {}),
    "little memory, tiled, adapter": ("tiled", {"output": "lora"}),
    "little memory, sketched": ("sketched bf16", {"experts": 2, "rounding": "stochastic"}),
    "little memory, rescaled alone": ("sketched bf16", {"stages": STEPS[:2]}),
    "little memory, stacked": ("stacked columns", {}),
    "little memory, fp8": ("fp8", {}),
}
for _name, (_triple, _options) in TIGHT_MERGES.items():
    case(_name, tight=True)(partial(tight, triple=_triple, **_options))


# --- verifying ---------------------------------------------------------------------------------


@case("verify")
def _(run: Run) -> None:
    resources = Resources(device="cpu", threads=2, memory=ROOM)
    for name, output in (("out", "checkpoint"), ("adapter", "lora")):
        found = run.merge("bf16", to=name, output=output)
        assert found.path is not None
        again = verify(found.path, full=True, seed=1, resources=resources)
        assert again.ok, again.differences
        run.found[name] = dataclasses.asdict(again)
    file = run.folder / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    run.found["damaged"] = dataclasses.asdict(verify(file.parent, seed=1, resources=resources))


# --- the command line --------------------------------------------------------------------------


@case("command: merge, in a process of its own")
def _(run: Run) -> None:
    recipe = run.folder / "recipe.yml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(run.recipe("bf16", temperature=16.0).to_yaml(), encoding="utf-8")
    flags = [str(recipe), "--out", str(run.folder / "out"), "--threshold", "0.3", *MACHINE]
    command = [sys.executable, "-m", "lean_merge", "merge", *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run.found["printed"] = {"out": parsed(done.stdout), "err": done.stderr}


@case("command: merge")
def _(run: Run) -> None:
    options = ["--set", "scale=[0.5, 1.0]", "--set", "similarity_weight=sigma", "--seed", "4"]
    options += ["--include", "layers: 0-", "--exclude", "k_proj", "--stages", "select,project"]
    options += ["--out-dtype", "bfloat16", "--rounding", "stochastic", "--shard-size", "60kB"]
    out = ("--out", run.folder / "out")
    run.command("merge", "merge", *run.models(), *options, *out, *MACHINE, "--json")
    run.command("again", "merge", *run.models(), *options, *out, *MACHINE, "--json")
    flags = ("--full", "--seed", 1, "--json", *MACHINE)
    run.command("verify", "verify", run.folder / "out", *flags)


@case("command: analyze, then merge")
def _(run: Run) -> None:
    out = run.folder / "analysis"
    run.command("analyze", "analyze", *run.models("bf16"), "--out", out, *MACHINE, "--json")
    options = ["--analysis", out, "--threshold", "auto", "--output", "lora", *MACHINE, "--json"]
    run.command("merge", "merge", *run.models("bf16"), *options, "--out", run.folder / "out")


@case("command: analyze, other foundations")
def _(run: Run) -> None:
    models = ["--base", run.inputs / "plain/base", "--mllm", run.inputs / "plain/mllm"]
    models += ["--expert", run.inputs / "sketched/expert1", "--out", run.folder / "out"]
    run.command("analyze", "analyze", *models, *MACHINE, "--json", code=1)


@case("command: sweep")
def _(run: Run) -> None:
    options = ["--thresholds", "0.3,0.6", "--scales", "1,2", "--output", "none"]
    out = ("--out", run.folder / "out", "--json")
    run.command("sweep", "sweep", *run.models(), *options, *out, *MACHINE)


@case("command: plan, inspect and methods")
def _(run: Run) -> None:
    for triple in ("plain", "fp8", "fused", "stacked columns", "tiled"):
        run.command(f"plan {triple}", "plan", *run.models(triple), *MACHINE, "--json")
        path = run.inputs / triple / "mllm"
        run.command(f"inspect {triple}", "inspect", path, "--json")
    run.command("inspect a bin", "inspect", run.inputs / "bin/mllm")
    run.command("methods", "methods", "--json")


# --- what is refused ---------------------------------------------------------------------------


@case("refused recipes")
def _(run: Run) -> None:
    run.refused("an unknown parameter", partial(run.merge, temprature=3.0))
    run.refused("a wrong value", partial(run.merge, threshold=1.5))
    run.refused("stages without a meaning", partial(run.merge, stages=("project",)))
    run.refused("a filter of nothing", partial(run.merge, include=("no_such_proj",)))
    run.refused("an unknown method", partial(run.merge, merge_method="ip_mergin"))
    rescaled = partial(run.merge, output="lora", stages=STEPS[:2])
    run.refused("an adapter of full rank", rescaled)


@case("refused inputs")
def _(run: Run) -> None:
    run.refused("a weight is missing", partial(run.merge, "lacking"))
    run.refused("names that nobody knows", partial(run.merge, "renamed"))
    run.refused("NaN in scope", partial(run.merge, "NaN in the expert"))
    run.refused("GPTQ", partial(run.merge, "GPTQ"))
    run.refused("no such model", partial(run.merge, "no such/model/here"))
    run.refused("an adapter of a mixture", partial(run.merge, "stacked", output="lora"))
    run.refused("too little memory", partial(run.merge, "tiled", memory=1 << 20))
    for file in sorted(run.folder.rglob("*.partial")):
        run.found.setdefault("left", []).append(file.relative_to(run.folder).as_posix())
        file.unlink()


@case("refused outputs")
def _(run: Run) -> None:
    taken = run.folder / "taken"
    taken.mkdir(parents=True)
    (taken / "notes.txt").write_text("mine", encoding="utf-8")
    run.refused("a folder of something else", partial(run.merge, to="taken"))
    run.refused("no model to replace", partial(run.merge, to="taken", overwrite=True))
    inside = str(Path("..") / run.inputs / "plain" / "mllm" / "out")
    run.refused("inside an input", partial(run.merge, to=inside))
    run.refused("no folder", partial(run.merge, to=None))


@case("refused commands")
def _(run: Run) -> None:
    recipe = run.folder / "recipe.yml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("base_model: a\nmlm_model: b\nexperts: [c]\n", encoding="utf-8")
    run.command("an unknown key", "plan", recipe, code=2)
    run.command("a wrong number", "merge", *run.models(), "--temperature", "hot", code=2)
    missing = ("--out", run.folder / "out", *MACHINE)
    run.command("a missing weight", "merge", *run.models("lacking"), *missing, code=1)
    run.command("no output to verify", "verify", run.folder, code=1)


# --- what is written down ----------------------------------------------------------------------


def parsed(text: str) -> Any:
    """JSON as what it says; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def described(file: Path) -> Any:
    """A file in a form that can be compared."""
    if file.suffix == ".jsonl":
        return journal(file)
    if file.suffix == ".json" and not file.name.endswith(".index.json"):
        return {"json": json.loads(file.read_bytes())}
    if file.suffix == ".csv":
        with open(file, encoding="utf-8", newline="") as stream_of_rows:
            return {"rows": list(csv.DictReader(stream_of_rows))}
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def journal(file: Path) -> dict[str, Any]:
    """The lines of a journal by their kind, and their order.

    The digest of each line depends on what it says of reports; so do the length and the digest of
    a report, and the digest of all lines in the last.
    """
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_bytes().splitlines()]
    found: dict[str, Any] = {"order": []}
    for line in lines:
        kind = line["record"]
        line.pop("crc32")
        if kind == "end":
            line.pop("sha256")
        elif kind == "file" and Path(line["name"]).name in WITH_TIMES:
            line = {name: line[name] for name in line if name not in ("size", "sha256")}
        found["order"].append(f"{kind} {line.get('name', '')}".strip())
        found.setdefault(kind, []).append(line)
    return {"journal": found}


WITH_TIMES = ("lean_merge_report.json", "analysis.json", "comparison.json")


def masked(value: Any) -> Any:
    """`value` in plain types, with where this process works hidden."""
    if isinstance(value, str):
        here = os.getcwd()
        return value.replace(here, "<here>").replace(os.path.dirname(here), "<above>")
    if isinstance(value, Mapping):
        return {str(key): masked(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [masked(each) for each in value]
    if isinstance(value, Path):
        return masked(str(value))
    return value


def carry_out(name: str, inputs: Path, number: int) -> dict[str, Any]:
    """Run a case, and describe what it found and wrote."""
    run = Run(inputs, Path(f"case-{number}"))
    start = time.perf_counter()
    failure = None
    try:
        CASES[name](run)
    except Exception:
        failure = traceback.format_exc()
    files = {
        file.relative_to(run.folder).as_posix(): described(file)
        for file in sorted(run.folder.rglob("*"))
        if file.is_file() and file.suffix not in LEFT_OUT
    }
    return {
        "failure": failure,
        "tight": name in TIGHT,
        "elapsed": time.perf_counter() - start,
        "files": masked(files),
        "found": masked(run.found),
    }


def main() -> None:
    """Run the cases that are named, or all, and write down what they did."""
    inputs, results, *names = sys.argv[1:]
    numbers = {name: number for number, name in enumerate(CASES)}
    assert set(names) <= set(CASES), set(names) - set(CASES)
    found = {name: carry_out(name, Path(inputs), numbers[name]) for name in names or CASES}
    Path(results).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
