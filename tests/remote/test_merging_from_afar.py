"""Merges of models that stay on another machine equal local merges, byte for byte."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from safetensors.torch import load_file, save_file
from support import hubserver
from support.adapters import by_hand
from support.families import Triple, contents
from support.hubserver import COMMIT, Fault, HubServer, named
from support.scenes import Stop, stopping

from lean_merge import MergeRecipe, MergeResult, Plan, Resources, merge, plan, verify
from lean_merge.checkpoints.elsewhere import Room
from lean_merge.checkpoints.remote import standins
from lean_merge.cli.describe import plan_text
from lean_merge.cli.progress import come
from lean_merge.errors import BudgetError, CheckpointError
from lean_merge.plan import fitting, formulas
from lean_merge.sizes import format_size

CPU = Resources(device="cpu", threads=2)


def recipe(experts: int = 1, **options: Any) -> MergeRecipe:
    names = tuple(f"hf://org/expert-{number}" for number in range(1, experts + 1))
    return MergeRecipe("hf://org/base", "hf://org/mllm@v1.0", names, **options)


def local(triple: Triple, out: Path, experts: int = 1, **options: Any) -> MergeResult:
    return replace(triple, experts=triple.experts[:experts]).merge(out, **options)


def weights(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {n: data for n, data in contents(folder).items() if n.endswith(".safetensors")}


def test_the_same_bytes_from_the_hub(hub: HubServer, triple: Triple, tmp_path: Path):
    expected = local(triple, tmp_path / "local")
    work: Plan = plan(recipe(), CPU)
    result = merge(work, tmp_path / "out")
    assert weights(result.path) == weights(expected.path)
    assert 0.98 * work.prediction.travels <= hub.sent <= 1.02 * work.prediction.travels
    assert not hub.leaks
    assert hub.commits == {COMMIT}


def test_urls_of_files_and_indexes(hub: HubServer, triple: Triple, tmp_path: Path):
    """The base by its index over two shards, the expert as one file, and the MLLM from the disk."""
    parts = hub.root / "parts"
    parts.mkdir()
    tensors = load_file(triple.base / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b c.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, parts / file)
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(triple.base / "config.json", parts)
    work = MergeRecipe(
        f"{hub.plain}/parts/model.safetensors.index.json",
        str(triple.mllm),
        (f"{hub.plain}/org/expert-1/model.safetensors",),
    )
    planned = plan(work, CPU)
    result = merge(planned, tmp_path / "out")
    expected = local(triple, tmp_path / "local")
    assert weights(result.path) == weights(expected.path)
    assert hub.sent <= 1.02 * planned.prediction.travels


def test_adapters_from_afar(hub: HubServer, triple: Triple, tmp_path: Path):
    adapter, _ = by_hand(triple, hub.root / "org" / "adapter", rank=8)
    found = []
    for expert in (str(adapter), "hf://org/adapter"):
        work = MergeRecipe(str(triple.base), str(triple.mllm), (expert,))
        found.append(weights(merge(work, tmp_path / str(len(found)), resources=CPU).path))
    assert found[0] == found[1] and hub.sent


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output": "lora", "lora_rank": 4},
        {"merge_method": "ties", "parameters": (("trim_over", "model"),)},
        {"parameters": (("threshold", "auto"),)},
        {"scope": "language"},
    ],
    ids=["checkpoint", "lora", "surveyed", "auto", "language"],
)
def test_each_byte_travels_as_often_as_planned(
    hub: HubServer,
    triple: Triple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
):
    """Two experts, and no tile stays formed: passes read what is held, not the network."""
    monkeypatch.setattr(formulas, "resident_tiles", lambda weight, free: 0)
    work = recipe(2, **options)
    planned = plan(work, CPU)
    assert not any(any(task.resident) for task in planned.weights)
    result = merge(planned, tmp_path / "out")
    assert hub.sent <= 1.02 * planned.prediction.travels
    expected = merge(localised(work, triple), tmp_path / "local", resources=CPU)
    assert weights(result.path) == weights(expected.path)


def least_memory(work: MergeRecipe) -> int:
    """The smallest memory that reads once, which the refusal of less names."""
    with pytest.raises(BudgetError, match="the smallest that works is --memory") as caught:
        plan(work, replace(CPU, memory=1))
    found = re.search(r"--memory (\d+)MiB", str(caught.value))
    assert found is not None
    return int(found[1]) << 20


def localised(work: MergeRecipe, triple: Triple) -> MergeRecipe:
    pairs = zip(work.experts, triple.experts, strict=False)
    experts = tuple(replace(each, model=str(path)) for each, path in pairs)
    base, mllm = str(triple.base), str(triple.mllm)
    return replace(work, base_model=base, mllm_model=mllm, experts=experts)


def test_a_cut_run_goes_on_to_the_same_bytes(hub: HubServer, triple: Triple, tmp_path: Path):
    work = recipe(shard_size=10_000)
    with pytest.raises(Stop):
        merge(work, tmp_path / "out", resources=CPU, on_event=stopping(3))
    before = hub.sent
    # Another process would make other stand-ins.
    standins._made.clear()
    result = merge(work, tmp_path / "out", resources=CPU)
    assert result.reused == 3 and hub.sent > before
    expected = local(triple, tmp_path / "local", shard_size=10_000)
    assert weights(result.path) == weights(expected.path)
    assert verify(result.path, full=True, resources=CPU).ok


def test_a_file_that_changes_midway_stops_the_run(hub: HubServer, tmp_path: Path):
    planned = plan(recipe(), CPU)
    hub.faults.append(Fault(etag="another save"))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        merge(planned, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_no_secret_is_written(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.token = "hf_SECRET"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    result = merge(recipe(), tmp_path / "out", resources=CPU)
    assert not hub.leaks
    for name, data in contents(result.path).items():
        assert b"SECRET" not in data and b"SIGNATURE" not in data, name
    assert b"org/mllm" in contents(result.path)["README.md"]


def test_another_process_serves_and_another_merges(triple: Triple, tmp_path: Path):
    for name, folder in named(triple).items():
        shutil.copytree(folder, tmp_path / "hub" / "org" / name)
    support = Path(hubserver.__file__)
    server = subprocess.Popen(
        [sys.executable, "-m", "support.hubserver", str(tmp_path / "hub")],
        cwd=support.parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None and server.stdin is not None
    try:
        url, plain = server.stdout.readline().split()
        command = ["merge", "--base", "org/base", "--mllm", "org/mllm", "--expert", "org/expert-1"]
        done = subprocess.run(
            [sys.executable, "-m", "lean_merge", *command, "--remote", "--out", "out"],
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        with urlopen(plain.removesuffix("plain") + "stats") as answer:
            sent = json.load(answer)["sent"]
    finally:
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()
    expected = local(triple, tmp_path / "local")
    assert weights(tmp_path / "out") == weights(expected.path)
    counts = json.loads((tmp_path / "out" / "lean_merge_report.json").read_text())["bytes"]
    assert 0 < sent <= 1.02 * counts["travels_predicted"]
    stored = [each.name for each in (tmp_path / "home").rglob("*")]
    assert "config.json" in stored and not any(n.endswith(".safetensors") for n in stored)


def test_memory_for_the_largest_weight_is_asked_for(
    hub: HubServer, triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Less is refused by the smallest that reads once, or goes on with a cache on the disk."""
    alone = least_memory(localised(recipe(), triple))
    monkeypatch.setattr(fitting, "far_bytes", lambda specs: 50 << 20)
    least = least_memory(recipe())
    assert least > alone + (100 << 20)
    # The process itself may grow a little between two plans.
    enough = replace(CPU, memory=least + (20 << 20))
    assert (64 + 50) << 20 <= plan(recipe(), enough).arrivals.memory < (64 + 70) << 20
    assert plan(recipe(), CPU).arrivals == Room((64 + 100) << 20)
    less = replace(CPU, memory=least - (25 << 20))
    with pytest.raises(BudgetError):
        plan(recipe(), less)
    with pytest.raises(BudgetError):
        plan(recipe(), replace(less, remote_cache=49 << 20))
    work = plan(recipe(), replace(less, remote_cache=50 << 20))
    assert work.arrivals == Room(64 << 20, 50 << 20)
    expected = local(triple, tmp_path / "local")
    assert weights(merge(work, tmp_path / "out").path) == weights(expected.path)


def test_plan_and_progress_tell_what_travels(hub: HubServer, triple: Triple):
    far, near = plan(recipe(), CPU), plan(localised(recipe(), triple), CPU)
    size = format_size(far.prediction.travels)
    assert f"travels   {size}" in plan_text(far) and "travels" not in plan_text(near)
    assert re.fullmatch(rf", [\d.]+ \w+ of {size} came, [\d.]+ \w+/s", come(far))
    assert come(near) == "" and near.prediction.travels == 0
