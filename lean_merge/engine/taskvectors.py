"""Form the task vectors of one logical weight in tiles, and compute their products in passes.

Some tiles stay resident in memory; the others are read again for every pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from operator import add

import torch
from torch import Tensor

from lean_merge.checkpoints import TensorReader, WeightSource
from lean_merge.engine.device import Parcel, Sender
from lean_merge.engine.sums import InnerSums, Sums
from lean_merge.engine.workers import Workers
from lean_merge.errors import DataError
from lean_merge.linalg import Pass, Products
from lean_merge.mapping import LogicalWeight
from lean_merge.methods import Update
from lean_merge.tasks.tiles import LANES, STRIP_ELEMENTS, row_tiles, strips

_UNDERFLOWN = 1e-30
"""Below this, a squared norm in float32 may have lost terms that underflowed."""


class TaskVectors:
    """The task vectors W_role - W_0 of the MLLM and every expert, in tiles of rows.

    For methods that take no differences, the weights W_role themselves are in their place.

    Parameters
    ----------
    weight
        The logical weight, which tells where its numbers are stored.
    reader, workers
        The reader of the files, and the threads that compute.
    arena : Tensor, uint8, 1-D
        Reused memory for resident tiles, on the device that computes.
    resident : int
        How many tiles, from the first, to keep in the arena.
    task_dtype, dtype : torch.dtype
        The dtypes of the task vectors, and of products with them.
    uploader, landing
        The uploader that brings tiles to the device, and memory there for tiles that are not
        resident; the uploader is None if the CPU computes.
    differences
        Whether W_0 is subtracted.
    """

    def __init__(
        self,
        weight: LogicalWeight,
        *,
        reader: TensorReader,
        workers: Workers,
        arena: Tensor,
        resident: int,
        task_dtype: torch.dtype,
        dtype: torch.dtype,
        uploader: Sender | None = None,
        landing: Sequence[Tensor] = (),
        differences: bool = True,
    ) -> None:
        self._differences = differences
        self.weight = weight.load(reader)
        self.shape = weight.shape
        self.dtype = dtype
        self.device = arena.device
        self.task_dtype = task_dtype
        self._reader = reader
        self._workers = workers
        self._uploader = uploader
        self._landing = landing
        self.tiles = list(row_tiles(self.shape))
        self._resident = self._lay_out(arena, min(resident, len(self.tiles)))
        self._formed = [False] * len(self.tiles)
        self.update_passes = 0
        self._squares: list[list[float | None]] = [[None] * len(weight.others) for _ in self.tiles]

    def _lay_out(self, arena: Tensor, count: int) -> list[list[Tensor]]:
        views, offset = [], 0
        for tile in self.tiles[:count]:
            shape = (tile.stop - tile.start, self.shape[1])
            size = math.prod(shape) * self.task_dtype.itemsize
            of_tile = []
            for _ in self.weight.others:
                of_tile.append(arena[offset : offset + size].view(self.task_dtype).view(shape))
                offset += size
            views.append(of_tile)
        return views

    @property
    def lanes(self) -> range:
        """Return the lanes that get at least one tile."""
        return range(min(LANES, len(self.tiles)))

    @property
    def stays(self) -> bool:
        """Return whether any tile stays in the arena."""
        return bool(self._resident)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory on the device that computes; on the CPU, each thread reuses its buffer."""
        if self.device.type == "cpu":
            return self._workers.buffer(name, shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def leave_device(self) -> None:
        """Release the memory on another device, and from now on form tiles on the CPU.

        Writing needs few tiles, and the files' bytes are still in the page cache.
        """
        if self._uploader is not None:
            self._uploader, self._landing, self._resident = None, (), []
            self._formed = [False] * len(self.tiles)
            self.device = torch.device("cpu")

    def squared_norms(self) -> list[float]:
        """Return ||W_role - W_0||_F^2 for every role; NaN if not all its tiles were formed."""
        if not self._differences:
            return [math.nan] * len(self.weight.others)
        return [
            math.fsum(math.nan if square is None else square for square in of_role)
            for of_role in zip(*self._squares, strict=True)
        ]

    def tile(self, index: int, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return one tile's wanted task vectors; they are valid until this thread's next call."""
        if index < len(self._resident):
            if not self._formed[index]:
                self._form(index, self._resident[index])
                self._formed[index] = True
            return [*self._resident[index]]
        out = self._borrow(self.tiles[index], wanted)
        self._form(index, out)
        return out

    def tile_strips(
        self, index: int, wanted: Sequence[bool]
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Yield one tile's strips with their rows of wanted task vectors, valid until the next."""
        tile, sources = self.tiles[index], (self.weight.base, *self.weight.others)
        turned = index < len(self._resident) or any(source.in_columns for source in sources)
        whole = any(wanted) and turned
        given = self.tile(index, wanted) if whole else []
        squares = [0.0] * len(wanted)
        for rows in strips(tile, self.shape[1], STRIP_ELEMENTS):
            if whole:
                at = slice(rows.start - tile.start, rows.stop - tile.start)
                yield rows, [None if each is None else each[at] for each in given]
                continue
            given = self._borrow(rows, wanted)
            if any(wanted):
                squares = [*map(add, squares, self._subtract(rows, given))]
            yield rows, given
        if not whole:
            self._note_squares(index, given, squares)

    def _borrow(self, rows: slice, wanted: Sequence[bool]) -> list[Tensor | None]:
        shape = rows.stop - rows.start, self.shape[1]
        return [
            self._workers.buffer(f"task {role}", shape, self.task_dtype) if is_wanted else None
            for role, is_wanted in enumerate(wanted)
        ]

    def _tile_shape(self, index: int) -> tuple[int, int]:
        tile = self.tiles[index]
        return tile.stop - tile.start, self.shape[1]

    def _form(self, index: int, out: Sequence[Tensor | None]) -> None:
        """Write the task vectors of one tile to `out` on the CPU, and keep their squared norms."""
        self._note_squares(index, out, self._subtract(self.tiles[index], out))

    def _note_squares(
        self, index: int, out: Sequence[Tensor | None], squares: Sequence[float]
    ) -> None:
        for role, task_vector in enumerate(out):
            if task_vector is not None:
                self._squares[index][role] = squares[role]

    def _subtract(self, tile: slice, out: Sequence[Tensor | None]) -> list[float]:
        """Write the task vectors' rows to `out` strip by strip, and return their squared norms."""
        squares = [0.0] * len(out)
        whole = self._turn(tile, out)
        for rows in strips(tile, self.shape[1], STRIP_ELEMENTS):
            base: Tensor | None = None
            for role, source in enumerate(self.weight.others):
                into = out[role]
                if into is None:
                    continue
                at = slice(rows.start - tile.start, rows.stop - tile.start)
                strip = into[at]
                own = strip if source.in_columns else self._read(source, rows, "role")
                if source.is_difference == self._differences:
                    strip.copy_(own)
                else:
                    if base is None and whole is not None:
                        base = whole[at]
                    elif base is None:
                        base = self._read(self.weight.base, rows, "base")
                    torch.add(own, base, alpha=-1 if self._differences else 1, out=strip)
                squares[role] += self._squared_norm(strip, source, rows)
        return squares

    def _turn(self, tile: slice, out: Sequence[Tensor | None]) -> Tensor | None:
        """Read a whole tile of each weight whose rows are stored as columns; roles go into `out`.

        Return the base's tile if its rows are stored as columns and any role needs them.
        """
        wanted = [
            (source, into)
            for source, into in zip(self.weight.others, out, strict=True)
            if into is not None
        ]
        for source, into in wanted:
            if source.in_columns:
                into.copy_(source.read(tile, self._reader, self._workers.buffer, "columns"))
        base = self.weight.base
        alone = all(source.is_difference == self._differences for source, _ in wanted)
        if not base.in_columns or alone:
            return None
        shape = (tile.stop - tile.start, self.shape[1])
        whole = self._workers.buffer("base tile", shape, self.task_dtype)
        return whole.copy_(base.read(tile, self._reader, self._workers.buffer, "columns"))

    def _read(self, source: WeightSource, tile: slice, name: str) -> Tensor:
        raw = source.read(tile, self._reader, self._workers.buffer, name)
        if raw.dtype == self.task_dtype:
            return raw
        wide = self._workers.buffer(f"{name} wide", tuple(raw.shape), self.task_dtype)
        return wide.copy_(raw)

    def _squared_norm(self, task_vector: Tensor, source: WeightSource, rows: slice) -> float:
        wide = task_vector
        if task_vector.dtype is not torch.float32:
            # Widen first, in the cache, because reductions that widen take three times as long.
            wide = self._workers.buffer("wide", tuple(task_vector.shape), torch.float32)
            wide.copy_(task_vector)
        square = float(torch.dot(wide.view(-1), wide.view(-1)))
        if square > _UNDERFLOWN and math.isfinite(square):
            return square
        if square <= _UNDERFLOWN and not bool((task_vector != 0).any()):
            return 0.0
        # Finite numbers have squares that overflow or underflow float32, but not float64.
        square = float(torch.linalg.vector_norm(task_vector, dtype=torch.float64)) ** 2
        if not math.isfinite(square):
            self._refuse_non_finite(source, rows)
            name = str(self.task_dtype).removeprefix("torch.")
            raise DataError(
                f"{source.file}: tensor {source.name} differs from the base's by more than {name} "
                "can hold; check both, or convert the checkpoints to float32 first."
            )
        return square

    def _refuse_non_finite(self, source: WeightSource, rows: slice) -> None:
        for suspect in (self.weight.base, *source.parts):
            raw = suspect.read(rows, self._reader, self._workers.buffer, "suspect")
            if not bool(torch.isfinite(raw).all()):
                raise DataError(
                    f"{suspect.file}: tensor {suspect.name} holds NaN or Inf; it cannot be merged. "
                    "Restore the file from its source."
                )

    def run(self, wanted: Sequence[Pass | None]) -> list[Products | None]:
        """Make one pass over the rows for all task vectors together.

        Tile t adds to lane t mod LANES, and the lanes are summed in order. So the result does not
        depend on how many threads there are or on which tiles are resident.
        """
        sums = [Sums(self, role, request) for role, request in enumerate(wanted)]
        inner = InnerSums(self, [request is not None and request.inner for request in wanted])
        if self._uploader is None:
            self._run_lanes(sums, inner)
        else:
            self._run_uploaded(self._uploader, sums, inner)
        finished = [one.finish(row) for one, row in zip(sums, inner.finish(), strict=True)]
        for source, products in zip(self.weight.others, finished, strict=True):
            if products is not None and not products.is_finite():
                raise DataError(
                    f"{source.file}: the task vector of {source.name} is so large that its "
                    "products overflow float32; compare the tensor with the base's, and restore "
                    "the wrong one."
                )
        return finished

    def run_update(self, update: Update, request: Pass) -> Products:
        """Make one pass over the rows of an update of this weight, on the CPU and in float32."""
        self.leave_device()
        self.update_passes += 1
        sums = Sums(self, 0, request, torch.float32)
        self._workers.map(lambda lane: self._run_update_lane(lane, update, sums), self.lanes)
        products = sums.finish(None)
        assert products is not None
        if not products.is_finite():
            source = self.weight.mllm
            raise DataError(
                f"{source.file}: the update of {source.name} is so large that its products "
                "overflow float32; check the numbers of this weight in all checkpoints."
            )
        return products

    def _run_update_lane(self, lane: int, update: Update, sums: Sums) -> None:
        for index in range(lane, len(self.tiles), LANES):
            tile = self.tiles[index]
            whole = self._workers.buffer("update", self._tile_shape(index), torch.float32)
            for rows, given in self.tile_strips(index, update.reads):
                at = slice(rows.start - tile.start, rows.stop - tile.start)
                size = (update.scratch, rows.stop - rows.start, self.shape[1])
                scratch = self._workers.buffer("scratch", size, torch.float32)
                update.rows(rows, given, scratch, whole[at])
            sums.add(lane, tile, whole, first=index < LANES)

    def _run_lanes(self, sums: list[Sums], inner: InnerSums) -> None:
        """Run every lane; with more threads, each task vector of a lane if all tiles stay.

        Reductions count on one thread for each lane.
        """
        wanted = [one.request is not None for one in sums]
        together: list[Sequence[int]] = [range(len(sums))]
        reduces = any(one.request is not None and one.request.reduce is not None for one in sums)
        if self._workers.count > len(self.lanes) and not reduces:
            self._workers.map(lambda index: self.tile(index, wanted), range(len(self._resident)))
            if len(self._resident) == len(self.tiles):
                together = [[role] for role, is_wanted in enumerate(wanted) if is_wanted]

        def run(job: tuple[int, Sequence[int]]) -> None:
            lane, roles = job
            for index in range(lane, len(self.tiles), LANES):
                tile = self.tile(index, wanted)
                self._add(index, tile, sums, roles)
                if roles is together[0]:
                    inner.add(lane, tile)

        self._workers.map(run, [(lane, roles) for roles in together for lane in self.lanes])

    def _add(
        self, index: int, tile: Sequence[Tensor | None], sums: list[Sums], roles: Sequence[int]
    ) -> None:
        """Add the task vectors of `roles` of one tile to the sums of its lane."""
        lane, rows = index % LANES, self.tiles[index]
        for role in roles:
            task_vector = tile[role]
            if task_vector is not None:
                sums[role].add(lane, rows, task_vector, first=index < LANES)

    def _run_uploaded(self, uploader: Sender, sums: list[Sums], inner: InnerSums) -> None:
        """Run all lanes together in the tiles' order, so that each lane gets its tiles in order."""
        wanted = [one.request is not None for one in sums]
        stay = len(self._resident)
        # Of a tile that stays, all task vectors are uploaded, once.
        sent = [[True] * len(sums)] * stay + [wanted] * (len(self.tiles) - stay)
        coming = [n for n in range(len(self.tiles)) if n >= stay or not self._formed[n]]
        parcels = [self._parcel(index, sent[index]) for index in coming]
        with closing(uploader.send(parcels, self._landing)) as arrivals:
            for index in range(len(self.tiles)):
                if index < stay and self._formed[index]:
                    tile: list[Tensor | None] = [*self._resident[index]]
                else:
                    tile = _by_role(next(arrivals), sent[index])
                    self._formed[index] = index < stay
                self._add(index, tile, sums, range(len(sums)))
                inner.add(index % LANES, tile)

    def _parcel(self, index: int, sent: Sequence[bool]) -> Parcel:
        return Parcel(
            fill=lambda views: self._form(index, _by_role(views, sent)),
            count=sum(sent),
            shape=self._tile_shape(index),
            dtype=self.task_dtype,
            targets=self._resident[index] if index < len(self._resident) else (),
        )


def _by_role(task_vectors: Sequence[Tensor], sent: Sequence[bool]) -> list[Tensor | None]:
    coming = iter(task_vectors)
    return [next(coming) if is_sent else None for is_sent in sent]
