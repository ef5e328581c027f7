"""Collect the facts by which two runs write the same bytes: recipe, inputs and machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lean_merge.checkpoints import identify
from lean_merge.checkpoints.identity import by_role
from lean_merge.checkpoints.sidefiles import side_files
from lean_merge.errors import CheckpointError
from lean_merge.plan import Plan
from lean_merge.plan.resources import arithmetic_dtype
from lean_merge.recipe import MergeRecipe
from lean_merge.store import changed_input
from lean_merge.version import __version__


def run_facts(plan: Plan, out: Path) -> dict[str, Any]:
    """Return the journal's `run` (docs/durability.md) for an output of `plan` in the folder `out`.

    Raises
    ------
    CheckpointError
        An input cannot be read.
    """
    facts = {
        "recipe": plan.recipe.to_dict(),
        "recipe_sha256": recipe_digest(plan.recipe),
        "inputs": input_facts(plan, out),
        "environment": environment(plan.device),
    }
    if plan.evidence is not None and plan.evidence.source is not None:
        facts["analysis"] = plan.evidence.identity
    if plan.output.called:
        facts["kind"] = plan.output.called
    return facts


def recipe_digest(recipe: MergeRecipe) -> str:
    """Return the SHA-256 of the recipe's canonical JSON."""
    text = json.dumps(recipe.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def input_facts(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Return each role's folder, relative to `out`, and its files. Raises CheckpointError."""
    roles = by_role(plan.base, plan.mllm, plan.experts)
    final = out.expanduser().resolve()
    return [
        {
            "role": role,
            "path": seen_from(final, checkpoint.path.resolve()),
            "files": identify(
                checkpoint, others=side_files(checkpoint.path) if checkpoint is plan.mllm else ()
            ),
        }
        for role, checkpoint in roles.items()
    ]


def check_unchanged(plan: Plan, out: Path, facts: dict[str, Any]) -> None:
    """Raise CheckpointError if an input is not what it was when the merge began."""
    now = input_facts(plan, out)
    if now != facts["inputs"]:
        change = changed_input(facts["inputs"], now)
        raise CheckpointError(
            f"{out}: is not sealed, because {change}, while it was read; merge again with "
            "--no-resume once nothing changes it any more."
        )


def seen_from(folder: Path, path: Path) -> str:
    """Return `path` relative to `folder`, as journals name it; absolute if on another drive."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.as_posix()


def environment(device: str) -> dict[str, str]:
    """Return the versions and the hardware that decide the last bits of arithmetic on `device`."""
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
