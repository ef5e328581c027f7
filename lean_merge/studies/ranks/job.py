"""Carry out a merge by several processes, each of which makes its share of the tensors.

All ranks plan alike, from headers alone. Rank 0 does everything that one process does, and where it
would run the plan, each rank runs its share. The others follow it: they join the folder that rank 0
has made, write their own tensors, and are done when rank 0 has sealed the output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from lean_merge import memory
from lean_merge.checkpoints import identify
from lean_merge.checkpoints.safepaths import resolved
from lean_merge.engine import CREW, Event, RunResult, run, steps
from lean_merge.errors import OutputError, RecipeError
from lean_merge.linalg import Products
from lean_merge.outputs import evidence_kind
from lean_merge.outputs.base import Sink
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.plan.resources import Resources, threads_of
from lean_merge.plan.runfacts import environment
from lean_merge.store.joining import JoinedFolder, share, take_over
from lean_merge.store.state import OWN_ANALYSIS
from lean_merge.studies.ranks.links import SILENCE, Links, RankError
from lean_merge.studies.ranks.sharing import RUNS, NoteSink, ShareSink, deal, dealt, edges
from lean_merge.tasks import WeightTask

T = TypeVar("T")
EventFunction = Callable[[Event], None]
_INTERRUPTED = 5


@dataclass(frozen=True, slots=True)
class _Orders:
    """The orders of rank 0 to the others when a plan is to be run.

    Attributes
    ----------
    kind
        The kind of the plan's output, which is that of an analysis if the merge needs one first.
    place
        Where the folder is, seen from the output folder that was asked for.
    start
        The first record of the folder's journal.
    shares
        The places in the plan of each rank's tasks.
    blocks_from
        Where each rank's region of blocks begins.
    facts
        What must be the same for all ranks.
    """

    kind: str
    place: str
    start: Mapping[str, Any]
    shares: Sequence[Sequence[int]]
    blocks_from: Sequence[int]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _ShareReport:
    """A rank's report on its share: bytes that surveys read, and notes that no folder keeps."""

    surveyed: int
    notes: Mapping[str, Any]


class Job:
    """The crew of a job, seen from one rank; `lean_merge.engine.Crew` tells what it is for."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._out = Path()
        self.leads = links.rank == 0
        self.at_work = False
        self.surveys = False

    def together(self, plan: Plan, out: Path, work: Callable[[], T]) -> T:
        """Let rank 0 do `work`, and follow it on the others.

        Every rank returns what `work` did, a dataclass whose `path` is the output, with its own
        path to that: hosts may have mounted the folder at different places.
        """
        self.at_work, self._out = True, resolved(out, OutputError)
        try:
            if not self.leads:
                found: T = self._follow(plan)
                return found
            done = work()
            self._links.tell("result", done)
            return done
        finally:
            self.at_work = False

    def gather(self, own: T) -> list[T]:
        """Return what every rank gives, rank 0 first."""
        return self._links.gather("given", own)

    def own(self, resources: Resources) -> Resources:
        """Give this rank its part of the machine, where nothing was asked for."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = memory.usage().anonymous + memory.available() // (2 * ranks)
        threads = max(1, threads_of(Resources()) // ranks)
        return replace(
            resources,
            memory=resources.memory or free,
            threads=threads if resources.threads is None else resources.threads,
        )

    def run(self, plan: Plan, sink: Sink, on_event: EventFunction) -> RunResult:
        """Run a plan, each rank its share, and return the results for all of it.

        With a folder, rank 0 alone calls this; without one, every rank does.
        """
        todo = [n for n, task in enumerate(plan.tasks) if sink.finished(task) is None]
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        shares = deal(plan, todo, self._links.size, RUNS if one_machine else 1)
        folder = sink.folder
        if folder is None:
            shares = self.gather(shares)[0]
        else:
            start, blocks_from = share(folder, plan.output.bytes_on_disk, self._links.size)
            place = os.path.relpath(folder.path, self._out)
            work = _Orders(plan.output.name, place, start, shares, blocks_from, _alike(plan))
            self._links.tell("work", work)
        result, done = self._share(plan, sink, shares, on_event)
        every = self._links.gather("done", done)
        owners = {plan.tasks[n].tensor.name: rank for rank, own in enumerate(shares) for n in own}
        if folder is None:
            sink = NoteSink({k: note for each in every for k, note in each.notes.items()}, sink)
        else:
            # Processes of one machine see what the others write, whatever the file system.
            take_over(folder, set() if one_machine else edges(folder.shards, owners))

        def others(event: Event) -> None:
            if owners.get(event.name) != self._links.rank:
                on_event(replace(event, reused=event.name not in owners))

        # All is there now, except for what take_over could not read again.
        alone = CREW.set(None)
        try:
            whole = run(plan, sink, others)
        finally:
            CREW.reset(alone)
        surveyed = sum(each.surveyed for each in every)
        return replace(
            result,
            weights=whole.weights,
            non_finite=whole.non_finite,
            bytes_read=whole.bytes_read + surveyed,
        )

    def spread(
        self,
        weights: Sequence[Any],
        products: Callable[[Sequence[Any]], Iterable[Sequence[Products | None]]],
    ) -> Iterator[Sequence[Products | None]]:
        """Have each rank compute the products of its part of a survey's weights.

        Counts are added here, in whatever order; other numbers are given one by one to whoever adds
        them in the order of the weights, so that the sums are those of one process.
        """
        costs = [sum(spec.nbytes for spec in each.stored) for each in weights]
        owners = dealt(costs, self._links.size)
        rank = self._links.rank
        own = [
            list(map(_plain, each))
            for each in products(
                [each for each, owner in zip(weights, owners, strict=True) if owner == rank]
            )
        ]
        if own and all(map(_is_count, own[0])):
            own = [reduce(_added, own)]
        for each in self._links.gather("survey", own):
            yield from each

    def _share(
        self, plan: Plan, sink: Sink, shares: Sequence[Sequence[int]], on_event: EventFunction
    ) -> tuple[RunResult, _ShareReport]:
        """Carry out this rank's tasks; what the result says of the others' means nothing."""
        own = {plan.tasks[index].tensor.name for index in shares[self._links.rank]}
        left = (plan.tasks[index] for each in shares for index in each)
        self.surveys = any(isinstance(task, WeightTask) for task in left)
        held, result = ShareSink(sink, own), RunResult()
        with closing(steps(plan, held, result)) as events:
            for event in events:
                self._links.check()
                if event.name in own:
                    on_event(event)
        sink.flush()
        surveyed = result.bytes_read - sum(note["bytes_read"] for note in held.notes.values())
        return result, _ShareReport(surveyed, held.notes if sink.folder is None else {})

    def _follow(self, plan: Plan) -> Any:
        """Do what rank 0 asks for until it has the result, and return that."""
        rank = self._links.rank
        while True:
            message = self._links.receive("work", "result")
            if message.kind == "result":
                return replace(message.content, path=self._out)
            work: _Orders = message.content
            path = Path(os.path.normpath(self._out / work.place))
            now = _planned(plan, work, path)
            self._check_alike(now, work)
            begin = work.blocks_from[rank]
            with JoinedFolder(path, now.shards, work.start, part=rank, blocks_from=begin) as folder:
                _, done = self._share(now, now.output.sink(folder), work.shares, lambda event: None)
            self._links.gather("done", done)

    def _check_alike(self, plan: Plan, work: _Orders) -> None:
        for key, value in _alike(plan).items():
            if value != work.facts[key]:
                raise RecipeError(
                    f"The {key} of rank {self._links.rank} differ from those of rank 0, so they "
                    "would not write one output; start all ranks by the same command, with the "
                    "same versions on machines of one kind."
                )


def _planned(plan: Plan, work: _Orders, path: Path) -> Plan:
    """Return the plan that rank 0 runs: of an analysis, from one that it made, or as it was."""
    resources = Resources(plan.device, plan.memory, plan.vram or None, plan.threads)
    if work.kind != plan.output.name:
        return make_plan(plan.recipe, resources, output=evidence_kind(), like=plan)
    if plan.is_settled:
        return plan
    own = evidence_kind().open(path / OWN_ANALYSIS, own=True)
    return make_plan(plan.recipe, resources, analysis=own, like=plan)


def _alike(plan: Plan) -> dict[str, Any]:
    """Return what must be the same for all ranks; paths may differ from host to host."""
    recipe = plan.recipe.to_dict()
    places = {name: recipe.pop(name, None) is None for name in ("base_model", "mllm_model")}
    for expert in recipe["experts"]:
        expert["model"], expert["parent"] = "", "parent" in expert
    inputs = {
        role: [
            (each["name"], each["size"], each.get("header_sha256")) for each in identify(checkpoint)
        ]
        for role, checkpoint in plan.roles.items()
    }
    return {
        "settings": [recipe, places, plan.output.called, dict(plan.output.facts)],
        "inputs": inputs,
        "tensors": [(task.tensor.name, task.tensor.nbytes) for task in plan.tasks],
        "arithmetic, versions or device": environment(plan.device),
    }


def _plain(products: Products | None) -> Products | None:
    """Bring reductions to the CPU, so that they can be sent."""
    if products is None or products.reduced is None:
        return products
    return replace(products, reduced=products.reduced.cpu())


def _is_count(products: Products | None) -> bool:
    """Return whether products are whole numbers, whose sums are exact in any order."""
    if products is None:
        return True
    reduced = products.reduced
    return products.inner is None and reduced is not None and not reduced.is_floating_point()


def _added(
    one: Sequence[Products | None], other: Sequence[Products | None]
) -> list[Products | None]:
    return [None if a is None or b is None else a + b for a, b in zip(one, other, strict=True)]


def own_device(visible: str | None, count: int, rank: int) -> str | None:
    """Return what CUDA_VISIBLE_DEVICES is to be for the `rank`-th process of a machine.

    `visible` is its value before, and `count` the number of devices. None leaves it as it is.
    """
    if count < 2:
        return None
    devices = visible.split(",") if visible else [str(number) for number in range(count)]
    return devices[rank % count]


@contextmanager
def joined() -> Iterator[Job]:
    """Join the other ranks of this job, as the launcher's environment describes it.

    Inside of the block, `merge`, `analyze` and `verify` work together with the same calls on all
    other ranks. Each rank uses one of the machine's GPUs.

    Raises
    ------
    RankError
        The ranks do not find each other, or another rank has ended.
    """
    device = own_device(
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch.cuda.device_count(),
        int(os.environ.get("LOCAL_RANK", 0)),
    )
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        torch.distributed.init_process_group("gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"The ranks do not find each other ({str(error).strip().partition(chr(10))[0]}); start "
            "them by torchrun, and see docs/scale.md for several machines."
        ) from error
    try:
        with Links() as links:
            job = CREW.set(Job(links))
            try:
                yield Job(links)
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt)
                links.fail(error, getattr(error, "exit_code", _INTERRUPTED if interrupted else 1))
                if interrupted:
                    # A launcher interrupts all ranks when one has ended, and its name says more.
                    links.check()
                raise
            finally:
                CREW.reset(job)
    finally:
        torch.distributed.destroy_process_group()
