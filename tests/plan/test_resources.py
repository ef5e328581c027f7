"""What a running merge takes from the system, counted from outside: files, threads, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from support.families import contents

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc shows")

SHARDS = 90
FILES = 160
"""Open files at most: two pools of 64, and what an interpreter with its libraries has open."""
ROOT = Path(__file__).parents[2]

WATCHED = """
import json, os, sys, threading, time
from pathlib import Path

seen = {"files": 0, "threads": 0, "children": 0}

def look():
    seen["files"] = max(seen["files"], len(os.listdir("/proc/self/fd")))
    seen["threads"] = max(seen["threads"], len(os.listdir("/proc/self/task")))
    kids = sum(len(Path(task, "children").read_text().split())
               for task in Path("/proc/self/task").iterdir() if Path(task, "children").exists())
    seen["children"] = max(seen["children"], kids)

def watch():
    while not stop.wait(0.002):
        try:
            look()
        except OSError:
            pass  # a thread ended while it was looked at

stop = threading.Event()
import torch  # its own threads, before they are counted
idle = len(os.listdir("/proc/self/task"))
threading.Thread(target=watch, daemon=True).start()
from lean_merge import cli
try:
    cli.main(sys.argv[2:])
finally:
    stop.set()
    seen["idle"] = idle
    Path(sys.argv[1]).write_text(json.dumps(seen))
"""


def command(folder: Path, *flags: object) -> list[str]:
    """A merge's command line for the three roles in `folder`."""
    words = ["merge", "--device", "cpu", "--quiet", "--out", folder / "out"]
    for flag, role in (("--base", "base"), ("--mllm", "mllm"), ("--expert", "expert")):
        words += [flag, folder / role]
    return [str(word) for word in [*words, *flags]]


def environment(folder: Path) -> dict[str, str]:
    """A process whose temporary and home folders are seen to stay empty."""
    for name in ("tmp", "home"):
        (folder / name).mkdir(exist_ok=True)
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
        "HF_HOME": str(folder / "home"),
    }


def write_shards(folder: Path, count: int, *, rows: int = 8) -> None:
    """Three roles with one small weight in each of `count` shards."""
    for role in ("base", "mllm", "expert"):
        (folder / role).mkdir(parents=True)
        weight_map = {}
        generator = torch.Generator().manual_seed(len(role))
        for number in range(1, count + 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            name = f"model.layers.{number - 1}.self_attn.q_proj.weight"
            weight = torch.randn(rows, 16, generator=torch.Generator().manual_seed(number))
            weight += 0.03 * torch.randn(rows, 16, generator=generator)
            save_file({name: weight}, folder / role / file, metadata={"format": "pt"})
            weight_map[name] = file
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many shards in each of three checkpoints that few files may stay open."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SHARDS)
    return folder


def test_files_threads_and_processes_are_bounded(many_shards: Path):
    """With 360 files to read and write, and a hundred thousand threads asked for."""
    flags = ("--shard-size", 8 * 16 * 4, "--threads", 100_000)
    seen_file = many_shards / "seen.json"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(seen_file), *command(many_shards, *flags)],
        env=environment(many_shards),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(seen_file.read_text())
    assert len(list((many_shards / "out").glob("*.safetensors"))) == SHARDS
    assert 64 < seen["files"] <= FILES, seen
    # Sixteen workers, two drivers, read-ahead, write-behind, memory sampler, watcher; two to spare.
    assert seen["threads"] <= seen["idle"] + 24, seen
    assert seen["children"] == 0
    assert not list((many_shards / "tmp").iterdir())
    assert not list((many_shards / "home").iterdir())


def test_a_merge_fits_the_file_limit_of_a_plain_shell(many_shards: Path):
    """256 is what macOS gives; Linux has 1024."""
    flags = ("--overwrite", "--shard-size", 8 * 16 * 4)
    limited = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_NOFILE, (256, 256)); "
    limited += "sys.argv[0] = 'lean-merge'; runpy.run_module('lean_merge', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", limited, *command(many_shards, *flags)],
        env=environment(many_shards),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


FAILING = """
import sys
from lean_merge import cli
from lean_merge.engine.scheduler import Scheduler

finish = Scheduler._finish
def fail(self):
    yield from finish(self)
    raise RuntimeError("an error that nobody foresaw")
Scheduler._finish = fail
cli.main(sys.argv[1:])
"""


def test_an_error_leaves_no_process_and_no_file_elsewhere(tmp_path: Path):
    """Signals, which end a merge in other ways, are sent in tests/store/test_kills.py."""
    write_shards(tmp_path / "in", 40)
    env = environment(tmp_path / "in")
    before = {role: contents(tmp_path / "in" / role) for role in ("base", "mllm", "expert")}
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING, *command(tmp_path / "in")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path / "in",
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    session = [p for p in psutil.process_iter() if _session(p.pid) == process.pid]
    assert not session
    for role, files in before.items():
        assert contents(tmp_path / "in" / role) == files
    assert sorted(each.name for each in (tmp_path / "in").iterdir()) == sorted(
        ["base", "mllm", "expert", "home", "out", "tmp"]
    )
    assert not list((tmp_path / "in" / "tmp").iterdir())
    assert not list((tmp_path / "in" / "home").iterdir())
    weights = [n for n in contents(tmp_path / "in" / "out") if n.endswith(".safetensors")]
    assert not weights


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1
