"""The reader of priors: what it loads, and the folders that it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lean_merge.drift import Prior, PriorFactors, PriorMatrix
from lean_merge.errors import CheckpointError

ENTRY = {"shape": [6, 4], "rank": 2, "norm": 3.0, "kept": 0.5}
STACK = {
    "shape": [3, 4, 5],
    "rank": None,
    "norm": 1.0,
    "kept": 1,
    "parts": [
        {"name": "1.down", "norm": 1.0, "kept": 1, "matrix": 1, "dim": 1, "runs": [[0, 5]]},
    ],
}


def document(weights, **changes):
    return {
        "format": "lean-merge prior",
        "version": 1,
        "difference": "expert-mllm",
        "rank": 2,
        "dtype": "float32",
        "models": {"mllm": "m"},
        "weights": weights,
    } | changes


def write(folder, tensors, weights, **changes):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "prior.json").write_text(json.dumps(document(weights, **changes)))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tensors = {"a.left": torch.randn(6, 2), "a.right": torch.randn(2, 4), "b": torch.randn(3, 4, 5)}
    zero = {"shape": [2, 2], "rank": 0, "norm": 0, "kept": 1}
    weights = {"a": ENTRY, "b": STACK, "c": zero}
    return write(tmp_path_factory.mktemp("prior") / "whole", tensors, weights)


def test_whole_differences_and_factors_are_loaded_in_whole_or_by_rows(whole):
    prior, stored = Prior.open(whole), load_file(whole / "model.safetensors")
    assert [*prior.weights] == ["a", "b", "c"]
    assert prior.weights["b"].parts[0].runs == ((0, 5),)
    factors, part = prior.load("a"), prior.load("a", rows=slice(2, 5))
    assert isinstance(factors, PriorFactors) and isinstance(part, PriorFactors)
    assert torch.equal(factors.left, stored["a.left"])
    assert torch.equal(part.left, stored["a.left"][2:5])
    assert torch.equal(factors.right, stored["a.right"]) and torch.equal(factors.right, part.right)
    dense, part = prior.load("b", dtype=torch.bfloat16), prior.load("b", rows=slice(1, 9))
    assert isinstance(dense, PriorMatrix) and isinstance(part, PriorMatrix)
    assert torch.equal(dense.matrix, stored["b"].bfloat16())
    assert torch.equal(part.matrix, stored["b"][1:])
    zero = prior.load("c")
    assert isinstance(zero, PriorFactors) and torch.equal(zero.left @ zero.right, torch.zeros(2, 2))
    assert prior.load("c", rows=slice(2, 2)).left.shape == (0, 0)


def test_float8_numbers_are_multiplied_by_the_scales_of_their_rows(tmp_path):
    numbers = torch.tensor([[1.0, -2.0], [448.0, 0.5]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.25], [2.0]])
    entry = {"shape": [2, 2], "rank": None, "norm": 1.0, "kept": 1}
    tensors = {"a": numbers, "a.scale": scales}
    prior = Prior.open(write(tmp_path / "p", tensors, {"a": entry}, dtype="float8_e4m3fn"))
    assert prior.load("a").matrix.tolist() == [[0.25, -0.5], [896.0, 1.0]]
    assert prior.load("a", rows=slice(1, 2)).matrix.tolist() == [[896.0, 1.0]]


def test_numbers_that_are_not_finite_are_found_when_they_are_read(tmp_path):
    entry = {"shape": [2, 2], "rank": None, "norm": 1.0, "kept": 1}
    folder = write(tmp_path / "p", {"a": torch.full((2, 2), torch.nan)}, {"a": entry})
    with pytest.raises(CheckpointError, match="'a' holds NaN"):
        Prior.open(folder).load("a")


DAMAGES = {
    "no json": (lambda folder: (folder / "prior.json").unlink(), "no finished prior"),
    "unfinished": (lambda folder: (folder / "x.partial").touch(), "unfinished"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors file"),
    "cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-8]
        ),
        "truncated",
    ),
    "not JSON": (lambda folder: (folder / "prior.json").write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_unfinished_folders_are_refused(tmp_path, whole, damage):
    folder = shutil.copytree(whole, tmp_path / "p")
    harm, told = DAMAGES[damage]
    harm(folder)
    with pytest.raises(CheckpointError, match=told):
        Prior.open(folder)


STATED = {
    "foreign": ({"format": "x"}, "no prior of lean-merge"),
    "version": ({"version": 2}, "version 2"),
    "dtype": ({"dtype": "int8"}, "its dtype is 'int8'"),
    "difference": ({"difference": None}, "its difference is None"),
    "empty": ({"weights": {}}, "no weights"),
    "shape": ({"weights": {"a": ENTRY | {"shape": [6, 5]}}}, "'a.right' is F32"),
    "rank": ({"weights": {"a": ENTRY | {"rank": None}}}, "'a' is missing"),
    "more": ({"weights": {"a": ENTRY}}, "'b', of which prior.json tells nothing"),
    "numbers": ({"weights": {"a": ENTRY | {"norm": "1"}}}, "no share or norm"),
    "share": ({"weights": {"a": ENTRY | {"kept": 1.5}}}, "no share or norm"),
    "key": ({"weights": {"a": {"shape": [6, 4]}}}, "damaged or none of ours"),
    "part": ({"weights": {"a": ENTRY | {"parts": STACK["parts"]}}}, "no matrix of its stack"),
}


@pytest.mark.parametrize("fault", STATED)
def test_what_makes_no_sense_in_prior_json_is_refused(tmp_path, whole, fault):
    changes, told = STATED[fault]
    folder = shutil.copytree(whole, tmp_path / "p")
    weights = json.loads((folder / "prior.json").read_text())["weights"]
    (folder / "prior.json").write_text(json.dumps(document(weights) | changes))
    with pytest.raises(CheckpointError, match=told):
        Prior.open(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        Prior.open(tmp_path / "none")


VALUES = st.sampled_from(
    [None, True, -1, 0, 2, 1e300, float("nan"), "x", [], [[0, 9]], {}, [2**70]]
)


@given(st.sampled_from(["a", "b", "c"]), st.sampled_from([*ENTRY, "parts"]), VALUES)
@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
def test_any_fact_may_be_wrong_and_none_gives_another_error(whole, name, key, value):
    changed = json.loads((whole / "prior.json").read_text())
    changed["weights"][name][key] = value
    file = whole / "prior.json"
    before = file.read_text()
    file.write_text(json.dumps(changed))
    try:
        prior = Prior.open(whole)
        assert {*prior.weights} == {"a", "b", "c"}
        prior.close()
    except CheckpointError:
        pass
    finally:
        file.write_text(before)
