"""Read an output again, and compare it with its journal, with the MLLM and with the merge."""

from __future__ import annotations

import json
import math
import random
import re
import secrets
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lean_merge.checkpoints import TensorReader, identify
from lean_merge.checkpoints.patterns import bounded_pattern
from lean_merge.checkpoints.safepaths import resolved
from lean_merge.engine import CREW, Event, run
from lean_merge.errors import CheckpointError, LeanMergeError, shown
from lean_merge.outputs import RECIPE, Output, all_outputs, output_of
from lean_merge.outputs.gathered import Gathered, found_thresholds
from lean_merge.plan import Plan, plan_again
from lean_merge.plan import plan as make_plan
from lean_merge.plan.resources import Resources
from lean_merge.plan.runfacts import environment
from lean_merge.plan.scope import COMPILER
from lean_merge.recipe import ANY, Filtered, MergeRecipe
from lean_merge.recipe.yamlfile import MAX_TEXT
from lean_merge.store import Difference, Journal
from lean_merge.store.check import FolderCheck, check_folder
from lean_merge.tasks import WeightResult, from_note

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
LEAST_SAMPLE = 8
SAMPLE_SHARE = 0.05
_MOST_PATTERNS = 256


@dataclass(frozen=True, slots=True)
class Verification:
    """The findings of `verify`.

    Attributes
    ----------
    path
        The output.
    differences
        The differences from what was written, or from what the merge gives; empty if all is well.
    files, tensors
        The numbers of files and tensors that were read and agree with the journal.
    copied
        The number of tensors out of scope that were compared with the MLLM's.
    recomputed
        The names of the tensors in scope that were merged again.
    in_scope
        The number of tensors in scope.
    seed
        The seed by which the sample was drawn.
    exact
        Whether merging again must give the same bytes on this machine, so that none may differ.
    repair
        The command that makes the output anew, as far as it is known; None if nothing differs.
    notes
        Sentences that say why merging again may differ, or what was left out.
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
    repair: str | None = None

    @property
    def ok(self) -> bool:
        """Return whether nothing differs."""
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
        Whether to merge all tensors in scope again.
    seed
        The seed by which the sample is drawn; by default another one each time.
    with_inputs
        Whether to read the inputs too; else only the output is read, and compared with its journal.
    resources
        Device, memory and threads for merging again.
    on_event
        A function that is called after each tensor that was compared with the inputs.

    Raises
    ------
    CheckpointError
        There is no complete output with a journal, or an input is missing or has changed.
    LeanMergeError
        The errors are those of `plan` and `merge`.
    """
    folder = resolved(out)
    chosen = secrets.randbelow(2**32) if seed is None else seed
    crew = CREW.get()
    if crew is None:
        check = check_folder(folder, lambda count: None)
    else:
        first = check_folder(folder, lambda count: None) if crew.leads else None
        chosen, found = crew.gather((chosen, first))[0]
        assert found is not None
        check = found
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
    if check.journal is not None and not with_inputs:
        result = replace(result, notes=("the inputs were not read",))
    elif check.journal is not None:
        try:
            result = _with_inputs(result, check, full, resources, on_event or (lambda event: None))
        except LeanMergeError as error:
            if result.ok:
                raise
            # Differences that were found already must not be hidden by this error.
            result = replace(result, notes=(f"the inputs could not be compared: {error}",))
    return result if result.ok else replace(result, repair=_repair(result, check))


def _repair(result: Verification, check: FolderCheck) -> str | None:
    """Return the command that makes an output anew, from its own recipe if that is whole."""
    folder, file = result.path, result.path / RECIPE
    if not file.is_file() or any(each.file == RECIPE for each in result.differences):
        return None
    words = ["merge", str(file)]
    if check.journal is not None:
        facts, moved = check.journal.start["run"], []
        try:
            found = _recipe(check.journal, folder)
            named = MergeRecipe.from_dict(facts["recipe"])
            kind = _kind(named, facts)
        except LeanMergeError:
            return None
        if kind is None:
            return None
        mllm = found.mllm_model or ""
        # Paths in a recipe are those from the folder in which the merge was started.
        for flag, now, then in (
            ("--base", found.base_model, named.base_model),
            *([] if named.mllm_model is None else [("--mllm", mllm, named.mllm_model)]),
            *(
                ("--expert", now.model, now.model if now.parameters or now.parent else then.model)
                for now, then in zip(found.experts, named.experts, strict=True)
            ),
        ):
            moved += [flag, now] if now != then else []
        words = kind.command(file, found, moved, facts)
    words[2:2] = ["--out", str(folder), "--overwrite"]
    return shlex.join(["lean-merge", *words])


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
    _check_patterns(recipe, result.path)
    kind = _kind(recipe, facts)
    if kind is None or not kind.compares:
        return replace(result, notes=("numbers alone are not compared with the inputs",))
    evidence = facts.get("analysis") or check.journal.analysis
    compiler = COMPILER.set(bounded_pattern)
    try:
        plan, then = _plan(recipe, facts, evidence, resources, kind.again(facts))
    finally:
        COMPILER.reset(compiler)
    _check_inputs(plan, facts)
    _check_names(plan, check.journal, result.path)
    notes = _other_machine(then, environment(plan.device))
    in_scope = [task.tensor.name for task in plan.weights]
    sampled = set(in_scope)
    if not full:
        parts = _parts(plan, check.journal)
        sampled = {name for part in parts for name in _sample(part, result.seed)}
    sampled -= _damaged(plan, check)
    with TensorReader() as reader:
        comparison = plan.output.comparison(
            plan.tasks, stored=check.tensors, reader=reader, sampled=sampled
        )
        found = run(plan, comparison, on_event)
    # In either run, the CPU may have replaced a device that ran out of memory.
    records = (*check.journal.tensors.values(), *check.journal.groups.values())
    results = [each.get("result") for each in records]
    plain = [r["note"] if isinstance(r, dict) and "note" in r else r for r in results]
    notes_of_merge = map(from_note, plain)
    merged = [weight for note in notes_of_merge if note is not None for weight in note[0]]
    elsewhere = _on_cpu_instead(merged) | _on_cpu_instead(found.weights)
    differences = comparison.differences(set(in_scope) if notes else elsewhere)
    if (crew := CREW.get()) is not None:
        differences = [each for own in crew.gather(differences) for each in own]
    return replace(
        result,
        differences=(*result.differences, *differences),
        copied=sum(task.tensor.name in check.tensors for task in plan.copies),
        recomputed=tuple(name for name in in_scope if name in sampled),
        in_scope=len(in_scope),
        exact=not notes,
        notes=tuple(notes),
    )


def _kind(recipe: MergeRecipe, facts: Mapping[str, Any]) -> type[Output] | None:
    """Return the kind of output that a journal tells; None if this version has no such kind."""
    if "kind" not in facts:
        return output_of(recipe.output)
    kinds = all_outputs().values()
    return next((each for each in kinds if each.called == facts["kind"]), None)


def _plan(
    recipe: MergeRecipe,
    facts: Mapping[str, Any],
    analysis: Any,
    resources: Resources | None,
    kind: type[Output],
) -> tuple[Plan, Mapping[str, str]]:
    """Plan the merge again, and return the environment that it had.

    A merge from an analysis gathers its evidence anew.
    """
    then = facts.get("environment", {})
    if not isinstance(analysis, dict):
        return make_plan(recipe, resources, output=kind), then
    gathered = Gathered.from_dict(analysis.get("gathered"))
    thresholds = found_thresholds(analysis.get("thresholds"), len(recipe.experts))
    plan = plan_again(recipe, gathered, resources, thresholds=thresholds)
    environment = analysis.get("environment")
    others = environment.items() if isinstance(environment, dict) else ()
    # The environment of the analysis decides last bits too.
    return plan, {**then, **{key: value for key, value in others if value != then.get(key)}}


def _check_names(plan: Plan, journal: Journal, folder: Path) -> None:
    """Raise CheckpointError if the plan cannot be that of the output."""
    if not plan.output.can_hold(journal.tensors.keys()):
        raise CheckpointError(
            f"{folder}: this version of lean-merge plans other tensors from the recipe than the "
            "output has; verify with the version in its journal, or with --without-inputs."
        )


def _damaged(plan: Plan, check: FolderCheck) -> set[str]:
    """Return the tensors in scope whose bytes in the output have changed, which needs no merge."""
    assert check.journal is not None
    changed = check.journal.tensors.keys() - check.tensors.keys()
    return {task.tensor.name for task in plan.weights if changed & {*plan.output.names(task)}}


def _parts(plan: Plan, journal: Journal) -> list[list[str]]:
    """Divide the tensors in scope into two parts, from each of which a sample is drawn.

    One part holds the tensors for which an adapter has no factors, the other holds all others.
    """
    parts: tuple[list[str], list[str]] = [], []
    for task in plan.weights:
        stored = any(key in journal.tensors for key in plan.output.names(task))
        parts[stored].append(task.tensor.name)
    return list(parts)


def _sample(names: Sequence[str], seed: int) -> Sequence[str]:
    """Draw a twentieth of the names, but at least 8."""
    count = max(LEAST_SAMPLE, math.ceil(len(names) * SAMPLE_SHARE))
    return names if count >= len(names) else random.Random(seed).sample(names, count)


def _on_cpu_instead(weights: Iterable[WeightResult]) -> set[str]:
    return {weight.name for weight in weights if weight.fallback and weight.fallback.on_cpu}


def _recipe(journal: Journal, folder: Path) -> MergeRecipe:
    """Return the recipe; a model has the place that the journal names if it is there."""
    facts = journal.start["run"]
    try:
        told = facts["recipe"]
        receivers = ["base", "mllm"] if "mllm_model" in told else ["base"]
        numbered = {f"expert {n}": each for n, each in enumerate(told["experts"], 1)}
        parents = [f"parent of {role}" for role, each in numbered.items() if "parent" in each]
        roles = [*receivers, *numbered, *parents]
        places = {str(each["role"]): folder / each["path"] for each in facts["inputs"]}
        far = {
            str(each["role"]): str(each["path"])
            for each in facts["inputs"]
            if "://" in each["path"]
        }
        files = [_headers(each["files"]) for each in facts["inputs"]]
        long = len(json.dumps(told)) > MAX_TEXT
        strange = not isinstance(facts.get("environment", {}), dict) or not all(files) or long
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        places, far, roles, strange = {}, {}, [], True
    if strange or list(places) != roles:
        raise CheckpointError(
            f"{folder}: its journal does not tell recipe and inputs as ours do, so it can only be "
            "verified with --without-inputs."
        )
    recipe = MergeRecipe.from_dict(facts["recipe"])

    def found(role: str, source: str) -> str:
        place = places[role]
        if role in far:
            # The commit that was merged, whatever the revision means today.
            return far[role]
        if Path(source).suffix in _WEIGHT_FILES:
            place = place / Path(source).name
        return str(place) if place.exists() else source

    experts = tuple(
        replace(
            expert,
            model=found(f"expert {number}", expert.model),
            parent=expert.parent and found(f"parent of expert {number}", expert.parent),
        )
        for number, expert in enumerate(recipe.experts, 1)
    )
    return replace(
        recipe,
        base_model=found("base", recipe.base_model),
        mllm_model=recipe.mllm_model and found("mllm", recipe.mllm_model),
        experts=experts,
    )


def _check_patterns(recipe: MergeRecipe, folder: Path) -> None:
    """Raise CheckpointError for patterns that could be matched for ever; nobody has read them."""
    values = [recipe.parameters, *(expert.parameters for expert in recipe.experts)]
    filters = [each for own in values for _, value in own for each in _filters(value)]
    filters += [*recipe.include, *recipe.exclude]
    names = [pattern for rules in recipe.name_rules().values() for pattern, _ in rules]
    many = len(filters) + len(names) > _MOST_PATTERNS
    for text in (*filters, *names):
        try:
            pattern = bounded_pattern(text)
            fault = "cannot be matched in a bounded time"
            wrong = many or (text in names and not isinstance(pattern, re.Pattern))
        except ValueError as error:
            fault, wrong = str(error), True
        if wrong:
            raise CheckpointError(
                f"{folder}: the pattern {shown(text)} of the recipe in its journal {fault}; verify "
                "with --without-inputs, or merge by a recipe that you have read."
            )


def _filters(value: Any) -> list[str]:
    entries = value if isinstance(value, tuple) else ()
    return [each.filter for each in entries if isinstance(each, Filtered) and each.filter != ANY]


def _check_inputs(plan: Plan, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the inputs' weight files are those that were merged.

    Times are not compared, so that copies elsewhere are accepted.
    """
    then = {each["role"]: each["files"] for each in facts["inputs"]}
    for role, checkpoint in plan.roles.items():
        now = _headers(identify(checkpoint))
        if now != _headers(then[role]):
            raise CheckpointError(
                f"{checkpoint.path}: is not the {role} that was merged, for its weight files have "
                "other names, lengths or headers; restore it, or pass --without-inputs."
            )


def _headers(files: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
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


__all__ = ["Verification", "verify"]
