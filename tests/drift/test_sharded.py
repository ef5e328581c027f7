"""Two processes pull as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import drift_ranks
from support.priors import Toy, differences, write_prior

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior of the toy."""
    found = {n: d for n, d in differences(Toy()).items() if n.startswith("model.")}
    return write_prior(tmp_path_factory.mktemp("prior") / "p", found)


@pytest.fixture(scope="module")
def ranks(prior, tmp_path_factory) -> list[dict]:
    """What the two processes found."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    subprocess.run(
        [*command, drift_ranks.__file__, str(prior), str(out)],
        check=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=1200,
    )
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def test_drift_alone_imports_no_trainer(ranks):
    for each in ranks:
        assert "lean_merge.drift.pull" in each["modules"]
        assert not {"transformers", "accelerate", "peft", "trl"} & {*each["modules"]}


@pytest.mark.parametrize("mode", ["absolute", "grad-norm", "adaptive"])
@pytest.mark.parametrize("kind", ["whole", "lora"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_give_the_numbers_of_one(prior, ranks, way, kind, mode):
    wanted, told = drift_ranks.run(drift_ranks.model(kind), prior, mode, slice(None))
    for each in ranks:
        found, report = each[way, kind, mode]
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)
        for name, figures in told["weights"].items():
            assert report["weights"][name] == pytest.approx(figures, rel=1e-7)
