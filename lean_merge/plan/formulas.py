"""Formulas for the bytes that a merge allocates.

Every formula names the allocations that it counts, and docs/memory.md explains them in words. All
counts are bytes of anonymous memory, or of device memory where the arithmetic runs on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from lean_merge.errors import BudgetError
from lean_merge.sizes import format_size
from lean_merge.tasks import tiles

SLACK = 40 << 20
"""Small objects, thread stacks, what the allocator rounds up or keeps, and the kernels and buffers
that the mathematical libraries make for each shape they meet, which settle at about 30 MiB."""
WIDEST = 8
"""Bytes of a number in the widest dtype of an output."""
FULL_SPEED = 600 << 20
"""Anonymous bytes of the process up to which a second weight is analysed beside the first. Larger
weights keep the workers busy one by one."""
ARENA_ALIGNMENT = 64
"""Bytes to which the places of weights that are analysed at a time are aligned."""
COPY_BUFFER = 2 << 20
"""The buffer through which a worker copies tensors out of scope."""
LANDINGS = 2
"""Places on a device that take turns to receive tiles which do not stay there."""
HANDLE = 64 << 20
"""Device memory that cuBLAS, cuBLASLt and cuSOLVER keep for a thread that calls them: 32 MiB for
each of the first two on the largest devices. This is an allowance, not a measurement."""
DEVICE_SLACK = 64 << 20
"""Torch rounds up on a device: large blocks to 2 MiB, and pools of small ones to 20 MiB."""
WEIGHT_RECORD, EXPERT_RECORD, COPY_RECORD = 4 << 10, 3 << 10, 2 << 10
"""What is kept of a logical weight, of each expert there, and of a tensor that is copied: Python
objects. With one expert that is 7 KiB a weight; a merge of 30,200 weights took 6.5 KiB for each."""
DEVICE_LIBRARIES = 256 << 20
"""Host memory that the device's libraries take once they are used. This is an allowance as well."""


def record_bytes(logical: int, copied: int, *, experts: int) -> int:
    """Return the bytes that tasks, notes, lines of the journal and rows of the report take.

    They are held until the end, so that a model of very many small weights takes more.
    """
    return logical * (WEIGHT_RECORD + experts * EXPERT_RECORD) + copied * COPY_RECORD


@dataclass(frozen=True, slots=True)
class WeightShape:
    """The sizes of one logical weight that the formulas need."""

    out_features: int
    in_features: int
    roles: int
    """The number of task vectors: the MLLM's and each expert's."""
    stored_item: int
    """Bytes of a number in the widest of the inputs."""
    task_item: int
    """Bytes of a number in the task vectors' dtype."""
    arithmetic_item: int
    """Bytes of a number in the dtype of products."""
    widened: bool = False
    """True if any input is stored in another dtype than the task vectors'."""
    scratch: int = 0
    """Bytes that a worker holds to decode strips of base, one role and the MLLM's rows."""
    held: int = 0
    """Bytes that are kept beside the rows while the weight is merged, such as scales."""
    columns: bool = False
    """True if a role's rows are stored as columns, and so are read a tile at a time."""
    written: int = 5
    """Strips of 4-byte numbers that adding and rounding an update takes, from `written_strips`; 0
    where no rows are written."""

    @property
    def tile(self) -> int:
        """Return the number of elements of a full tile."""
        return min(self.out_features, tiles.tile_rows(self.in_features)) * self.in_features

    @property
    def tiles(self) -> int:
        """Return the number of tiles."""
        return -(-self.out_features // tiles.tile_rows(self.in_features))

    @property
    def read_strip(self) -> int:
        """Return the number of elements of a strip that is read at once."""
        return min(
            self.tile, tiles.strip_rows(self.in_features, tiles.READ_ELEMENTS) * self.in_features
        )

    @property
    def resident_tile(self) -> int:
        """Return the bytes of one tile of all task vectors."""
        return self.roles * self.tile * self.task_item


def worker_bytes(weight: WeightShape, widest: int) -> int:
    """Return the bytes of one worker thread's buffers during a pass.

    They are raw strips of the base and of one role, and what decoding them takes; their copies in
    the task vectors' dtype where any is stored in another, and one in float32 whose norm is taken;
    a tile of all task vectors that does not stay; a strip of it in the arithmetic dtype; and the
    product of a tile before it is added to its lane, unless float32 adds at once. Where rows are
    stored as columns, a raw tile and the base's tile in order come on top.
    """
    tile, strip = weight.tile, weight.read_strip
    raw = 2 * strip * weight.stored_item
    mixed = strip * (2 * weight.task_item if weight.widened else 0) + strip * 4
    scratch = weight.resident_tile
    converted = strip * weight.arithmetic_item if weight.arithmetic_item != weight.task_item else 0
    product = 0 if weight.arithmetic_item == 4 else 2 * weight.in_features * widest
    whole = tile * (weight.stored_item + weight.task_item) if weight.columns else 0
    return raw + mixed + scratch + converted + product + weight.scratch + whole


def written_strips(rounding: str) -> int:
    """Return the number of strips of 4-byte numbers that adding and rounding an update takes.

    They are the update, the rows before and after, and the rounded rows, which may have 8 bytes a
    number. Stochastic rounding takes ten more to find each number's neighbour.
    """
    return 15 if rounding == "stochastic" else 5


def apply_bytes(weight: WeightShape) -> int:
    """Return the bytes of one worker's buffers while it writes rows or copies tensors.

    They are a raw strip, strips of 4-byte numbers, and the buffer for copies. Where rows are
    written as columns, a raw tile and a tile of the output, which waits until it is whole, come on
    top.
    """
    if not weight.written:
        return 0
    strip = min(
        weight.tile, tiles.strip_rows(weight.in_features, tiles.STRIP_ELEMENTS) * weight.in_features
    )
    whole = weight.tile * (weight.stored_item + WIDEST) if weight.columns else 0
    raw = weight.read_strip * weight.stored_item
    return raw + weight.written * strip * 4 + whole + COPY_BUFFER


def lane_bytes(weight: WeightShape, widest: int) -> int:
    """Count the bytes of float32 sums [in, widest] of all lanes and task vectors, and of totals."""
    return (tiles.LANES + 1) * weight.roles * weight.in_features * widest * 4


def host_bytes(weight: WeightShape, *, widest: int, workspace: int, workers: int) -> int:
    """Return all bytes that merging one weight holds on the CPU with no tile resident there.

    `workspace` and `widest` are from the method's cost. They are counted where the analysis runs on
    another device, too: the CPU solves its small problems, and takes over if the device runs out
    of memory.
    """
    analysis = workers * worker_bytes(weight, widest) + lane_bytes(weight, widest) + workspace
    # The previous weight may not be written yet, and then still holds the bytes that it keeps.
    kept = 2 * weight.held
    return analysis + workers * apply_bytes(weight) + kept + SLACK


def second_bytes(weight: WeightShape, *, widest: int, workspace: int) -> int:
    """Return the bytes of a weight that is analysed beside another, without its resident tiles.

    Worker threads have one set of buffers, whichever weight's tiles they compute.
    """
    return lane_bytes(weight, widest) + workspace + weight.held


def device_bytes(weight: WeightShape, *, widest: int, workspace: int, workers: int) -> int:
    """Return all bytes that analysing one weight holds on another device with no tile resident.

    These are the partial sums and the method's workspace; tiles that land, the one in use in the
    arithmetic dtype, and its product; and what libraries keep for each worker and for the main
    thread. An eighth of the workspace comes on top for pieces that are too small to be used again.
    """
    landing = LANDINGS * weight.resident_tile
    converted = weight.tile * weight.arithmetic_item
    product = 2 * weight.in_features * widest * 4
    handles = (workers + 1) * HANDLE
    analysis = lane_bytes(weight, widest) + workspace + workspace // 8
    return analysis + landing + converted + product + handles + DEVICE_SLACK


def ring_slots(workers: int) -> int:
    """Return the slots for tiles on their way to a device: one per worker, and one being copied."""
    return workers + 1


def ring_bytes(largest_tile: int, slots: int) -> int:
    """Return the bytes of pinned memory for `slots` tiles: one block, a power of two in size."""
    return 1 << max(0, slots * (largest_tile + 256) - 1).bit_length()


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to a multiple of `ARENA_ALIGNMENT`."""
    return -(-nbytes // ARENA_ALIGNMENT) * ARENA_ALIGNMENT


def resident_tiles(weight: WeightShape, free: int) -> int:
    """Return how many tiles of all task vectors may stay in `free` bytes."""
    return max(0, min(weight.tiles, free // weight.resident_tile))


def check_ceiling(needed: int, given: int, *, what: str, flag: str, name: str) -> None:
    """Raise BudgetError, naming the smallest ceiling that works, if `needed` exceeds `given`."""
    if needed > given:
        mebibytes = -(-needed // (1 << 20))
        raise BudgetError(
            f"{what} of {format_size(given)} is too small for {name}; the smallest that works is "
            f"{flag} {mebibytes}MiB."
        )
