"""A whole checkpoint, which transformers loads in the way that it loads the MLLM."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lean_merge.checkpoints import (
    TensorReader,
    TensorSpec,
    as_bytes,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.checkpoints.sidefiles import left_out, missing_from_cache
from lean_merge.outputs.base import (
    DECODED_DTYPE,
    Comparison,
    Outcome,
    Output,
    Sink,
    register_kind,
)
from lean_merge.outputs.card import model_card
from lean_merge.outputs.companions import (
    card_facts,
    code_warnings,
    copy_side_files,
    write_report,
)
from lean_merge.outputs.differing import bytes_apart, numbers_apart
from lean_merge.sizes import format_size
from lean_merge.store import (
    Difference,
    OutputFolder,
    Shard,
    Spans,
    WriteBytes,
    plan_shards,
)
from lean_merge.tasks import CopyTask, Note, WeightResult, WeightTask, Written, to_note

_STEP = 1 << 18
"""The count of bytes that are compared at once, which is too small to matter to the budget."""
TOLERATED = 0.001
"""Another machine or library may round this share of a weight's entries differently by more than
one unit in the last place (docs/method.md)."""


class CheckpointSink(Sink):
    """A sink that writes every tensor at its place in the files of an `OutputFolder`.

    Parameters
    ----------
    shards
        The weight files of `folder`.
    folder
        The open folder, which stays unsealed.
    """

    def __init__(self, shards: Sequence[Shard], folder: OutputFolder) -> None:
        self._shards = shards
        self.folder: OutputFolder = folder

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes:
        """Return the function that writes at the tensor's place in its shard."""
        return self.folder.writer(self._shards[task.shard], task.tensor.name)

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Return the note from the folder's journal."""
        return self.folder.finished.get(task.tensor.name)

    def finish(self, task: CopyTask | WeightTask, note: Any) -> None:
        """Note the task in the folder's journal, once the bytes are on the disk."""
        self.folder.finish_tensor(self._shards[task.shard], task.tensor.name, note)

    def flush(self) -> None:
        """Send the written bytes to the disk."""
        self.folder.flush()


class CheckpointComparison(Comparison):
    """A sink that compares a merge's bytes with the stored ones, tile by tile, instead of writing.

    Parameters
    ----------
    shards
        The weight files of the output.
    tasks, stored, reader, sampled
        As `Output.comparison` has them.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tasks: Sequence[CopyTask | WeightTask],
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> None:
        self._shards = shards
        self._tasks = tasks
        self._stored = stored
        self._reader = reader
        self._sampled = sampled
        self._off: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Report that tensors which are not to be compared are done."""
        wanted = isinstance(task, CopyTask) or task.tensor.name in self._sampled
        return None if wanted and task.tensor.name in self._stored else to_note(Note([]))

    def writer(self, task: CopyTask | WeightTask) -> WriteBytes:
        """Return a function that reads where a merge would write, and counts what differs."""
        name = task.tensor.name
        # In a tensor out of scope, every byte is the MLLM's.
        dtype = torch.uint8 if isinstance(task, CopyTask) else torch_dtype(task.tensor.dtype)

        def compare(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            data, done, off, apart = data.cast("B"), 0, 0, 0
            for first, length in spans or [(0, data.nbytes)]:
                for start in range(0, length, _STEP):
                    part = data[done + start : done + min(start + _STEP, length)]
                    there = self._buffer()[: part.nbytes]
                    position = offset + first + start
                    self._reader.read_into(self._stored[name], position, as_bytes(there))
                    here = torch.frombuffer(part, dtype=torch.uint8)
                    if not torch.equal(here, there):
                        off += bytes_apart(here, there)
                        apart += numbers_apart(here.view(dtype), there.view(dtype))
                done += length
            if off:
                with self._lock:
                    before = self._off.get(name, (0, 0))
                    self._off[name] = before[0] + off, before[1] + apart

        return compare

    def _buffer(self) -> Tensor:
        """Return this thread's buffer."""
        found: Tensor | None = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = torch.empty(_STEP, dtype=torch.uint8)
        return found

    def differences(self, elsewhere: Set[str]) -> list[Difference]:
        """Return the differences.

        In tensors in `elsewhere`, entries may differ by one unit in the last place, and a share of
        `TOLERATED` by more.
        """
        found = []
        for task in self._tasks:
            name = task.tensor.name
            off, apart = self._off.get(name, (0, 0))
            file = self._shards[task.shard].file_name
            if isinstance(task, CopyTask) and off:
                found.append(Difference(file, name, f"{off} bytes are not the MLLM's"))
            elif isinstance(task, WeightTask) and name not in elsewhere and off:
                found.append(Difference(file, name, f"{off} bytes are not what the merge gives"))
            elif apart > TOLERATED * _entries(task):
                fault = f"{apart} of {_entries(task)} entries differ by more than a last place"
                found.append(Difference(file, name, fault))
        return found


KEPT_WARNING = 0.9
"""A warning is given below this share of an update that survives rounding."""
KEEPING = "--output lora, --rounding stochastic and --out-dtype float32 keep it"
"""The ways to lose nothing of an update."""


def _entries(task: CopyTask | WeightTask) -> int:
    return task.tensor.nbytes // torch_dtype(task.tensor.dtype).itemsize


@register_kind
class CheckpointOutput(Output):
    """All tensors of the MLLM in safetensors shards, those in scope with their updates added."""

    name: ClassVar[str] = "checkpoint"
    writes_rows: ClassVar[bool] = True
    most_waiting: ClassVar[int] = 2
    compares: ClassVar[bool] = True

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Return the weight files, as large as the recipe wants them."""
        return plan_shards(list(self.tensors.values()), shard_size=self.recipe.shard_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a warning if side files are missing that the output should have."""
        return (*missing_from_cache(self.mllm), *left_out(self.mllm))

    def warnings(self, weights: Sequence[WeightResult]) -> list[str]:
        """Warn of code that was copied, and if rounding lost a large part of an update."""
        stored = [each.stored.kept for each in weights if isinstance(each.stored, Written)]
        kept = [share for share in stored if share is not None]
        low = [share for share in kept if share < KEPT_WARNING]
        told = code_warnings(self.mllm)
        if kept and all(share < 0.01 for share in kept):
            told.append(f"nothing of any update survives rounding to the output dtype; {KEEPING}")
        elif low:
            told.append(
                f"rounding to the output dtype keeps less than {KEPT_WARNING:.0%} of the update in "
                f"{len(low)} of {len(kept)} weights (worst {min(low):.0%}); {KEEPING}"
            )
        return told

    @property
    def bytes_on_disk(self) -> int:
        """Return the bytes of the weight files, and of the side files that are copied."""
        beside = (int(self.mllm.seen[file]["size"]) for file in self.mllm.beside)
        return self.bytes_written + sum(beside)

    @staticmethod
    def waiting_bytes(update: int, rank: int, kept: int) -> int:
        """Return the bytes of two updates, and those that one more weight keeps."""
        return 2 * update + kept

    def described(self, *, written: int, disk: int) -> str:
        """Return a description for people, in a few words."""
        return f"{len(self.shards)} shard(s), {format_size(written)} on disk"

    def sink(self, folder: OutputFolder | None) -> CheckpointSink:
        """Return a sink that writes into the shards of `folder`."""
        assert folder is not None
        for file in self.mllm.beside:
            folder.side_file(file.relative_to(self.mllm.path).as_posix())
        return CheckpointSink(self.shards, folder)

    def end(self, folder: OutputFolder, outcome: Outcome) -> None:
        """Write the MLLM's side files, the card, recipe and report."""
        wanted = self.recipe.out_dtype
        copy_side_files(
            self.mllm.path,
            self.mllm.beside,
            folder,
            out_dtype=None if wanted == "auto" else wanted,
            decoded=safetensors_dtype(DECODED_DTYPE) if self.mllm.encodings else None,
        )
        card = model_card(card_facts(self, outcome))
        folder.write_file("README.md", card.encode())
        write_report(self, folder, outcome)

    def comparison(
        self,
        tasks: Sequence[CopyTask | WeightTask],
        *,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: Set[str],
    ) -> CheckpointComparison:
        """Return what compares tensors out of scope, and those in scope that are sampled."""
        return CheckpointComparison(self.shards, tasks, stored, reader, sampled)
