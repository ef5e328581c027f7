"""Torch's settings are ours while merges compute, and the caller's again afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_merge.linalg.settings import Computing


def process_state() -> tuple[Any, ...]:
    """Everything that the process shares and merges set."""
    get = GETTER or (lambda backend, kind: "ieee")
    return (
        torch.get_float32_matmul_precision(),
        get("cuda", "matmul"),
        get("mkldnn", "matmul"),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )


GETTER: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
OURS = ("highest", "ieee", "ieee", False)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        torch.set_default_dtype(torch.float32)


def test_settings_are_given_back_and_lent_in_between():
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(2)
    callers = process_state()
    with Computing() as computing:
        assert process_state() == OURS and torch.get_num_threads() == 1
        with computing.paused(idle=False):
            assert process_state() == OURS and torch.get_num_threads() == 2
        with computing.paused(idle=True):
            assert process_state() == callers
        assert process_state() == OURS and torch.get_num_threads() == 1
    assert process_state() == callers and torch.get_num_threads() == 2


@pytest.mark.skipif(GETTER is None, reason="this torch has one precision for all backends")
def test_precision_that_was_set_by_backend_is_given_back_too():
    """Torch then refuses to tell the precision as a whole."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with Computing():
            assert process_state() == OURS
        assert GETTER("mkldnn", "matmul") == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


@settings(deadline=None, max_examples=40)
@given(st.permutations([0, 0, 1, 1, 2, 2]))
def test_merges_in_several_threads_share_the_settings(order: list[int]):
    """Each begins at its first place in the order and ends at its second."""
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(2)
    turns = [threading.Semaphore(0) for _ in range(3)]
    done = threading.Semaphore(0)
    seen: list[tuple[int, int]] = []

    def merge(number: int) -> None:
        turns[number].acquire()
        before = torch.get_num_threads() if number == order[0] else 2
        with Computing():
            done.release()
            turns[number].acquire()
        seen.append((torch.get_num_threads(), before))
        done.release()

    threads = [threading.Thread(target=merge, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    at_work: set[int] = set()
    for number in order:
        turns[number].release()
        done.acquire()
        at_work ^= {number}
        assert process_state()[0] == ("highest" if at_work else "medium")
    for thread in threads:
        thread.join()
    assert all(after == before for after, before in seen)


def test_nothing_of_the_calling_thread_decides_a_number():
    tiny = torch.tensor(1e-310, dtype=torch.float64)
    flushes = torch.set_flush_denormal(True)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), Computing():
            assert torch.zeros(1, dtype=torch.float32).device.type == "cpu"
            numbers = torch.eye(2, dtype=torch.float32)
            assert (numbers @ numbers).dtype is torch.float32
            assert not numbers.is_inference()
            assert float(tiny * 1.0) == 1e-310
        assert torch.zeros(1, dtype=torch.float32).device.type == "meta"
    finally:
        torch.set_default_device(None)
        assert not flushes or float(tiny * 1.0) == 0.0
        torch.set_flush_denormal(False)
