"""Reading an output again: against its journal, against the MLLM, and against the merge itself."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lean_merge.checkpoints import (
    TensorReader,
    TensorSpec,
    as_bytes,
    identify,
    torch_dtype,
)
from lean_merge.engine.results import WeightResult, from_note, to_note
from lean_merge.engine.run import Event, run
from lean_merge.engine.sinks import Sink, Spans, Stored, Tools, begin_copy, output_rows
from lean_merge.engine.taskvectors import TaskVectors
from lean_merge.engine.tilestore import WriteBytes
from lean_merge.engine.update import write_rows
from lean_merge.errors import CheckpointError, LeanMergeError
from lean_merge.gathering import Gathered
from lean_merge.identity import environment
from lean_merge.methods import Decision
from lean_merge.output import Difference, FolderCheck, Journal, check_folder
from lean_merge.plan import Plan, plan_again
from lean_merge.plan import plan as make_plan
from lean_merge.recipe import MergeRecipe
from lean_merge.resources import Resources
from lean_merge.tasks import CopyTask, WeightTask

_STEP = 1 << 18
"""Bytes that are compared at once: so few that no budget need count them."""
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
LEAST_SAMPLE = 8
SAMPLE_SHARE = 0.05
TOLERATED = 0.001
"""Share of a weight's entries that another machine or library may round differently by more than
one unit in the last place (docs/method.md)."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    path
        The output.
    differences
        What is not as it was written, or not what the merge gives; none if all is well.
    files, tensors
        How many files and tensors were read and agree with the journal.
    copied
        How many tensors out of scope were compared with the MLLM's.
    recomputed
        Names of the tensors in scope that were merged again.
    in_scope
        How many there are.
    seed
        Of the sample.
    exact
        Whether merging again gives the same bytes here, so that none may differ.
    notes
        Why it does not, or what was left out.
    """

    path: Path
    differences: tuple[Difference, ...]
    files: int
    tensors: int
    copied: int
    recomputed: tuple[str, ...]
    in_scope: int
    seed: int
    exact: bool
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def verify(
    out: str | Path,
    *,
    full: bool = False,
    seed: int | None = None,
    with_inputs: bool = True,
    resources: Resources | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Verification:
    """Read an output again, all of it, and say what differs.

    Every file is compared with the journal, every tensor out of scope with the MLLM's bytes, and a
    sample of those in scope is merged again: a twentieth of them, but at least 8.

    Parameters
    ----------
    out
        A complete output.
    full
        Merge all again.
    seed
        Of the sample; by default another one each time.
    with_inputs
        Read the inputs; else only the output is, and compared with its journal.
    resources
        Device, memory and threads for merging again.
    on_event
        Called after each tensor that was compared with the inputs.

    Raises
    ------
    CheckpointError
        There is no complete output with a journal, or an input is gone or not what was merged.
    LeanMergeError
        Others as `plan` and `merge` raise them.
    """
    folder = Path(out).expanduser().resolve()
    chosen = secrets.randbelow(2**32) if seed is None else seed
    check = check_folder(folder, lambda count: None)
    result = Verification(
        path=folder,
        differences=tuple(check.differences),
        files=check.files,
        tensors=len(check.tensors),
        copied=0,
        recomputed=(),
        in_scope=0,
        seed=chosen,
        exact=True,
        notes=(),
    )
    if check.journal is None:
        return result
    if not with_inputs:
        return replace(result, notes=("the inputs were not read",))
    try:
        return _with_inputs(result, check, full, resources, on_event or (lambda event: None))
    except LeanMergeError as error:
        if result.ok:
            raise
        # What was found already must not be hidden behind what else is wrong.
        return replace(result, notes=(f"the inputs could not be compared: {error}",))


def _with_inputs(
    result: Verification,
    check: FolderCheck,
    full: bool,
    resources: Resources | None,
    on_event: Callable[[Event], None],
) -> Verification:
    assert check.journal is not None
    facts = check.journal.start["run"]
    recipe = _recipe(check.journal, result.path)
    if recipe.output != "checkpoint":
        return replace(result, notes=("only checkpoints are compared with the inputs",))
    plan, then = _plan(recipe, facts, resources)
    _check_inputs(plan, facts)
    names = {name for shard in plan.shards for name in shard.offsets}
    if names != check.journal.tensors.keys():
        raise CheckpointError(
            f"{result.path}: this version of lean-merge plans other tensors from the recipe than "
            "the output has; verify with the version in its journal, or with --without-inputs."
        )
    notes = _other_machine(then, environment(plan.device))
    in_scope = [task.tensor.name for task in plan.weights]
    count = max(LEAST_SAMPLE, -(-len(in_scope) * SAMPLE_SHARE // 1))
    sampled = in_scope
    if not full and count < len(in_scope):
        picked = set(random.Random(result.seed).sample(in_scope, int(count)))
        sampled = [name for name in in_scope if name in picked]
    with TensorReader() as reader:
        sink = ComparingSink(plan, check.tensors, reader, set(sampled))
        found = run(plan, sink, on_event)
    # Once here and once there, the CPU may have stood in for a device that ran out of memory.
    notes_of_merge = (from_note(each.get("result")) for each in check.journal.tensors.values())
    merged = [weight for note in notes_of_merge if note is not None for weight in note[0]]
    elsewhere = _on_cpu_instead(merged) | _on_cpu_instead(found.weights)
    return replace(
        result,
        differences=(
            *result.differences,
            *sink.differences(set(in_scope) if notes else elsewhere),
        ),
        copied=sum(task.tensor.name in check.tensors for task in plan.copies),
        recomputed=tuple(name for name in sampled if name in check.tensors),
        in_scope=len(in_scope),
        exact=not notes,
        notes=tuple(notes),
    )


def _on_cpu_instead(weights: Iterable[WeightResult]) -> set[str]:
    return {weight.name for weight in weights if weight.fallback and weight.fallback.on_cpu}


def _recipe(journal: Journal, folder: Path) -> MergeRecipe:
    """The recipe, its models where the journal saw them from the output, else as named."""
    facts = journal.start["run"]
    roles = [each["role"] for each in facts.get("inputs", ())]
    count = len(facts.get("recipe", {}).get("experts", ()))
    if roles != ["base", "mllm", *(f"expert {number}" for number in range(1, count + 1))]:
        raise CheckpointError(
            f"{folder}: its journal does not tell recipe and inputs, so it can only be verified "
            "with --without-inputs."
        )
    recipe = MergeRecipe.from_dict(facts["recipe"])
    places = {each["role"]: folder / each["path"] for each in facts["inputs"]}

    def found(role: str, source: str) -> str:
        place = places[role]
        if Path(source).suffix in _WEIGHT_FILES:
            place = place / Path(source).name
        return str(place) if place.exists() else source

    experts = tuple(
        replace(expert, model=found(f"expert {number}", expert.model))
        for number, expert in enumerate(recipe.experts, 1)
    )
    return replace(
        recipe,
        base_model=found("base", recipe.base_model),
        mllm_model=found("mllm", recipe.mllm_model),
        experts=experts,
    )


def _check_inputs(plan: Plan, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the inputs' weight files are those that were merged.

    Times do not count, so that copies elsewhere will do.
    """
    then = {each["role"]: each["files"] for each in facts["inputs"]}
    roles = {"base": plan.base, "mllm": plan.mllm}
    roles |= {f"expert {number}": each for number, each in enumerate(plan.experts, 1)}
    for role, checkpoint in roles.items():
        now = _headers(identify(checkpoint))
        if now != _headers(then[role]):
            raise CheckpointError(
                f"{checkpoint.path}: is not the {role} that was merged, for its weight files have "
                "other names, lengths or headers; restore it, or pass --without-inputs."
            )


def _plan(
    recipe: MergeRecipe, facts: Mapping[str, Any], resources: Resources | None
) -> tuple[Plan, Mapping[str, str]]:
    """The merge's plan and environment; one from an analysis gathers its evidence anew."""
    then, analysis = facts.get("environment", {}), facts.get("analysis")
    if not isinstance(analysis, dict):
        return make_plan(recipe, resources), then
    plan = plan_again(recipe, Gathered.from_dict(analysis.get("gathered")), resources)
    gathered = analysis.get("environment")
    others = gathered.items() if isinstance(gathered, dict) else ()
    # What the analysis was made with decides last bits too.
    return plan, {**then, **{key: value for key, value in others if value != then.get(key)}}


def _headers(files: list[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    return {
        file["name"]: (file["size"], file["header_sha256"])
        for file in files
        if "header_sha256" in file
    }


def _other_machine(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{key} is {now.get(key)}, was {then.get(key)}: last bits may differ"
        for key in [*then, *(key for key in now if key not in then)]
        if then.get(key) != now.get(key)
    ]


class ComparingSink(Sink):
    """Compares what a merge gives with what is stored, tile by tile.

    Parameters
    ----------
    plan
        Of the merge.
    stored
        The output's tensors; others are left out.
    reader
        For them.
    sampled
        Names of the tensors in scope to merge again.
    """

    ahead = True
    reads_rows = True

    def __init__(
        self,
        plan: Plan,
        stored: Mapping[str, TensorSpec],
        reader: TensorReader,
        sampled: set[str],
    ) -> None:
        self._plan = plan
        self._stored = stored
        self._reader = reader
        self._sampled = sampled
        self._off: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def finished(self, task: CopyTask | WeightTask) -> Any:
        """Tensors that are not to be compared count as done."""
        wanted = isinstance(task, CopyTask) or task.tensor.name in self._sampled
        return None if wanted and task.tensor.name in self._stored else to_note([], bytes_read=0)

    def copy(self, task: CopyTask, tools: Tools) -> Callable[[], None]:
        """A tensor out of scope: every byte is the MLLM's."""
        return begin_copy(task, self._comparer(task, tools), tools)

    def update(
        self, task: WeightTask, vectors: TaskVectors, decision: Decision, tools: Tools
    ) -> Callable[[], Stored]:
        """A weight, merged again."""
        output = output_rows(self._plan, task, self._comparer(task, tools))
        return write_rows(vectors, decision, output, reader=tools.reader, workers=tools.workers)

    def _comparer(self, task: CopyTask | WeightTask, tools: Tools) -> WriteBytes:
        """What stands in for writing: reads what is stored there, and counts what differs."""
        name = task.tensor.name
        kinds = (torch.uint8, torch_dtype(task.tensor.dtype))
        if isinstance(task, CopyTask):
            kinds = (torch.uint8, torch.uint8)

        def compare(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            data, done, off = data.cast("B"), 0, [0, 0]
            for first, length in spans or [(0, data.nbytes)]:
                for start in range(0, length, _STEP):
                    part = data[done + start : done + min(start + _STEP, length)]
                    room = tools.workers.buffer("stored", (part.nbytes,), torch.uint8)
                    position = offset + first + start
                    self._reader.read_into(self._stored[name], position, as_bytes(room))
                    if not torch.equal(torch.frombuffer(part, dtype=torch.uint8), room):
                        for number, kind in enumerate(kinds):
                            of_merge = torch.frombuffer(part, dtype=kind)
                            off[number] += _apart(of_merge, room.view(kind))
                done += length
            if off[0]:
                with self._lock:
                    before = self._off.get(name, (0, 0))
                    self._off[name] = before[0] + off[0], before[1] + off[1]

        return compare

    def differences(self, elsewhere: set[str]) -> list[Difference]:
        """What was found.

        In tensors that were merged by other arithmetic, `elsewhere`, entries may differ by one unit
        in the last place, and `TOLERATED` of them by more.
        """
        found = []
        for task in self._plan.tasks:
            name = task.tensor.name
            off, apart = self._off.get(name, (0, 0))
            file = self._plan.shards[task.shard].file_name
            if isinstance(task, CopyTask) and off:
                found.append(Difference(file, name, f"{off} bytes are not the MLLM's"))
            elif isinstance(task, WeightTask) and name not in elsewhere and off:
                found.append(Difference(file, name, f"{off} bytes are not what the merge gives"))
            elif apart > TOLERATED * _entries(task):
                fault = f"{apart} of {_entries(task)} entries differ by more than a last place"
                found.append(Difference(file, name, fault))
        return found


def _entries(task: CopyTask | WeightTask) -> int:
    return task.tensor.nbytes // torch_dtype(task.tensor.dtype).itemsize


def _apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many bytes differ, or how many floating-point numbers by more than one last place."""
    if one.dtype == torch.uint8:
        return int((one != other).sum())
    return int(((_rank(one) - _rank(other)).abs() > 1).sum())


def _rank(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers' places in the order of all numbers of their dtype, as int64; both zeros are 0."""
    width = numbers.element_size() * 8
    kind = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    bits = numbers.view(kind).long()
    return torch.where(bits < 0, -(bits + (1 << (width - 1))), bits)


__all__ = ["ComparingSink", "Verification", "verify"]
