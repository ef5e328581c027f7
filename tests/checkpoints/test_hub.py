"""Hub ids: a small server here stands for the hub; the client is huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import save_checkpoint
from support.families import SMALL, contents, write_triple

from lean_merge import MergeRecipe, Resources, merge, open_checkpoint, plan
from lean_merge.checkpoints import downloads_shown, open_expert
from lean_merge.checkpoints.forms.hub import needed_files
from lean_merge.errors import CheckpointError

SHAPES = {"b": (2, 3), "a": (4,), "c": (), "d": (0, 5)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1.0", COMMIT)


class Server(ThreadingHTTPServer):
    """The endpoints that a download asks: a model's facts, its tree, and its files."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.refusal: tuple[int, str] | None = None
        self.fetched: list[str] = []
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests += 1
        path = unquote(urlparse(self.path).path)
        if self.server.refusal is not None:
            return self._refuse(*self.server.refusal)
        facts = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = tree or file or facts
        folder = self.server.root / match[1] if match else self.server.root / "none"
        if match is None or not folder.is_dir():
            return self._refuse(404, "RepoNotFound")
        if (match[2] or "main") not in REVISIONS:
            return self._refuse(404, "RevisionNotFound")
        names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        if file:
            return self._file(folder, file[3], names)
        if tree:
            entries = [self._entry(folder, name) for name in names]
            return self._json(entries)
        siblings = [{"rfilename": name} for name in names]
        return self._json({"id": match[1], "sha": COMMIT, "siblings": siblings})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _entry(self, folder: Path, name: str) -> dict[str, object]:
        data = (folder / name).read_bytes()
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return {"type": "file", "path": name, "size": len(data), "oid": oid}

    def _file(self, folder: Path, name: str, names: list[str]) -> None:
        if name not in names:
            return self._refuse(404, "EntryNotFound")
        data = (folder / name).read_bytes()
        if self.command == "GET":
            self.server.fetched.append(name)
        etag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A hub whose repositories are the folders org/name below its root, and an empty cache."""
    from huggingface_hub import constants

    server = Server(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def repository(hub: Server, name: str = "org/name", **options: object) -> Path:
    """A repository with a safetensors model and much else."""
    folder = save_checkpoint(hub.root / name, SHAPES, config={"model_type": "llama"}, **options)
    for extra in ("tokenizer.json", "preprocessor_config.json", "processor_config.json"):
        (folder / extra).write_text(json.dumps({"of": extra}))
    for extra in ("merges.txt", "tokenizer.model", "modeling_x.py", "chat_template.jinja"):
        (folder / extra).write_text(extra)
    (folder / "README.md").write_text("hello")
    (folder / "LICENSE").write_text("free")
    for unwanted in UNWANTED:
        (folder / unwanted).parent.mkdir(parents=True, exist_ok=True)
        (folder / unwanted).write_text(unwanted)
    return folder


UNWANTED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
    "consolidated.00.pth",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "training_args.bin",
    "figure.png",
)
BESIDE = {
    "config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "merges.txt",
    "tokenizer.model",
    "modeling_x.py",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
}


@pytest.mark.parametrize("source", ["org/name", "org/name@v1.0", f"org/name@{COMMIT}"])
def test_only_the_files_that_are_needed_are_fetched_and_once(hub: Server, source: str):
    folder = repository(hub, shards=2)
    checkpoint = open_checkpoint(source)
    assert checkpoint.source == source
    assert checkpoint.path.is_relative_to(Path.cwd() / "cache")
    assert set(checkpoint.tensors) == set(SHAPES)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = {"model.safetensors.index.json", *index["weight_map"].values()}
    assert len(weights) == 3
    assert sorted(hub.fetched) == sorted(BESIDE | weights)
    before = hub.requests
    assert open_checkpoint(source).path == checkpoint.path
    assert hub.requests == before


def test_a_copy_in_another_layout_is_not_fetched(hub: Server):
    folder = repository(hub, shards=2)
    save_file({"w": torch.zeros(3)}, folder / "consolidated.safetensors")
    open_checkpoint("org/name")
    assert "consolidated.safetensors" not in hub.fetched


def test_without_safetensors_the_pickles_are_fetched(hub: Server):
    folder = repository(hub)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint("org/name")
    assert set(checkpoint.tensors) == set(SHAPES)
    assert sorted(hub.fetched) == sorted(BESIDE | {"pytorch_model.bin"})


def test_an_adapter_is_fetched_and_found_again(hub: Server):
    folder = hub.root / "org" / "lora"
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "optimizer.bin").write_bytes(b"unwanted")
    assert open_expert("org/lora").adapter is not None
    assert sorted(hub.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    before = hub.requests
    open_expert("org/lora")
    assert hub.requests == before


def test_what_an_interrupted_download_lacks_is_fetched(hub: Server):
    repository(hub, shards=2)
    folder = open_checkpoint("org/name").path
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.fetched.clear()
    assert set(open_checkpoint("org/name").tensors) == set(SHAPES)
    assert set(hub.fetched) <= {"model-00002-of-00002.safetensors", "model.safetensors.index.json"}


def test_offline_means_the_cache_alone(hub: Server, monkeypatch: pytest.MonkeyPatch):
    repository(hub, shards=2)
    repository(hub, "org/other", shards=2)
    folder = open_checkpoint("org/name").path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = hub.requests
    assert set(open_checkpoint("org/name").tensors) == set(SHAPES)
    with pytest.raises(CheckpointError, match=r"org/other: is not in .* HF_HUB_OFFLINE"):
        open_checkpoint("org/other")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"org/name: is only in part .* HF_HUB_OFFLINE"):
        open_checkpoint("org/name")
    assert hub.requests == before


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((403, "GatedRepo"), "is gated; accept its licence"),
        ((401, "RepoNotFound"), "neither a folder here nor a model on the hub"),
        ((500, "Broken"), "cannot be downloaded"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Server, refusal: tuple[int, str], words: str):
    repository(hub)
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint("org/name")
    assert str(caught.value).startswith("org/name: ")


def test_a_missing_repository_and_a_wrong_revision_are_told_apart(hub: Server):
    repository(hub)
    with pytest.raises(CheckpointError, match="org/absent: is neither a folder here nor a model"):
        open_checkpoint("org/absent")
    with pytest.raises(CheckpointError, match="org/name@v9: has no such revision"):
        open_checkpoint("org/name@v9")


def test_a_lost_connection_is_explained(hub: Server, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(CheckpointError, match=r"cannot be downloaded .*check the connection"):
            open_checkpoint("org/name")


def test_a_repository_without_weights_is_refused_before_any_download(hub: Server):
    folder = repository(hub)
    for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"org/name: has no weights .* such as model-q4.gguf"):
        open_checkpoint("org/name")
    assert hub.fetched == []


def test_an_existing_path_is_never_looked_up(hub: Server):
    save_checkpoint(Path("org/name"), SHAPES)
    assert set(open_checkpoint("org/name").tensors) == set(SHAPES)
    assert hub.requests == 0


def test_an_index_cannot_name_files_elsewhere(hub: Server):
    folder = repository(hub)
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="secret"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            ["model.safetensors", "model.fp16.safetensors", "spk_dict.pt", "optimizer.pt"],
            ["model.safetensors", "spk_dict.pt"],
        ),
        (["one.safetensors", "pytorch_model.bin"], ["one.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.onnx"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["pytorch_model-00001-of-00001.bin", "optimizer.bin", "adapter/adapter_model.bin"],
            ["pytorch_model-00001-of-00001.bin"],
        ),
        (["sub/model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
    ],
)
def test_weights_in_one_form_are_wanted(names: list[str], wanted: list[str]):
    assert needed_files("org/name", names, lambda index: {}) == wanted


def test_a_merge_of_hub_ids_asks_the_network_for_nothing_once_it_is_planned(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    triple = write_triple(tmp_path / "triple", SMALL)
    expected = triple.merge(tmp_path / "expected")
    for role, folder in (("base", triple.base), ("mllm", triple.mllm), ("math", triple.experts[0])):
        shutil.copytree(folder, hub.root / "org" / role)
    recipe = MergeRecipe("org/base", "org/mllm@v1.0", ("org/math",))
    work = plan(recipe, Resources(device="cpu", threads=1))
    before = hub.requests
    assert before

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    result = merge(work, tmp_path / "out")
    assert hub.requests == before
    stored = contents(result.path)["model.safetensors"]
    assert stored == contents(expected.path)["model.safetensors"]
    card = (result.path / "README.md").read_text()
    assert "- org/mllm\n" in card


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_an_adapter_names_the_repository_and_the_revision_apart(
    hub: Server, tmp_path: Path, revision: str | None
):
    """A loader would take org/mllm@v1.0 as a whole for the name of a repository."""
    import peft

    triple = write_triple(tmp_path / "triple", SMALL)
    shutil.copytree(triple.mllm, hub.root / "org" / "mllm")
    mllm = "org/mllm" if revision is None else f"org/mllm@{revision}"
    recipe = MergeRecipe(str(triple.base), mllm, (str(triple.experts[0]),), output="lora")
    result = merge(recipe, tmp_path / "out", resources=Resources(device="cpu", threads=1))
    config = peft.PeftConfig.from_pretrained(str(result.path))
    assert (config.base_model_name_or_path, config.revision) == ("org/mllm", revision)


def test_a_cached_model_without_its_tokenizer_is_warned_of(hub: Server, tmp_path: Path):
    """What loading a model alone leaves in the cache; the hub is not asked for the rest."""
    triple = write_triple(tmp_path / "triple", SMALL)
    for name in ("whole", "part"):
        shutil.copytree(triple.mllm, hub.root / "org" / name)
        (hub.root / "org" / name / "tokenizer.json").write_text("{}")
        open_checkpoint(f"org/{name}")
    next((tmp_path / "cache").rglob("models--org--part/snapshots/*/tokenizer.json")).unlink()
    before = hub.requests
    part = MergeRecipe(str(triple.base), "org/part", (str(triple.experts[0]),))
    result = merge(part, tmp_path / "out", resources=Resources(device="cpu", threads=1))
    (warning,) = (line for line in result.report["warnings"] if "tokenizer" in line)
    assert "The snapshot of org/part in the local cache has no tokenizer" in warning
    assert not any("tokenizer" in note for note in plan(replace(part, output="lora")).notes)
    for other in ("org/whole", str(triple.mllm)):
        assert not plan(replace(part, mllm_model=other)).notes
    assert hub.requests == before


def test_a_folder_that_looks_like_a_hub_id_stays_the_folder(hub: Server, tmp_path: Path):
    triple = write_triple(tmp_path / "triple", SMALL)
    shutil.copytree(triple.mllm, Path("org/mllm@v1.0"))
    recipe = MergeRecipe(
        str(triple.base), "org/mllm@v1.0", (str(triple.experts[0]),), output="lora"
    )
    result = merge(recipe, tmp_path / "out", resources=Resources(device="cpu", threads=1))
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/mllm@v1.0", None)
    assert hub.requests == 0


@pytest.fixture
def bars() -> Iterator[None]:
    """The client's progress bars as users have them; transformers' switch may have taken them."""
    from huggingface_hub import utils

    disabled = utils.are_progress_bars_disabled()
    utils.enable_progress_bars()
    yield
    if disabled:
        utils.disable_progress_bars()


@pytest.mark.usefixtures("bars")
def test_progress_is_shown(hub: Server, capfd: pytest.CaptureFixture[str]):
    repository(hub, shards=2)
    open_checkpoint("org/name")
    assert re.search(r"(Fetch|Download)ing.*13/13", capfd.readouterr().err)
    shutil.rmtree(hub.root.parent / "cache")
    with downloads_shown(False):
        open_checkpoint("org/name")
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(hub.root.parent / "cache")
    open_checkpoint("org/name")
    assert "13/13" in capfd.readouterr().err


@pytest.mark.usefixtures("bars")
def test_quiet_shows_no_progress(hub: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    from lean_merge.cli import main

    triple = write_triple(tmp_path / "triple", SMALL)
    for role, folder in (("base", triple.base), ("mllm", triple.mllm), ("math", triple.experts[0])):
        shutil.copytree(folder, hub.root / "org" / role)
    command = ["plan", "--quiet", "--device", "cpu", "--base", "org/base"]
    command += ["--mllm", "org/mllm", "--expert", "org/math"]
    main(command)
    assert capfd.readouterr() == ("", "")
    assert len(hub.fetched) == 6
