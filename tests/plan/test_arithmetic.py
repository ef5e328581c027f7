"""In which dtype products are computed, for processors that are only described."""

from __future__ import annotations

import platform

import pytest
import torch

from lean_merge.plan.resources import arithmetic_dtype

PROCESSORS = {
    "AVX2": (False, False),
    "AVX-512 without bfloat16": (True, False),
    "AVX512-BF16": (True, True),
}
"""Whether oneDNN supports bfloat16, and whether torch finds the extension AVX512-BF16. A processor
with AMX has that too."""


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch):
    """Let this process look like another processor's, of a `machine` as the system calls it."""

    def become(name: str, machine: str = "x86_64", limit: str | None = None) -> None:
        supported, extended = PROCESSORS[name]
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False
        )
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: extended)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(variable, raising=False)
        if limit is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    return become


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize(
    ("processor", "limit", "wanted"),
    [
        ("AVX2", None, torch.float32),
        ("AVX-512 without bfloat16", None, torch.float32),
        ("AVX512-BF16", None, torch.bfloat16),
        ("AVX512-BF16", "ALL", torch.bfloat16),
        ("AVX512-BF16", "AVX512_CORE_BF16", torch.bfloat16),
        ("AVX512-BF16", "avx512_core_vnni", torch.float32),
        ("AVX512-BF16", "AVX512_CORE", torch.float32),
    ],
)
def test_products_that_are_only_emulated_are_not_chosen(
    become, processor: str, limit: str | None, wanted: torch.dtype
) -> None:
    become(processor, limit=limit)
    assert arithmetic_dtype(torch.bfloat16, "cpu") is wanted
    assert arithmetic_dtype(torch.float32, "cpu") is torch.float32
    assert arithmetic_dtype(torch.float16, "cpu") is torch.float32


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_without_onednn_nothing_multiplies_bfloat16_fast(
    become, monkeypatch: pytest.MonkeyPatch
) -> None:
    become("AVX512-BF16")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert arithmetic_dtype(torch.bfloat16, "cpu") is torch.float32


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
def test_other_architectures_are_asked_of_onednn_alone(become) -> None:
    """It looks for the instructions themselves on Arm."""
    become("AVX-512 without bfloat16", machine="aarch64")
    assert arithmetic_dtype(torch.bfloat16, "cpu") is torch.bfloat16
    become("AVX2", machine="aarch64")
    assert arithmetic_dtype(torch.bfloat16, "cpu") is torch.float32
