"""A hub on loopback with the models of one triple."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.families import SMALL, Triple, write_triple
from support.hubserver import HubServer, named

from lean_merge.checkpoints.remote import standins


@pytest.fixture(scope="session")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("triple") / "in", SMALL, experts=2)


@pytest.fixture(scope="session")
def site(triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub that has the triple's models as org/base, org/mllm, org/expert-1 and org/expert-2."""
    root = tmp_path_factory.mktemp("hub")
    for name, folder in named(triple).items():
        shutil.copytree(folder, root / "org" / name)
    server = HubServer(root)
    yield server
    server.close()


@pytest.fixture
def hub(site: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The hub, with nothing counted yet, and an empty cache of the client."""
    from huggingface_hub import constants

    site.forget()
    monkeypatch.setattr(standins, "_made", {})
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    template = site.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return site
