"""What memory, threads and order may never change: a single byte of the output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import (
    SMALL,
    Triple,
    cases,
    contents,
    load,
    relative_error,
    rows_of,
    write_triple,
)
from support.invariance import (
    IN_FLOAT32,
    METHODS,
    ONE_PASS,
    cut_tiles,
    exact_smallest_memory,
    identity,
    residency,
    smallest_memory,
)

from lean_merge import BudgetError, Resources
from lean_merge import plan as make_plan

# --- memory -------------------------------------------------------------------------------


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("method", METHODS)
def test_memory_changes_no_byte(sketched: Callable[..., Triple], tmp_path: Path, method: str):
    """From no tile resident, so that every pass reads again, over some to all.

    With the least, an analysis waits until the update before it is stored, or cut to an adapter's
    factors; else it need not.
    """
    triple, options = sketched(torch.bfloat16), METHODS[method]
    least = exact_smallest_memory(triple, **options)
    task_vectors = 2 * 528 * 560 * (4 if method in IN_FLOAT32 else 2)
    outputs, reads, resident, waiting = [], [], [], []
    for number, given_bytes in enumerate(
        [least, least + task_vectors // 3, least + 4 * task_vectors, None]
    ):
        resources = Resources(device="cpu", threads=2, memory=given_bytes)
        plan = make_plan(triple.recipe(**options), resources)
        resident.append(residency(plan))
        waiting.append(plan.waiting)
        result = triple.merge(tmp_path / str(number), memory=given_bytes, threads=2, **options)
        outputs.append(identity(result))
        counted = result.report["bytes"]
        reads.append(counted["read"])
        assert counted["read"] <= counted["read_most"]
        if counted["read_predicted"] == counted["read_most"]:
            assert counted["read"] == counted["read_predicted"]
    for other in outputs[1:]:
        assert other == outputs[0]
    if method in ONE_PASS:
        assert len(set(reads)) == 1
        return
    # Updates that are made of task vectors hold no memory while they wait.
    holds_none = method in (*IN_FLOAT32, "whole") and method not in ("iso_c", "wudi")
    assert waiting[-1] == waiting[0] + (not holds_none)
    assert min(resident[0]) == 0
    assert 0 < sum(resident[1]) < sum(resident[2])
    assert resident[2] == resident[3]
    assert reads[0] > reads[1] > reads[2] == reads[3]


@pytest.mark.usefixtures("many_tiles")
def test_memory_changes_no_byte_where_whole_spectra_are_computed(tmp_path: Path):
    triple = write_triple(tmp_path / "in", {"layers.0.self_attn.q_proj": (400, 96)}, experts=2)
    least = exact_smallest_memory(triple)
    outputs, reads = [], []
    for number, extra in enumerate([0, 200_000, 10**7]):
        result = triple.merge(tmp_path / str(number), memory=least + extra, threads=2)
        outputs.append(identity(result))
        reads.append(result.report["bytes"]["read"])
    assert outputs[0] == outputs[1] == outputs[2]
    assert reads[0] > reads[1] > reads[2]


def test_a_budget_below_the_smallest_is_refused_and_it_suffices(small: Triple, tmp_path: Path):
    """With the process's own memory counted, as users run it."""
    with pytest.raises(BudgetError) as caught:
        small.merge(tmp_path / "out", memory=1)
    assert not (tmp_path / "out").exists()
    assert "1 B is too small for model.layers.0" in str(caught.value)
    # A little more, for what Python allocates between the two calls.
    least = smallest_memory(small) + (8 << 20)
    result = small.merge(tmp_path / "out", memory=least)
    assert result.report["memory"]["limit"] == least
    assert result.report["memory"]["predicted_anonymous"] <= least


# --- threads, order, processes ------------------------------------------------------------


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("method", METHODS)
def test_threads_change_no_byte(sketched: Callable[..., Triple], tmp_path: Path, method: str):
    triple, options = sketched(torch.float32), METHODS[method]
    outputs = [
        identity(triple.merge(tmp_path / str(threads), threads=threads, **options))
        for threads in (1, 2, 7)
    ]
    for other in outputs[1:]:
        assert other == outputs[0]


@pytest.mark.usefixtures("many_tiles")
def test_the_callers_threads_change_no_byte_and_are_given_back(
    sketched: Callable[..., Triple], tmp_path: Path
):
    triple, before = sketched(torch.float32), torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outputs.append(identity(triple.merge(tmp_path / str(count), threads=2)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("method", ["ip-merging", "stochastic"])
def test_the_order_of_work_changes_no_tensor(
    family: Callable[..., Triple], tmp_path: Path, method: str
):
    """The order follows the MLLM's files and the output's shards."""
    triple, options = family("llava", dtype=torch.bfloat16), METHODS[method]
    turned = tmp_path / "turned"
    turned.mkdir()
    tensors = load(triple.mllm)
    for number, name in enumerate(sorted(tensors, reverse=True), start=1):
        file = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensors[name]}, turned / file, metadata={"format": "pt"})
    (turned / "config.json").write_bytes((triple.mllm / "config.json").read_bytes())
    merged, orders = [], []
    for number, (each, shard_size) in enumerate(
        [(triple, 10**9), (triple, 10_000), (replace(triple, mllm=turned), 30_000)]
    ):
        options = {**options, "shard_size": shard_size}
        orders.append([row.weight.mllm.name for row in make_plan(each.recipe(**options)).weights])
        merged.append(load(each.merge(tmp_path / str(number), **options).path))
    assert sorted(orders[0]) == sorted(orders[2]) and orders[0] != orders[2]
    for other in merged[1:]:
        assert other.keys() == merged[0].keys()
        for name, tensor in merged[0].items():
            assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("method", ["ip-merging", "stochastic"])
def test_names_on_the_disk_decide_no_number(
    sketched: Callable[..., Triple], tmp_path: Path, method: str
):
    """Random numbers are seeded by the base's canonical names."""
    triple, options = sketched(torch.bfloat16), METHODS[method]
    plain = load(triple.merge(tmp_path / "plain", **options).path)
    other = tmp_path / "mllm"
    other.mkdir()
    renamed = {
        f"language_{name.replace('model.', 'model.model.', 1)}": tensor
        for name, tensor in load_file(triple.mllm / "model.safetensors").items()
    }
    save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
    out = load(replace(triple, mllm=other).merge(tmp_path / "out", **options).path)
    assert out.keys() == renamed.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, out[f"language_{name.replace('model.', 'model.model.', 1)}"])


def test_another_process_writes_the_same_bytes(sketched: Callable[..., Triple], tmp_path: Path):
    triple = sketched(torch.bfloat16)
    ours = triple.merge(tmp_path / "ours", rounding="stochastic")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(triple.recipe(rounding="stochastic").to_yaml())
    command = [sys.executable, "-m", "lean_merge", "merge", recipe, "--out", tmp_path / "theirs"]
    subprocess.run(
        [*map(str, command), "--threads", "2", "--device", "cpu", "--quiet"],
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"},
    )
    theirs = contents(tmp_path / "theirs")
    expected = contents(ours.path)
    assert theirs.keys() == expected.keys()
    assert json.loads(theirs.pop("lean_merge_report.json"))["weights"] == ours.report["weights"]
    for name in ("lean_merge_report.json", "lean_merge_journal.jsonl"):
        expected.pop(name), theirs.pop(name, None)
    assert theirs == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_same_twice_is_the_same(small: Triple, tmp_path: Path, method: str):
    outputs = [identity(small.merge(tmp_path / n, **METHODS[method])) for n in "ab"]
    assert outputs[0] == outputs[1]


def test_the_seed_of_the_sketch_moves_the_result_only_a_little(
    sketched: Callable[..., Triple], tmp_path: Path
):
    """Other starts give other last bits, and the same merge."""
    triple = sketched(torch.float32)
    first, second = (triple.merge(tmp_path / str(n), seed=n) for n in range(2))
    assert identity(first) != identity(second)
    for one, other in zip(cases(triple, first), cases(triple, second), strict=True):
        name = one.slot.canonical
        assert rows_of(first)[name]["selected"] is rows_of(second)[name]["selected"]
        if rows_of(first)[name]["selected"]:
            assert relative_error(one.update, other.update) < 0.03


# --- the property: streamed equals whole --------------------------------------------------


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Triple]]:
    made: dict[Any, Triple] = {}

    def get(shape: tuple[int, int], dtype: torch.dtype) -> Triple:
        if (shape, dtype) not in made:
            made[shape, dtype] = write_triple(
                tmp_path_factory.mktemp("streamed"),
                {name: shape for name in SMALL},
                dtype=dtype,
                experts=2,
            )
        return made[shape, dtype]

    yield get


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.sampled_from([(48, 48), (130, 32), (33, 100)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tile=st.sampled_from([1, 700, 2000, 1 << 20]),
    strip=st.sampled_from([1, 500, 1 << 17]),
    extra=st.integers(0, 120_000),
    threads=st.integers(1, 5),
    shard_size=st.sampled_from([1, 9_000, 10**9]),
    stages=st.sampled_from(
        [
            ("select",),
            ("select", "rescale"),
            ("select", "project"),
            ("select", "rescale", "project"),
        ]
    ),
    threshold=st.sampled_from([0.1, 0.6, 1.0]),
)
def test_a_streamed_merge_equals_the_oracle(
    streamed: Callable[..., Triple],
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    dtype: torch.dtype,
    tile: int,
    strip: int,
    extra: int,
    threads: int,
    shard_size: int,
    stages: tuple[str, ...],
    threshold: float,
):
    triple = streamed(shape, dtype)
    options: dict[str, Any] = {"stages": stages, "threshold": threshold, "scale": 0.7}
    with pytest.MonkeyPatch.context() as patch:
        cut_tiles(patch, tile=tile, strip=strip)
        result = triple.merge(
            tmp_path_factory.mktemp("out") / "out",
            memory=smallest_memory(triple, threads=threads, **options) + extra,
            threads=threads,
            shard_size=shard_size,
            out_dtype="float32",
            **options,
        )
    tolerance = 1e-3 if dtype == torch.float32 else 0.012
    for case in cases(triple, result):
        wanted, undecided = np.zeros(shape), False
        for number, path in enumerate(triple.experts):
            oracle = case.oracle(number, **options)
            row = rows_of(result, path)[case.slot.canonical]
            undecided |= abs(float(oracle.similarity[0]) - threshold) < 0.02
            assert undecided or row["selected"] is oracle.selected
            wanted = wanted + oracle.update
        if undecided:
            continue
        if not wanted.any():
            assert not case.update.any()
        else:
            assert relative_error(case.update, wanted) <= tolerance
