"""Collect the facts by which two runs write the same bytes: recipe, inputs and machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from lean_merge.checkpoints import identify
from lean_merge.checkpoints.identity import check_unchanged
from lean_merge.checkpoints.safepaths import resolved
from lean_merge.errors import OutputError
from lean_merge.linalg.settings import Computing
from lean_merge.plan import Plan
from lean_merge.plan.resources import arithmetic_dtype
from lean_merge.recipe import MergeRecipe
from lean_merge.version import __version__


def run_facts(plan: Plan, out: Path) -> dict[str, Any]:
    """Return the journal's `run` (docs/durability.md) for an output of `plan` in the folder `out`.

    Raises
    ------
    CheckpointError
        An input cannot be read, or has changed since it was planned.
    """
    check_unchanged(plan.opened)
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
    return {**facts, **plan.output.facts}


def recipe_digest(recipe: MergeRecipe) -> str:
    """Return the SHA-256 of the recipe's canonical JSON."""
    text = json.dumps(recipe.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def input_facts(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Return each role's folder, relative to `out`, or its address, and its files."""
    final = resolved(out, OutputError)
    return [
        {
            "role": role,
            "path": (each.origin and each.origin.address) or seen_from(final, each.path.resolve()),
            "files": identify(each),
        }
        for role, each in plan.roles.items()
    ]


def seen_from(folder: Path, path: Path) -> str:
    """Return `path` relative to `folder`, as journals name it; absolute if on another drive."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.as_posix()


def environment(device: str) -> dict[str, str]:
    """Return what decides the last bits of arithmetic on `device`.

    Versions, processors and settings that choose kernels are too many to be listed. The digest of
    small products and decompositions tells whether the kernels give the same bits.
    """
    facts = {"lean_merge": __version__, "torch": torch.__version__, "device": device}
    if torch.device(device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name(torch.device(device))
    return {**facts, "arithmetic": _probe(device)}


def _probe(device: str) -> str:
    """Return a digest of what the kernels on the CPU and on `device` make of fixed numbers."""
    digest = hashlib.sha256()
    with Computing():
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(2048, 64, generator=generator, dtype=torch.float32)
        found = [numbers, numbers.exp(), numbers.sum(), numbers.double().sum(0)]
        for place in dict.fromkeys(("cpu", device)):
            for dtype in dict.fromkeys((torch.float32, arithmetic_dtype(torch.bfloat16, place))):
                there = numbers.to(place, dtype)
                found += [there.T @ there[:, :32], there[:96] @ there[96:160], there[0] @ there.T]
        small = (numbers[:64].T @ numbers[:64]).double()
        found += [*torch.linalg.eigh(small + small.T), *torch.linalg.qr(small), small @ small]
        found += [*torch.linalg.svd(small)]
    for each in found:
        digest.update(each.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
