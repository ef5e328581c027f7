"""How many bytes a task reads, as a function of what the data decide.

The plan evaluates it at the fewest and the most passes that there may be, the engine at those that
were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lean_merge.mapping import LogicalWeight, WeightSource
from lean_merge.methods import Looks
from lean_merge.tasks import CopyTask, WeightTask, formed_from
from lean_merge.tasks.tiles import row_tiles, sampled_rows


@dataclass(frozen=True, slots=True)
class Course:
    """What the data decide of how often the rows of one logical weight are read.

    Attributes
    ----------
    looks
        For each pass of its analysis, which task vectors that asked for.
    added
        Which task vectors the update adds whole; empty for none.
    recalled : int
        Bytes of stored evidence in the place of an analysis.
    """

    looks: Looks = ()
    added: tuple[bool, ...] = ()
    recalled: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a plan decides of it for all weights.

    Attributes
    ----------
    rows : bool
        Whether the MLLM's rows are read once more, to be written, and other tensors copied.
    on_cpu : bool
        Whether tiles that stay serve the update too: those on a device are not brought back.
    samples : bool
        Whether the norm of each weight that is analysed is taken from the base's first rows.
    """

    rows: bool
    on_cpu: bool
    samples: bool

    def copied(self, task: CopyTask) -> int:
        """Bytes that a task out of scope reads."""
        if not self.rows:
            return 0
        if not task.decoded:
            return task.source.nbytes
        return sum(each.loaded + each.nbytes(slice(0, each.shape[0])) for each in task.decoded)

    def merged(self, task: WeightTask, courses: Sequence[Course]) -> int:
        """Bytes that a task in scope reads if its logical weights take these courses."""
        parts = zip(task.weight.slices, task.resident, courses, strict=True)
        return sum(self._weight(weight, resident, course) for weight, resident, course in parts)

    def _weight(self, weight: LogicalWeight, resident: int, course: Course) -> int:
        total = course.recalled + sum(source.loaded for source in weight.roles)
        tiles = list(row_tiles(weight.shape))
        kept = tiles[:resident] if course.looks else []
        again = tiles[len(kept) :]
        # Tiles that stay are formed in the first pass, whichever it asks for.
        total += _bytes(formed_from(weight, [True] * len(weight.others)), kept)
        total += sum(_bytes(formed_from(weight, look), again) for look in course.looks)
        if self.samples and course.looks:
            total += weight.base.nbytes(slice(0, sampled_rows(weight.shape)))
        if self.rows:
            total += _bytes([weight.mllm], tiles)
            total += _bytes(formed_from(weight, course.added), again if self.on_cpu else tiles)
        return total


def _bytes(sources: Sequence[WeightSource], tiles: Iterable[slice]) -> int:
    """What reading these tiles once reads."""
    return sum(source.nbytes(rows) for rows in tiles for source in sources)
