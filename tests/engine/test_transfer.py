"""Tiles on their way to a device: order, reuse of places, and merges through the same ring.

There is no device here. Its two queues are played by some that do what they were asked for as late,
or in as odd an order, as events allow: a place written again too early shows in the numbers.
"""

from __future__ import annotations

import json
import random
import re
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import SMALL, Triple, write_triple
from support.invariance import METHODS, cut_tiles, exact_smallest_memory, identity, residency

from lean_merge import (
    BudgetError,
    DataError,
    Event,
    MergeResult,
    Plan,
    RecipeError,
    Resources,
    merge,
    verify,
)
from lean_merge import plan as make_plan
from lean_merge.engine import deciding, device, taskvectors
from lean_merge.engine.device import Parcel, is_out_of_memory
from lean_merge.engine.devices import accelerator
from lean_merge.engine.devices.plain import PlainQueues
from lean_merge.engine.devices.transfer import Done, Uploader
from lean_merge.engine.workers import Workers, worker_pool
from lean_merge.methods import spectra
from lean_merge.outputs.checkpoint import CheckpointComparison
from lean_merge.plan import formulas
from lean_merge.tasks import tiles

SHAPE = (3, 2)
NBYTES = 24


class Point:
    """An event of `LateQueues`."""

    def __init__(self, queues: LateQueues) -> None:
        self.reached = False
        self._queues = queues

    def synchronize(self) -> None:
        self._queues.work_until(self)


class LateQueues:
    """Two queues that work only while somebody waits, each in order, by turns as `choose` says.

    A copy reads its source when it is done, not when it is asked for, as a device does.
    """

    def __init__(self, choose: Callable[[], bool] = lambda: False, *, eager: bool = False) -> None:
        self._queues: tuple[deque[Any], deque[Any]] = (deque(), deque())
        self._choose = choose
        self._eager = eager
        self.sources: Counter[int] = Counter()
        self.log: list[str] = []

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.sources[source.data_ptr()] += 1

        def carry_out() -> None:
            target.copy_(source)
            self.sources[source.data_ptr()] -= 1

        self._queues[0].append(carry_out)

    def compute(self, product: Callable[[], None]) -> None:
        self._queues[1].append(product)

    def copied(self) -> Point:
        return self._mark(0)

    def computed(self) -> Point:
        return self._mark(1)

    def _mark(self, queue: int) -> Point:
        point = Point(self)
        self._queues[queue].append(point)
        return point

    def copy_after(self, event: Point) -> None:
        self._queues[0].append(("wait", event))

    def compute_after(self, event: Point) -> None:
        self._queues[1].append(("wait", event))
        if self._eager:
            # Products are then made by torch itself, so what they need must be there.
            event.synchronize()

    def synchronize(self) -> None:
        for point in (self.copied(), self.computed()):
            point.synchronize()

    def work_until(self, point: Point) -> None:
        while not point.reached:
            first = int(self._choose())
            assert any(self._step(queue) for queue in (first, 1 - first)), "nothing can go on"

    def _step(self, number: int) -> bool:
        """Do the next of a queue, if there is one that does not wait."""
        queue = self._queues[number]
        if not queue:
            return False
        if isinstance(queue[0], tuple):
            if not queue[0][1].reached:
                return False
            queue.popleft()
        else:
            work = queue.popleft()
            if isinstance(work, Point):
                work.reached = True
            else:
                work()
        return True


def drive(
    queues: LateQueues,
    workers: Workers,
    stays: Sequence[bool],
    *,
    slots: int,
    landings: int,
    use: Callable[[int], None] = lambda position: None,
) -> list[tuple[float, float]]:
    """What products read of two tensors a parcel; those that `stay` are read again at the end."""
    host = torch.zeros(slots * 256, dtype=torch.uint8)
    uploader = Uploader(queues, workers, host, slots=slots)
    landing = [torch.zeros(2 * NBYTES, dtype=torch.uint8) for _ in range(landings)]
    targets = [[torch.zeros(SHAPE), torch.zeros(SHAPE)] for _ in stays]

    def parcel(number: int, stay: bool) -> Parcel:
        def fill(views: Sequence[torch.Tensor]) -> None:
            for role, view in enumerate(views):
                assert queues.sources[view.data_ptr()] == 0, "rewritten before it was copied"
                view.fill_(10 * number + role)

        return Parcel(fill, 2, SHAPE, torch.float32, targets[number] if stay else ())

    seen: list[tuple[float, float]] = []

    def read(tensors: Sequence[torch.Tensor]) -> None:
        values = [tensor.unique().tolist() for tensor in tensors]
        assert all(len(each) == 1 for each in values), values
        seen.append((values[0][0], values[1][0]))

    parcels = [parcel(number, stay) for number, stay in enumerate(stays)]
    with closing(uploader.send(parcels, landing)) as arrivals:
        for position, tensors in enumerate(arrivals):
            queues.compute(lambda tensors=tensors: read(tensors))
            use(position)
    for number, stay in enumerate(stays):
        if stay:
            queues.compute(lambda number=number: read(targets[number]))
    uploader.close()
    return seen


def wanted(stays: Sequence[bool]) -> list[tuple[float, float]]:
    again = [number for number, stay in enumerate(stays) if stay]
    return [(10.0 * n, 10.0 * n + 1) for n in [*range(len(stays)), *again]]


@settings(max_examples=60, deadline=None)
@given(
    stays=st.lists(st.booleans(), max_size=12),
    slots=st.integers(2, 5),
    landings=st.integers(1, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_no_place_is_used_again_too_early(
    stays: list[bool], slots: int, landings: int, threads: int, seed: int
):
    """For any number of places, tiles and threads, and any order that the events allow."""
    queues = LateQueues(lambda: draw.random() < 0.5)
    draw = random.Random(seed)
    with worker_pool(threads) as workers:
        seen = drive(queues, workers, stays, slots=slots, landings=landings)
    assert seen == wanted(stays)
    assert not +queues.sources


@pytest.mark.parametrize("lie", ["copied", "computed"])
def test_the_test_sees_a_place_that_is_used_again_too_early(lie: str):
    class Lying(LateQueues):
        """Says that one kind of work is done when it is not."""

        def reached(self) -> Point:
            point = Point(self)
            point.reached = True
            return point

    stays = [False] * 8
    queues = Lying()
    setattr(queues, lie, queues.reached)
    with worker_pool(2) as workers:
        try:
            right = drive(queues, workers, stays, slots=2, landings=1) == wanted(stays)
        except AssertionError:
            right = False
    assert not right


def test_tiles_are_formed_and_copied_while_one_is_used():
    """While parcel n is used, n + 1 is asked to be formed, and no product has been waited for."""
    log: list[str] = []

    class Logging(LateQueues):
        def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
            log.append(f"copy {int(source.flatten()[0]) // 10}")
            super().copy(source, target)

    class Inline(Workers):
        """Forms a tile as soon as it is asked for, in the calling thread."""

        def submit(self, function: Any, items: Any, *, can_wait: bool = False) -> Any:
            jobs = super().submit(function, items, can_wait=can_wait)
            wait(jobs)
            log.append(f"form {len([line for line in log if 'form' in line])}")
            return jobs

    workers = Inline(1)
    try:
        drive(
            Logging(),
            workers,
            [False] * 5,
            slots=3,
            landings=2,
            use=lambda n: log.append(f"use {n}"),
        )
    finally:
        workers.close()
    for number in range(4):
        assert log.index(f"form {number + 1}") < log.index(f"use {number}")
        assert log.index(f"copy {number}") < log.index(f"use {number}")
    # Two slots ahead, as far as there are tiles: a third one would overwrite what is not copied.
    assert log.index("form 2") < log.index("use 0") < log.index("form 3")


@pytest.mark.parametrize("fails", [0, 2, 5])
def test_a_tile_that_cannot_be_formed_ends_it_with_its_own_error(fails: int):
    begun: list[int] = []

    def fill(number: int) -> Callable[[Sequence[torch.Tensor]], None]:
        def write(views: Sequence[torch.Tensor]) -> None:
            begun.append(number)
            if number >= fails:
                raise DataError(f"tile {number}")
            views[0].fill_(number)

        return write

    queues = LateQueues()
    with worker_pool(2) as workers:
        uploader = Uploader(queues, workers, torch.zeros(3 * 256, dtype=torch.uint8), slots=3)
        parcels = [Parcel(fill(n), 1, SHAPE, torch.float32) for n in range(6)]
        arrived = []
        with (
            pytest.raises(DataError, match=f"tile {fails}$"),
            closing(uploader.send(parcels, [torch.zeros(64, dtype=torch.uint8)])) as arrivals,
        ):
            for tensors in arrivals:
                arrived.append(tensors)
        after = len(begun)
        assert len(arrived) == fails
        uploader.close()
    assert len(begun) == after, "a thread went on"


def test_what_lies_on_no_second_queue_is_copied_at_once():
    target, queues = torch.zeros(4), PlainQueues(torch.device("cpu"))
    queues.copy(torch.ones(4), target)
    assert target.tolist() == [1.0] * 4
    queues.copy_after(queues.copied())
    queues.compute_after(queues.computed())
    assert isinstance(queues.copied(), Done)
    queues.synchronize()


# --- whole merges ---------------------------------------------------------------------------


@pytest.fixture
def through_the_ring(monkeypatch: pytest.MonkeyPatch) -> list[LateQueues]:
    """The CPU as if it were a device: tiles go over by queues that copy as late as they may."""
    made: list[LateQueues] = []

    def queues_of(device: torch.device) -> LateQueues:
        draw = random.Random(len(made))
        made.append(LateQueues(lambda: draw.random() < 0.5, eager=True))
        return made[-1]

    monkeypatch.setattr(accelerator, "queues_of", queues_of)
    monkeypatch.setattr(deciding, "accelerator_of", accelerator.TorchAccelerator)
    # A device takes one weight at a time, which the plan cannot know of this one.
    monkeypatch.setattr(formulas, "FULL_SPEED", 0)
    return made


def resources(threads: int) -> Resources:
    return Resources(device="cpu", threads=threads)


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize(
    ("dtype", "method", "threads"),
    [
        (torch.bfloat16, "ip-merging", 1),
        (torch.bfloat16, "whole", 2),
        (torch.float32, "ip-merging", 3),
        (torch.float16, "adapter", 2),
        (torch.bfloat16, "task-arithmetic", 2),
    ],
)
def test_the_ring_changes_no_byte(
    sketched: Callable[..., Triple],
    tmp_path: Path,
    through_the_ring: list[LateQueues],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    method: str,
    threads: int,
):
    triple, options = sketched(dtype), METHODS[method]
    ring = merge(triple.recipe(**options), tmp_path / "ring", resources=resources(threads))
    monkeypatch.setattr(deciding, "accelerator_of", device.accelerator_of)
    plain = merge(triple.recipe(**options), tmp_path / "plain", resources=resources(threads))
    assert identity(ring) == identity(plain)
    assert len(through_the_ring) == 1
    assert ring.report["fallbacks"] == plain.report["fallbacks"] == []
    used = method != "task-arithmetic"
    assert (ring.report["memory"]["pinned"] > 0) == used
    assert plain.report["memory"]["pinned"] == 0
    assert any(row["passes"] for row in ring.report["weights"]) == used


@pytest.mark.usefixtures("many_tiles", "through_the_ring")
def test_rows_that_do_not_stay_come_over_in_every_pass(
    sketched: Callable[..., Triple], tmp_path: Path
):
    """With as little memory as works few stay; the bytes are those of the plain merge."""
    triple = sketched(torch.bfloat16)
    least = exact_smallest_memory(triple)
    tight = make_plan(triple.recipe(), Resources(device="cpu", threads=2, memory=least))
    assert 0 in residency(tight)
    ring = merge(tight, tmp_path / "ring")
    roomy = merge(triple.recipe(), tmp_path / "roomy", resources=resources(2))
    assert identity(ring) == identity(roomy)
    assert ring.report["bytes"]["read"] > roomy.report["bytes"]["read"]


@pytest.mark.usefixtures("through_the_ring")
def test_nan_is_refused_by_name_on_the_way_to_a_device(tmp_path: Path):
    def edit(role: str, tensors: dict[str, torch.Tensor]) -> None:
        if role == "expert1":
            tensors["model.layers.0.mlp.gate_proj.weight"][3, 5] = float("nan")

    triple = write_triple(tmp_path, SMALL, edit=edit)
    with pytest.raises(DataError, match=r"expert1.*gate_proj\.weight holds NaN or Inf"):
        merge(triple.recipe(), tmp_path / "out", resources=resources(2))


# --- running out of memory --------------------------------------------------------------------


def test_running_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with"))
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    assert is_out_of_memory(RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(MemoryError("out of memory"))
    assert not is_out_of_memory(DataError("CUDA error: out of memory"))


class Shortage:
    """Lets the device run out of memory: `at` an allocation, the n-th pass or inside a worker.

    It does so in the first `times` analyses, and keeps weak references to what they were lent.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: str, times: int) -> None:
        self._at, self.left, self.passes = at, times, 0
        self.lent: list[weakref.ref[torch.Tensor]] = []
        lend, run = accelerator.TorchAccelerator.lend, taskvectors.TaskVectors.run
        absorb = spectra._absorb

        def short_lend(accelerator: Any, tile: int, resident: int) -> Any:
            self.passes = 0
            assert not any(ref() is not None for ref in self.lent), "the last attempt lives on"
            self._fail_at("allocation")
            found = lend(accelerator, tile, resident)
            self.lent.append(weakref.ref(found.landing[0]))
            return found

        def short_run(vectors: Any, wanted: Any) -> Any:
            if vectors._uploader is not None:
                self.passes += 1
                self._fail_at(f"pass {self.passes}")
            return run(vectors, wanted)

        def short_absorb(pair: Any) -> None:
            absorb(pair)
            self._fail_at(f"after pass {self.passes}")

        patch.setattr(accelerator.TorchAccelerator, "lend", short_lend)
        patch.setattr(taskvectors.TaskVectors, "run", short_run)
        patch.setattr(spectra, "_absorb", short_absorb)

    def _fail_at(self, point: str) -> None:
        if self.left and point == self._at:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")


@pytest.mark.usefixtures("many_tiles", "through_the_ring")
@pytest.mark.parametrize(
    ("at", "times", "place"),
    [
        ("allocation", 1, "cpu, no tile resident"),
        ("pass 1", 1, "cpu, no tile resident"),
        ("pass 3", 1, "cpu, no tile resident"),
        ("after pass 2", 1, "cpu, no tile resident"),
        ("allocation", 2, "cpu"),
        ("pass 4", 2, "cpu"),
    ],
)
def test_a_device_without_memory_does_not_end_a_merge(
    sketched: Callable[..., Triple],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain: MergeResult,
    at: str,
    times: int,
    place: str,
):
    """Smaller blocks, then the CPU; the same bytes, for here the device is one; and it is said."""
    shortage = Shortage(monkeypatch, at, times)
    seen: list[Event] = []
    triple = sketched(torch.bfloat16)
    out = tmp_path / "out"
    result = merge(triple.recipe(), out, resources=resources(2), on_event=seen.append)
    assert shortage.left == 0
    # The second weight has another shape, so it is tried as planned.
    first, *others = [row["weight"] for row in plain.report["weights"]]
    assert others
    expected = {"weight": first, "place": place}
    reason = "CUDA out of memory. Tried to allocate 2 GiB."
    assert result.report["fallbacks"] == [{**expected, "reason": reason}]
    [warning] = [line for line in result.report["warnings"] if "ran out of memory" in line]
    assert f"of 2 weights, 1 on {place};" in warning
    warnings = [line for event in seen for line in event.warnings]
    assert warnings == [f"{first}: the device ran out of memory; analysed on {place}"]
    got, want = identity(result), identity(plain)
    assert got.pop("warnings") == [*want.pop("warnings"), warning]
    assert got == want


@pytest.fixture(scope="module")
def plain(sketched: Callable[..., Triple], tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    """The merge of the sketched triple in bfloat16 on the CPU, by many tiles."""
    with pytest.MonkeyPatch.context() as patch:
        cut_tiles(patch, tile=1 << 14, strip=1 << 12)
        out = tmp_path_factory.mktemp("plain") / "out"
        return merge(sketched(torch.bfloat16).recipe(), out, resources=resources(2))


@pytest.mark.usefixtures("through_the_ring")
def test_weights_of_a_shape_that_failed_begin_where_the_first_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = [f"layers.{n}.mlp.gate_proj" for n in range(3)]
    triple = write_triple(tmp_path, {**dict.fromkeys(names, (64, 80)), **SMALL})
    # The first weight fails twice; those of its shape do not try the device again.
    shortage = Shortage(monkeypatch, "pass 1", 2)
    result = merge(triple.recipe(), tmp_path / "out", resources=resources(1))
    fallen = {row["weight"]: row["place"] for row in result.report["fallbacks"]}
    assert set(fallen) == set(names) and set(fallen.values()) == {"cpu"}
    # Only the weight of another shape was lent memory and used it, and both failures were.
    assert len(shortage.lent) == 3


@pytest.mark.usefixtures("through_the_ring")
def test_other_errors_of_a_device_are_not_hidden(
    small: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(accelerator.TorchAccelerator, "lend", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        merge(small.recipe(), tmp_path / "out", resources=resources(1))


@pytest.mark.usefixtures("through_the_ring")
def test_a_fallback_is_remembered_over_an_interruption(
    small: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shortage = Shortage(monkeypatch, "pass 1", 1)

    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if event.warnings:
            raise Stop

    with pytest.raises(Stop):
        merge(small.recipe(), tmp_path / "out", resources=resources(1), on_event=stop)
    shortage.lent.clear()  # the traceback of Stop may still hold the weight that came next
    result = merge(small.recipe(), tmp_path / "out", resources=resources(1))
    assert result.reused
    assert [row["place"] for row in result.report["fallbacks"]] == ["cpu, no tile resident"]


@pytest.mark.usefixtures("through_the_ring")
@pytest.mark.parametrize(("times", "by_cpu"), [(1, False), (2, True)])
@pytest.mark.parametrize("during", ["merge", "verify"])
def test_only_what_the_cpu_took_over_is_verified_within_a_last_place(
    small: Triple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    by_cpu: bool,
    during: str,
):
    compared: list[set[str]] = []
    real = CheckpointComparison.differences

    def differences(sink: CheckpointComparison, elsewhere: set[str]) -> Any:
        compared.append(elsewhere)
        return real(sink, elsewhere)

    monkeypatch.setattr(CheckpointComparison, "differences", differences)
    with pytest.MonkeyPatch.context() as patch:
        if during == "merge":
            Shortage(patch, "pass 1", times)
        out = merge(small.recipe(), tmp_path / "out", resources=resources(1)).path
    assert out is not None
    with pytest.MonkeyPatch.context() as patch:
        if during == "verify":
            Shortage(patch, "pass 1", times)
        assert verify(out, full=True, resources=resources(1)).ok
    first = min(slot.mllm for slot in small.slots)
    assert compared == [{first} if by_cpu else set()]


# --- planning for a device ----------------------------------------------------------------------

GIB = 1 << 30


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Torch as it answers on a machine with a GPU of 24 GiB, as far as a plan asks."""
    facts = {"free": 24 * GIB}

    def mem_get_info(of: torch.device) -> tuple[int, int]:
        if facts["free"] == 0:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return facts["free"], 24 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: (9, 0))
    return facts


@pytest.fixture(scope="module")
def of_7b(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Triple]:
    """Headers of one layer at 7B widths by dtype; the numbers are holes in the files."""
    made: dict[str, Triple] = {}

    def get(dtype: str) -> Triple:
        if dtype not in made:
            made[dtype] = hollow_triple(tmp_path_factory.mktemp("hollow"), dtype)
        return made[dtype]

    return get


def hollow_triple(folder: Path, dtype: str) -> Triple:
    shapes = {f"self_attn.{leaf}_proj": (4096, 4096) for leaf in "qkvo"}
    shapes |= {f"mlp.{leaf}_proj": (11008, 4096) for leaf in ("gate", "up")}
    shapes["mlp.down_proj"] = (4096, 11008)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        facts = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        header[f"model.layers.0.{name}.weight"] = facts
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for role in ("base", "mllm", "expert1"):
        (folder / role).mkdir()
        with open(folder / role / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        (folder / role / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return Triple(folder / "base", folder / "mllm", (folder / "expert1",), ())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("threads", [2, 16])
def test_two_gib_are_enough_for_7b_shapes(
    cuda: dict[str, int], of_7b: Callable[[str], Triple], dtype: str, threads: int
):
    """All tiles of every weight stay on the device, so that each byte is read once."""
    recipe = of_7b(dtype).recipe()
    made = make_plan(recipe, Resources(device="cuda", vram=2 * GIB, threads=threads))
    assert made.device == "cuda"
    assert made.prediction.bytes_read == made.prediction.most_read
    assert 0 < made.prediction.peak_vram <= 2 * GIB
    for task in made.weights:
        assert task.resident == (len(list(tiles.row_tiles(task.weight.slices[0].shape))),)
    cpu = make_plan(recipe, Resources(device="cpu", memory=4 * GIB, threads=threads))
    assert cpu.prediction.peak_vram == 0
    # A tile of two task vectors for each worker and one to copy, in a power of two.
    tile = 2 * 2 * max(tiles.tile_rows(width) * width for width in (4096, 11008))
    ring = formulas.ring_bytes(tile, min(threads, 4) + 1)
    assert ring.bit_count() == 1 and tile * (min(threads, 4) + 1) <= ring < 4 * GIB
    beside = made.prediction.peak_memory - cpu.prediction.peak_memory
    resident = max(budget_of_residents(cpu))
    assert beside > ring - resident


def budget_of_residents(made: Plan) -> list[int]:
    """Bytes of the tiles that stay on the CPU, of each weight."""
    found = []
    for task in made.weights:
        [part], [resident] = task.weight.slices, task.resident
        found.append(2 * 2 * resident * tiles.tile_rows(part.shape[1]) * part.shape[1])
    return found


def test_the_smallest_vram_is_named_and_works(cuda: dict[str, int], of_7b: Callable[[str], Triple]):
    recipe = of_7b("BF16").recipe()
    with pytest.raises(BudgetError, match="Device memory of") as refused:
        make_plan(recipe, Resources(device="cuda", vram=100 << 20))
    named = re.search(r"--vram (\d+)MiB", str(refused.value))
    assert named
    smallest = int(named[1]) << 20
    made = make_plan(recipe, Resources(device="cuda", vram=smallest))
    assert made.prediction.peak_vram <= smallest < 2 * GIB
    assert 0 in [count for task in made.weights for count in task.resident]
    with pytest.raises(BudgetError):
        make_plan(recipe, Resources(device="cuda", vram=smallest - (1 << 20)))


def test_a_busy_device_is_left_alone_unless_it_is_asked_for(
    cuda: dict[str, int], of_7b: Callable[[str], Triple]
):
    recipe = of_7b("BF16").recipe()
    assert make_plan(recipe, Resources()).device == "cuda"
    cuda["free"] = 200 << 20
    made = make_plan(recipe, Resources())
    assert made.device == "cpu" and made.vram == 0 and made.prediction.peak_vram == 0
    assert any("so the CPU is used" in note for note in made.notes)
    with pytest.raises(BudgetError, match="--vram"):
        make_plan(recipe, Resources(device="cuda"))
    cuda["free"] = 0
    made = make_plan(recipe, Resources())
    assert made.device == "cpu" and any("out of memory" in note for note in made.notes)
    with pytest.raises(RecipeError, match="--device cpu"):
        make_plan(recipe, Resources(device="cuda"))


def test_a_method_that_looks_at_nothing_needs_no_device(
    cuda: dict[str, int], of_7b: Callable[[str], Triple]
):
    recipe = of_7b("BF16").recipe(merge_method="task_arithmetic")
    made = make_plan(recipe, Resources(device="cuda", vram=1 << 20))
    assert made.prediction.peak_vram == 0


def test_task_vectors_that_stay_on_a_device_are_read_again_to_be_added(
    cuda: dict[str, int], of_7b: Callable[[str], Triple]
):
    """The MLLM's bytes twice, and all else twice as well."""
    recipe = of_7b("BF16").recipe(stages=("select", "rescale"))
    made = make_plan(recipe, Resources(device="cuda", vram=2 * GIB))
    bytes_of_one = sum(task.tensor.nbytes for task in made.weights)
    assert made.prediction.bytes_read == 6 * bytes_of_one
    projected = of_7b("BF16").recipe()
    made = make_plan(projected, Resources(device="cuda", vram=2 * GIB))
    assert made.prediction.bytes_read == 4 * bytes_of_one
