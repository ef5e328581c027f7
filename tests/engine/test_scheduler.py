"""Who runs when: order, overlap, what may wait, and how everything ends.

The scheduler is the real one. Analyses, rows, copies and the output are played by fakes, which mark
the memory that they are given and tell a `Stage` what they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_merge.engine import scheduler
from lean_merge.engine.scheduler import Scheduler
from lean_merge.outputs.base import Sink
from lean_merge.store import OutputTensor
from lean_merge.tasks import CopyTask, WeightResult, WeightTask, Written

HALF = 128
TILES = 2


@dataclass(frozen=True)
class Kind:
    """What a task is: the halves that each of its weights takes, or none where it is a copy."""

    halves: tuple[int, ...] = ()
    adds: bool = False
    """Whether rows of the task vectors are added, which stay in the arena until then."""


class FakeCopy(CopyTask):
    def read(self, *, rows: bool) -> tuple[Any, ...]:
        del rows
        return ()


class FakeWeights(WeightTask):
    def read(self, *, rows: bool) -> tuple[Any, ...]:
        del rows
        return ()


def task_of(index: int, kind: Kind) -> CopyTask | WeightTask:
    tensor = OutputTensor(str(index), "F32", (1,), 4)
    if not kind.halves:
        return FakeCopy(0, tensor, SimpleNamespace(name=str(index)))  # type: ignore[arg-type]
    slices = tuple(f"{index}.{number}" for number in range(len(kind.halves)))
    weight: Any = SimpleNamespace(slices=slices)
    return FakeWeights(0, tensor, weight, (), (), (), kind.halves)


@dataclass
class Stage:
    """A run of tasks, what goes on in it, and whether that may go on together."""

    kinds: Sequence[Kind]
    waiting: int
    writes: bool = True
    fails: str = ""
    hold: Callable[[str], None] = lambda what: None
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_work: set[str] = field(default_factory=set)
    done: list[str] = field(default_factory=list)
    unstored: set[str] = field(default_factory=set)
    reused: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tasks = [task_of(index, kind) for index, kind in enumerate(self.kinds)]

    def do(self, what: str) -> None:
        """Do some work, which may be held up, or fail."""
        with self.lock:
            self.at_work.add(what)
        try:
            self.hold(what)
            if what == self.fails:
                raise ArithmeticError(what)
        finally:
            with self.lock:
                self.at_work.remove(what)
                self.done.append(what)

    def run(self) -> Iterator[int]:
        """Carry out the tasks; give the index of each when it is finished."""
        plan: Any = SimpleNamespace(
            tasks=self.tasks,
            waiting=self.waiting,
            arena=2 * HALF,
            workers=3,
            recipe=SimpleNamespace(rounding="nearest", seed=0),
            output=SimpleNamespace(writes_rows=self.writes),
            seen={},
            arrivals=0,
        )
        reused: Any = dict.fromkeys(self.reused, "note")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler, "Decider", lambda plan, workers, surveyed: FakeDecider(self))
            patch.setattr(scheduler, "RowWriter", lambda decided, *rest: FakeRows(decided))
            patch.setattr(scheduler, "copy_pieces", self.copy_pieces)
            made = Scheduler(plan, FakeSink(self), reused=reused, surveyed={}, timed=nullcontext)
            with made as self.scheduler:
                for index, note in made.finished():
                    assert (note == "note") == (index in self.reused)
                    yield index

    def copy_pieces(self, task: CopyTask, *rest: Any) -> Any:
        def copy(piece: int) -> bool:
            self.do(f"copy {task.tensor.name}.{piece}")
            return True

        return copy, range(TILES)


class FakeDecider:
    pinned = 0

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def close(self) -> None:
        pass

    @property
    def decide(self) -> Any:
        """Looked up when an analysis is begun: then no more may wait than there is room for."""
        assert len(self.stage.unstored) <= self.stage.waiting, self.stage.unstored
        return self._decide

    def _decide(self, task: WeightTask, number: int, reader: Any, arena: torch.Tensor) -> Any:
        stage, name = self.stage, task.weight.slices[number]
        assert arena.numel() == HALF * task.halves[number]
        decided = FakeDecided(stage, name, arena, stage.kinds[int(task.tensor.name)].adds)
        arena.fill_(decided.mark)
        stage.do(f"decide {name}")
        decided.check()
        return decided


class FakeDecided:
    def __init__(self, stage: Stage, name: str, arena: torch.Tensor, adds: bool) -> None:
        self.stage, self.name, self.arena, self.adds = stage, name, arena, adds
        self.mark = hash(name) % 251
        self.vectors: Any = self
        self.weight: Any = name
        self.decision: Any = SimpleNamespace(update=None)

    def check(self) -> None:
        assert bool((self.arena == self.mark).all()), f"{self.name} was overwritten"

    def without_evidence(self) -> FakeDecided:
        return self

    def result(self, name: str, stored: Any) -> Any:
        with self.stage.lock:
            self.stage.unstored.remove(self.name)
        return WeightResult(name, self.name, (), True, (), stored, 0)


class FakeRows:
    """Stores a weight tile by tile."""

    def __init__(self, decided: FakeDecided) -> None:
        self.decided = decided
        self.tiles = range(TILES)
        self.reads_arena = decided.adds
        with decided.stage.lock:
            decided.stage.unstored.add(decided.name)

    def write_tile(self, index: int) -> Written:
        if self.decided.adds:
            self.decided.check()
        self.decided.stage.do(f"write {self.decided.name}.{index}")
        if self.decided.adds:
            self.decided.check()
        return Written(0.0, 0.0)


class FakeSink(Sink):
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def writer(self, task: Any) -> Any:
        return self.stage if self.stage.writes else None

    def keep(self, task: Any, weight: Any, decision: Any, read: Any) -> None:
        with self.stage.lock:
            self.stage.unstored.add(weight)
        self.stage.do(f"keep {weight}")

    def finish(self, task: Any, note: Any) -> None:
        self.stage.do(f"finish {task.tensor.name}")


THREADS: set[threading.Thread] = set()


@pytest.fixture(autouse=True, scope="module")
def _threads_of_others() -> None:
    """Remember the threads that earlier tests and libraries left, such as the one of tqdm."""
    THREADS.clear()
    THREADS.update(threading.enumerate())


def ours() -> set[str]:
    """The names of the threads that began since this module's first test."""
    return {each.name for each in threading.enumerate() if each not in THREADS}


KINDS = st.builds(Kind, st.lists(st.sampled_from([1, 2]), max_size=3).map(tuple), st.booleans())


@settings(deadline=None)
@given(st.lists(KINDS, max_size=12), st.integers(0, 2), st.booleans(), st.data())
def test_all_is_done_once_and_finished_in_order(
    kinds: list[Kind], waiting: int, writes: bool, data: st.DataObject
):
    """The fakes check the rest: room in the arena stays as long as it is used, and no analysis
    begins while more updates wait than may."""
    reused = data.draw(st.sets(st.sampled_from(range(len(kinds))))) if kinds else set()
    stage = Stage(kinds, waiting, writes, reused=reused)
    wanted = []
    for index, kind in enumerate(kinds):
        names = [f"{index}.{number}" for number in range(len(kind.halves))]
        if index not in reused:
            wanted += [f"decide {name}" for name in names] + [f"finish {index}"]
            stored = [f"copy {index}"] if not names else [f"write {name}" for name in names]
            wanted += [f"{each}.{n}" for each in stored for n in range(TILES)] if writes else []
            wanted += [] if writes else [f"keep {name}" for name in names]
    seen = []
    for index in stage.run():
        seen.append(index)
        with stage.lock:
            quiet = not stage.at_work
        assert quiet or stage.scheduler.is_at_work
        if not waiting and all(set(kind.halves) <= {2} for kind in kinds):
            assert quiet and not stage.scheduler.is_at_work, "the caller holds a tensor"
    assert seen == list(range(len(kinds)))
    assert sorted(stage.done) == sorted(wanted)
    assert [each for each in stage.done if "finish" in each] == [
        f"finish {index}" for index in seen if index not in reused
    ]
    assert not ours() and not stage.unstored


class Meeting:
    """Holds each of some works until all of them have begun."""

    def __init__(self, *names: str) -> None:
        self.missing = set(names)
        self.names = set(names)
        self.changed = threading.Condition()

    def __call__(self, what: str) -> None:
        with self.changed:
            if what in self.names:
                self.missing.discard(what)
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: not self.missing, 20), self.missing


BOTH, ONE = Kind((2,)), Kind((1,))


@pytest.mark.parametrize(
    ("kinds", "waiting", "together"),
    [
        pytest.param([ONE, ONE], 0, ["decide 0.0", "decide 1.0"], id="two small analyses"),
        pytest.param([BOTH, BOTH], 1, ["write 0.0.1", "decide 1.0"], id="storing"),
        pytest.param([BOTH] * 3, 2, ["write 0.0.1", "write 1.0.0", "decide 2.0"], id="storing two"),
        pytest.param([Kind((2, 2))], 1, ["write 0.0.0", "decide 0.1"], id="in one tensor"),
        pytest.param([BOTH, *[Kind()] * 5], 1, ["write 0.0.0", "copy 5.0"], id="copying"),
        pytest.param([Kind(), Kind(), BOTH], 1, ["copy 0.0", "copy 1.0", "decide 2.0"], id="gaps"),
    ],
)
def test_goes_on_together(kinds: list[Kind], waiting: int, together: list[str]):
    list(Stage(kinds, waiting, hold=Meeting(*together)).run())


def test_an_update_is_kept_beside_the_next_analysis():
    stage = Stage([BOTH, BOTH], 1, writes=False, hold=Meeting("keep 0.0", "decide 1.0"))
    assert list(stage.run()) == [0, 1]


@pytest.mark.parametrize(
    ("kinds", "waiting", "first", "second"),
    [
        pytest.param([BOTH, ONE], 2, "decide 0.0", "decide 1.0", id="no room"),
        pytest.param([Kind((2,), True), BOTH], 2, "write 0.0.1", "decide 1.0", id="arena in use"),
        pytest.param([BOTH, BOTH], 0, "write 0.0.1", "decide 1.0", id="none may wait"),
        pytest.param([BOTH] * 3, 1, "write 0.0.1", "decide 2.0", id="one may wait"),
        pytest.param([Kind(), Kind()], 0, "finish 0", "copy 1.0", id="one at a time"),
    ],
)
def test_waits_for(kinds: list[Kind], waiting: int, first: str, second: str):
    stage = Stage(kinds, waiting)

    def hold(what: str) -> None:
        if what == second:
            assert first in stage.done

    stage.hold = hold
    list(stage.run())
    assert second in stage.done


@pytest.mark.parametrize("waiting", [0, 1, 2])
@pytest.mark.parametrize("fails", ["decide 2.0", "write 2.0.1", "copy 3.0", "finish 3"])
def test_an_error_ends_everything(waiting: int, fails: str):
    kinds = [BOTH, Kind(), Kind((1, 1)), Kind(), ONE, ONE]
    stage = Stage(kinds, waiting, fails=fails)
    seen = []
    with pytest.raises(ArithmeticError, match=fails):
        for index in stage.run():
            seen.append(index)
    assert seen == list(range(len(seen))) and len(seen) <= int(fails.split()[1][0])
    assert not ours() and not stage.at_work


@pytest.mark.parametrize("waiting", [0, 2])
def test_leaving_early_ends_everything(waiting: int):
    stage = Stage([BOTH, Kind(), *[Kind((1, 1))] * 5], waiting)
    running = stage.run()
    assert next(running) == 0
    running.close()
    assert not ours() and not stage.at_work
    assert "finish 4" not in stage.done
