"""Real processes: killed at random moments, stopped by signals; and inputs that are only read."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from support.families import Triple, contents, write_triple
from support.scenes import (
    AUTO,
    REPORT,
    SCENES,
    Scene,
    Stop,
    assert_never_half_done,
    assert_same,
    make_scene,
    often,
    stopping,
)

from lean_merge import MergeResult, OutputError, Resources, verify
from lean_merge.store import JOURNAL
from lean_merge.store.state import OWN_ANALYSIS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module", params=list(SCENES))
def to_kill(
    request: pytest.FixtureRequest, scene: Scene, tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    """A merge of either kind."""
    if request.param == "checkpoint":
        return scene
    return make_scene(tmp_path_factory.mktemp("others"), SCENES[request.param])


def merge_in_child(scene: Scene, out: Path, overwrite: bool, ready: Connection) -> None:
    """What dies."""
    with often():
        ready.send(None)
        scene.merge(out, overwrite=overwrite)


def kill_often(scene: Scene, *, kills: int, seed: int) -> Counter[str]:
    """Kill merges at random moments and let others go on; what the kills left."""
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once and computes nothing, so its forks are cheap and safe.
    context.set_forkserver_preload(["lean_merge", "support.scenes"])
    with pytest.MonkeyPatch.context() as patch:
        # Where the server looks for what it imports ahead; what is missing it skips in silence.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    seeded, found = random.Random(seed), Counter[str]()
    root = scene.folder / "killed"
    # As long as a merge takes here; measured, for machines differ.
    started = time.perf_counter()
    with often():
        scene.merge(scene.folder / "timed" / "out", resume=False, overwrite=True)
    span = 1.3 * (time.perf_counter() - started)
    while found.total() < kills:
        overwrite = seeded.random() < 0.4
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if overwrite:
            shutil.copytree(scene.folder / "old" / "out", root / "out")
        for _ in range(6):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(
                target=merge_in_child, args=(scene, root / "out", overwrite, theirs)
            )
            child.start()
            ours.recv()
            time.sleep(seeded.random() * span)
            child.kill()
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL)
            state = assert_never_half_done(root, scene)
            if child.exitcode == 0:
                assert state == "complete"
                break
            found[state] += 1
        scene.merge(root / "out", overwrite=overwrite)
        assert_same(contents(root / "out"), scene.expected)
        assert [each.name for each in root.iterdir()] == ["out"]
    return found


def test_a_few_kills_lose_nothing(to_kill: Scene):
    assert kill_often(to_kill, kills=4, seed=0).total() >= 4


@pytest.mark.durability
def test_many_kills_lose_nothing(to_kill: Scene, capsys: pytest.CaptureFixture[str]):
    found = kill_often(to_kill, kills=120, seed=1)
    with capsys.disabled():
        print(f"\nSIGKILL: {found.total()} kills, found {dict(found)}, none lost")
    assert found["unfinished"] > 10 and found["old"] > 10


# --- signals ----------------------------------------------------------------------------------


LONG = 80


@pytest.fixture(scope="module")
def long_one(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """A merge of a second or two."""
    shapes = {f"layers.{n}.mlp.gate_proj": (256, 256) for n in range(LONG)}
    return write_triple(tmp_path_factory.mktemp("long"), shapes)


@pytest.fixture(scope="module")
def uncut(long_one: Triple, tmp_path_factory: pytest.TempPathFactory) -> MergeResult:
    return long_one.merge(tmp_path_factory.mktemp("uncut") / "out")


def some_is_written(file: Path) -> bool:
    """Whether a twentieth of a weight file is no longer the zeros that it was made of."""
    if not file.exists():
        return False
    with open(file, "rb") as stream:
        stream.seek(file.stat().st_size // 20)
        return any(stream.read(1 << 12))


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_a_signal_leaves_with_5_and_nothing_behind(
    long_one: Triple, uncut: MergeResult, tmp_path: Path, number: signal.Signals
):
    """No process, no file outside the output, all finished work noted, and a way to go on."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(long_one.recipe().to_yaml())
    out, temporary, home = (tmp_path / name for name in ("out", "tmp", "home"))
    temporary.mkdir()
    home.mkdir()
    command = [sys.executable, "-m", "lean_merge", "merge", recipe, "--out", out]
    with subprocess.Popen(
        [*map(str, command), "--device", "cpu", "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background has interrupts ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        cwd=home,
        env={**os.environ, "TMPDIR": str(temporary), "HOME": str(home)},
    ) as process:
        deadline = time.monotonic() + 120
        while not some_is_written(out / "model.safetensors.partial"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, message = process.communicate(timeout=120)
    assert process.returncode == 5, message
    assert "the same command goes on" in message and "Traceback" not in message
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out", "recipe.yml", "tmp"]
    assert [*temporary.iterdir(), *home.iterdir()] == []
    assert sorted(contents(out)) == [f"{JOURNAL}.partial", "model.safetensors.partial"]
    resumed = long_one.merge(out)
    assert 0 < resumed.reused < LONG + 1
    one, other = contents(out), contents(uncut.path)
    for name in (REPORT, JOURNAL):
        del one[name], other[name]
    assert one == other
    assert resumed.report["weights"] == uncut.report["weights"]


# --- inputs -----------------------------------------------------------------------------------

_watched: list[tuple[str, str]] = []
_watching: list[Path] = []


def _audit(event: str, details: tuple[Any, ...]) -> None:
    """Python calls this before files are touched; a hook stays for good, so it is idle mostly."""
    if not _watching or not details or not isinstance(details[0], (str, bytes, os.PathLike)):
        return
    if event == "open":
        flags = details[2] if isinstance(details[2], int) else 0
        writes = flags & os.O_ACCMODE != os.O_RDONLY or flags & (os.O_CREAT | os.O_TRUNC)
    else:
        names = "rename remove rmdir mkdir truncate chmod chown link symlink utime setxattr"
        writes = event in {f"os.{name}" for name in names.split()}
    path = Path(os.path.realpath(os.fsdecode(details[0])))
    if any(path.is_relative_to(folder) for folder in _watching):
        _watched.append((event, "writes" if writes else "reads"))


def test_inputs_are_only_read_also_through_links(tmp_path: Path, monkeypatch: Any):
    """Merged, gone on with and verified: every open is for reading, and nothing is touched."""
    scene = make_scene(tmp_path)
    links = tmp_path / "links"
    links.mkdir()
    for role in ("base", "mllm", "expert1"):
        (links / role).symlink_to(tmp_path / "in" / role)
    triple = Triple(links / "base", links / "mllm", (links / "expert1",), scene.triple.slots)

    def facts() -> dict[Path, tuple[int, ...]]:
        return {
            file: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_nlink, s.st_mode)
            for file in (tmp_path / "in").rglob("*")
            for s in [file.stat()]
        }

    before = facts()
    sys.addaudithook(_audit)
    _watching.append(tmp_path / "in")
    try:
        with pytest.raises(Stop):
            triple.merge(tmp_path / "out", on_event=stopping(2))
        triple.merge(tmp_path / "out")
        verify(tmp_path / "out", resources=Resources(device="cpu"))
    finally:
        _watching.clear()
    kinds = Counter(kind for _, kind in _watched)
    assert kinds["reads"] > 10
    assert kinds["writes"] == 0
    assert facts() == before


@pytest.mark.parametrize(
    "where", ["dots", "link to it", "link above", "beside new", "beside old", "linked file"]
)
def test_an_output_that_would_touch_an_input_is_refused(scene: Scene, tmp_path: Path, where: str):
    mllm = scene.triple.mllm
    triple = scene.triple
    if where.startswith("beside"):
        copy = tmp_path / f".out.lean-merge-{where.split()[1]}"
        shutil.copytree(mllm, copy)
        triple = Triple(triple.base, copy, triple.experts, triple.slots)
        out, mllm = tmp_path / "out", copy
    elif where == "linked file":
        # The folder that is named holds a link alone; the bytes are where the output would be.
        out = tmp_path / "real"
        shutil.copytree(mllm, out)
        link = tmp_path / "named" / "model.safetensors"
        link.parent.mkdir()
        link.symlink_to(out / "model.safetensors")
        triple, mllm = Triple(triple.base, link, triple.experts, triple.slots), out
    elif where == "dots":
        out = scene.folder / "elsewhere" / ".." / "in" / "mllm" / "deep"
    else:
        target = mllm if where == "link to it" else mllm.parent
        (tmp_path / "link").symlink_to(target)
        out = tmp_path / "link" if where == "link to it" else tmp_path / "link" / "mllm" / "x"
    before = contents(mllm)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="which must not change"):
            triple.merge(out, overwrite=overwrite)
    assert contents(mllm) == before


def test_side_files_go_through_no_link_of_a_folder(scene: Scene, tmp_path: Path):
    out, victim = scene.folder / "beneath" / "out", tmp_path / "victim"
    with pytest.raises(Stop):
        scene.merge(out, on_event=stopping(2))
    victim.mkdir()
    (victim / "tool.jinja").write_text("precious")
    (out / "additional_chat_templates").symlink_to(victim)
    with pytest.raises(OutputError, match="is a link to another folder"):
        scene.merge(out)
    assert contents(victim) == {"tool.jinja": b"precious"}
    (out / "additional_chat_templates").unlink()
    scene.merge(out)
    assert_same(contents(out), scene.expected)


def test_an_output_may_be_named_by_a_link(scene: Scene, tmp_path: Path):
    """The folder behind it is written, and replaced; the link stays."""
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for options in ({"scale": 0.5}, {"overwrite": True}):
        assert scene.merge(link, **options).path == real
        assert link.is_symlink()
    found, wanted = contents(real), dict(scene.expected)
    del found[JOURNAL], wanted[JOURNAL], found[REPORT], wanted[REPORT]
    assert found == wanted


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors.partial", "config.json"])
def test_an_unfinished_output_writes_through_no_link(tmp_path: Path, link: Any, name: str):
    scene = make_scene(tmp_path)
    out = tmp_path / "here" / "out"
    with pytest.raises(Stop):
        scene.merge(out, on_event=stopping(2))
    victim = tmp_path / "victim"
    victim.write_bytes(b"x" * 5000)
    (out / name).unlink(missing_ok=True)
    link(victim, out / name)
    if name == "config.json":
        scene.merge(out)
        assert_same(contents(out), scene.expected)
    else:
        with pytest.raises(OutputError, match="link"):
            scene.merge(out)
    assert victim.read_bytes() == b"x" * 5000


def test_an_analysis_of_its_own_goes_through_no_link(tmp_path: Path):
    """What a link in its place leads to is neither written nor deleted, also by starting over."""
    scene = make_scene(tmp_path, AUTO)
    out, victim = tmp_path / "here" / "out", tmp_path / "victim"
    with pytest.raises(Stop):
        scene.merge(out, on_event=stopping(2))
    shutil.move(out / OWN_ANALYSIS, victim)
    before = contents(victim)
    (out / OWN_ANALYSIS).symlink_to(victim)
    with pytest.raises(OutputError, match="is a link to another folder"):
        scene.merge(out)
    scene.merge(out, resume=False)
    assert_same(contents(out), scene.expected)
    assert contents(victim) == before
