"""What must be the same for the bytes of two runs to be the same: recipe, inputs, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lean_merge.checkpoints import Checkpoint, identify
from lean_merge.errors import CheckpointError
from lean_merge.plan import Plan
from lean_merge.plan.resources import arithmetic_dtype
from lean_merge.recipe import MergeRecipe
from lean_merge.store import changed_input, side_files
from lean_merge.version import __version__

Roles = Mapping[str, Checkpoint]


def run_facts(plan: Plan, out: Path) -> dict[str, Any]:
    """The `run` of a journal (docs/durability.md) for a merge of `plan` into `out`.

    Raises
    ------
    CheckpointError
        An input cannot be read.
    """
    facts = {
        "recipe": plan.recipe.to_dict(),
        "recipe_sha256": recipe_digest(plan.recipe),
        "inputs": inputs(plan, out),
        "environment": environment(plan.device),
    }
    if plan.evidence is None or plan.evidence.source is None:
        return facts
    return {**facts, "analysis": plan.evidence.identity}


def recipe_digest(recipe: MergeRecipe) -> str:
    """SHA-256 of the recipe's canonical JSON."""
    text = json.dumps(recipe.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def inputs(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Each role's place, seen from `out`, and files. Raises CheckpointError."""
    roles = by_role(plan.base, plan.mllm, plan.experts)
    final = out.expanduser().resolve()
    return [
        {
            "role": role,
            "path": seen_from(final, checkpoint.path.resolve()),
            "files": identify(
                checkpoint, others=side_files(checkpoint.path) if role == "mllm" else ()
            ),
        }
        for role, checkpoint in roles.items()
    ]


def by_role(base: Checkpoint, mllm: Checkpoint, experts: Sequence[Checkpoint]) -> Roles:
    """Checkpoints by role: "base", "mllm", "expert 1", ..."""
    numbered = {f"expert {number}": each for number, each in enumerate(experts, 1)}
    return {"base": base, "mllm": mllm, **numbered}


def changed_weights(then: Any, roles: Roles) -> str | None:
    """What of the inputs that decide numbers is not as it was, wherever they lie; None if nothing.

    `then`, checked to be lists of roles and files, is what `inputs` told. Raises CheckpointError
    where an input cannot be read.
    """
    now = [{"role": role, "files": identify(each)} for role, each in roles.items()]
    old, new = ([_deciding(entry) for entry in entries] for entries in (then, now))
    if old == new:
        return None
    if [entry["role"] for entry in old] != list(roles):
        return f"the roles were {len(old)}, are {len(new)}"
    for before, entry in zip(old, new, strict=True):
        was = {file["name"]: file for file in before["files"]}
        # Weights first: a folder that was copied has new dates everywhere.
        for file in sorted(entry["files"], key=lambda each: "header_sha256" not in each):
            if file != was.pop(file["name"], None):
                return f"{file['name']} of the {entry['role']} is not the same file"
        if was:
            return f"{next(iter(was))} of the {entry['role']} is gone"
    return None


def check_unchanged(plan: Plan, out: Path, facts: dict[str, Any]) -> None:
    """Raise CheckpointError if an input is not what it was when the merge began."""
    now = inputs(plan, out)
    if now != facts["inputs"]:
        change = changed_input(facts["inputs"], now)
        raise CheckpointError(
            f"{out}: is not sealed, because {change}, while it was read; merge again with "
            "--no-resume once nothing changes it any more."
        )


def _deciding(entry: dict[str, Any]) -> dict[str, Any]:
    files = [
        file
        for file in entry.get("files", ())
        if "header_sha256" in file or file.get("name") in ("config.json", "adapter_config.json")
    ]
    return {"role": entry.get("role"), "files": files}


def seen_from(folder: Path, path: Path) -> str:
    """A path relative to a folder, as journals name it; whole where that cannot be."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        # Another drive.
        return path.as_posix()


def environment(device: str) -> dict[str, str]:
    """What decides the last bits of arithmetic on `device`."""
    facts = {
        "lean_merge": __version__,
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "scipy": _version("scipy"),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "bfloat16_products": str(arithmetic_dtype(torch.bfloat16, device)).removeprefix("torch."),
    }
    if torch.device(device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name(torch.device(device))
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
