"""Merges of models that stay on another machine equal local merges, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.families import SMALL, Triple, contents, write_triple
from support.hubserver import COMMIT, HubServer

from lean_merge import MergeRecipe, MergeResult, Plan, Resources, merge, plan

CPU = Resources(device="cpu", threads=2)


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("triple") / "in", SMALL, experts=2)


@pytest.fixture(scope="module")
def site(triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub that has the triple's models as org/base, org/mllm, org/expert-1 and org/expert-2."""
    root = tmp_path_factory.mktemp("hub")
    for name, folder in named(triple).items():
        shutil.copytree(folder, root / "org" / name)
    server = HubServer(root)
    yield server
    server.close()


def named(triple: Triple) -> dict[str, Path]:
    experts = {f"expert-{number}": path for number, path in enumerate(triple.experts, 1)}
    return {"base": triple.base, "mllm": triple.mllm, **experts}


@pytest.fixture
def hub(site: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The hub, with nothing counted yet, and an empty cache of the client."""
    from huggingface_hub import constants

    site.forget()
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    template = site.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return site


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
