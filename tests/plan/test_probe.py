"""What decides bytes is in the journal: a digest of what the kernels make of fixed numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lean_merge.plan import runfacts
from lean_merge.plan.runfacts import environment


@pytest.fixture(autouse=True)
def fresh_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is computed each time; in other tests it is computed once (tests/conftest.py)."""
    probe: Any = runfacts._probe
    monkeypatch.setattr(runfacts, "_probe", probe.__wrapped__)


def test_the_digest_is_the_same_whatever_the_callers_settings_are():
    before = environment("cpu")
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        assert environment("cpu") == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch lacks oneDNN")
def test_it_tells_of_settings_that_no_list_of_versions_has():
    before = environment("cpu")
    torch._C._set_mkldnn_enabled(False)
    try:
        without = environment("cpu")
    finally:
        torch._C._set_mkldnn_enabled(True)
    if before["arithmetic"] == without["arithmetic"]:
        pytest.skip("this processor's products do not depend on oneDNN")
    assert {**without, "arithmetic": ""} == {**before, "arithmetic": ""}
    assert environment("cpu") == before


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
def test_it_tells_of_other_kernels_of_mkl():
    code = "from lean_merge.plan.runfacts import environment; print(environment('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"},
    )
    assert done.stdout.strip() != str(environment("cpu"))
