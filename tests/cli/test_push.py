"""lean-merge push: a small server here stands for the hub; the client is huggingface_hub itself."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
from huggingface_hub import constants

from lean_merge import MergeRecipe, Resources, cli, merge
from lean_merge.demo.run import FAMILY, family_recipe

ONE = "1" * 40


class Hub(ThreadingHTTPServer):
    """The endpoints that an upload asks; `repositories` tells which are private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, bool] = {}
        self.uploaded: dict[str, bytes] = {}
        self.refused = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, facts: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(facts).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def do_GET(self) -> None:
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", urlparse(self.path).path)
        private = self.server.repositories.get(found[1]) if found else None
        if found is None or private is None:
            return self._answer({}, 404, X_Error_Code="RepoNotFound")
        self._answer({"id": found[1], "private": private, "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        path, body = urlparse(self.path).path, self._body()
        if self.server.refused:
            return self._answer({"error": "no write access"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.server.repositories[name] = private
            return self._answer({"url": f"{self.server.url}/{name}", "name": name})
        if path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    content = base64.b64decode(record["value"]["content"])
                    self.server.uploaded[record["value"]["path"]] = content
            return self._answer(
                {"commitUrl": f"{self.server.url}/org/name/commit/{ONE}", "commitOid": ONE}
            )
        self._answer({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        asked = json.loads(self._body())
        name = urlparse(self.path).path.removeprefix("/api/models/").removesuffix("/settings")
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.repositories[name] = private
        self._answer({})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of the embedded family whose models are named by their paths."""
    folder = tmp_path_factory.mktemp("push") / "merged"
    return merge(
        family_recipe(merge_method="linear"), folder, resources=Resources(device="cpu", threads=1)
    ).path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(*arguments: object) -> int:
    try:
        cli.main(["push", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_new_repository_is_private_and_names_no_folder_of_this_machine(
    hub: Hub, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(output, "org/name") == 0
    assert hub.repositories == {"org/name": True}
    assert "(private)" in capsys.readouterr().out
    weights = (output / "model.safetensors").read_bytes()
    assert hub.uploaded["model.safetensors"] == weights
    assert {"README.md", "config.json", "tokenizer.json"} <= set(hub.uploaded)
    home = str(FAMILY).encode()
    assert home in (output / "lean_merge_recipe.yml").read_bytes()
    assert not any(home in content for content in hub.uploaded.values())
    recipe = MergeRecipe.from_yaml(hub.uploaded["lean_merge_recipe.yml"].decode())
    assert (recipe.base_model, recipe.mllm_model) == ("base", "mllm")
    json.loads(hub.uploaded["lean_merge_report.json"])
    left = {each.name for each in output.iterdir()} - set(hub.uploaded)
    assert left == {"lean_merge_journal.jsonl"}


@pytest.mark.parametrize("known", [None, True, False])
def test_nothing_becomes_public_without_a_yes(
    hub: Hub, output: Path, known: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a test nobody can answer, as in a script."""
    if known is not None:
        hub.repositories["org/name"] = known
    before = dict(hub.repositories)
    options = [] if known is False else ["--public"]
    assert push(output, "org/name", *options) == 2
    assert hub.uploaded == {} and hub.repositories == before
    assert "--yes" in capsys.readouterr().err
    assert push(output, "org/name", *options, "--yes") == 0
    assert hub.uploaded and hub.repositories == {"org/name": False}


def test_what_is_not_complete_or_not_named_rightly_is_refused(
    hub: Hub, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(tmp_path, "org/name") == 1
    assert "no complete model" in capsys.readouterr().err
    assert push(output, "name") == 2
    assert "write ORG/NAME" in capsys.readouterr().err
    hub.refused = True
    assert push(output, "org/name") == 1
    assert "hf auth login" in capsys.readouterr().err
    assert hub.uploaded == {}
