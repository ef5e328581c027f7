"""Going on with an interrupted merge: the same bytes and the same report, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import contents
from support.scenes import (
    REPORT,
    Scene,
    Stop,
    assert_never_half_done,
    assert_same,
    make_scene,
    stopping,
)

from lean_merge import CheckpointError, Event, OutputError, Resources, cli, merge, plan
from lean_merge.plan import runfacts
from lean_merge.store import JOURNAL, OutputFolder, read_journal

PARTIAL = f"{JOURNAL}.partial"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def out(scene: Scene) -> Path:
    """Where the scene's merge goes."""
    folder = scene.folder / "here"
    shutil.rmtree(folder, ignore_errors=True)
    return folder / "out"


def interrupt(scene: Scene, out: Path, after: int, **options: Any) -> None:
    with pytest.raises(Stop):
        scene.merge(out, on_event=stopping(after), **options)


# --- the same bytes ---------------------------------------------------------------------------


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    runs=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3]), st.sampled_from([None, "least"])),
        max_size=4,
    ),
    overwrite=st.booleans(),
)
def test_a_merge_interrupted_anywhere_ends_in_the_same_bytes(
    scene: Scene, runs: list[tuple[int, int, str | None]], overwrite: bool
):
    """After any number of tensors, any number of times, with any memory and threads."""
    folder = scene.folder / "any"
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    if overwrite:
        shutil.copytree(scene.folder / "old" / "out", out)
    done, reads, replace = 0, True, overwrite
    for after, threads, memory in runs:
        given_bytes = None if memory is None else least_memory(scene, threads)
        reads = reads and memory is None
        events: list[Event] = []
        stop = stopping(after)

        def on_event(
            event: Event,
            events: list[Event] = events,
            stop: Callable[[Event], None] = stop,
        ) -> None:
            events.append(event)
            stop(event)

        try:
            scene.merge(
                out, threads=threads, memory=given_bytes, overwrite=replace, on_event=on_event
            )
            # What is complete would be replaced again.
            replace = False
        except Stop:
            state = assert_never_half_done(folder, scene)
            assert state == ("old" if overwrite else "unfinished")
        assert sum(event.reused for event in events) == (done if events else 0)
        done = min(6, done + after)
    result = scene.merge(out, overwrite=replace)
    assert result.reused == done
    found = contents(out)
    if not reads:
        # A smaller memory reads more; the report says so.
        found |= {name: scene.expected[name] for name in (REPORT, JOURNAL)}
    assert_same(found, scene.expected)
    assert [each.name for each in folder.iterdir()] == ["out"]


def least_memory(scene: Scene, threads: int) -> int:
    """A little more than the merge holds with no tile resident."""
    resources = Resources(device="cpu", threads=threads)
    return plan(scene.triple.recipe(), resources).prediction.peak_memory + (8 << 20)


def test_what_a_resumed_run_reports_is_what_an_uninterrupted_one_does(scene: Scene, out: Path):
    interrupt(scene, out, 3)
    result = scene.merge(out)
    assert result.reused == 3 and not result.was_complete
    expected = json.loads(scene.expected[REPORT])
    for field in ("weights", "counts", "warnings", "bytes", "recipe", "parameters"):
        assert result.report[field] == expected[field], field


def test_numbers_of_the_journal_come_back_bit_for_bit(scene: Scene, out: Path):
    """NaN and infinity too, which the records of some methods hold."""
    from lean_merge.methods import ExpertRecord
    from lean_merge.tasks import Note, WeightResult, Written, from_note, to_note

    record = ExpertRecord(True, "r", similarity_first=0.1 + 0.2, lambda_=float("inf"), gap=False)
    weight = WeightResult(
        "n", "c", (record,), True, (float("nan"), 5e-324), Written(1 / 3, -0.0), 7
    )
    note = json.loads(json.dumps(to_note(Note([weight], 12)), allow_nan=False))
    kept = from_note(note)
    assert kept is not None and kept[1:] == (12, False)
    assert repr(kept.weights) == repr([weight])
    tainted = from_note(to_note(Note([], non_finite=True)))
    assert tainted is not None and tainted.non_finite
    assert from_note(None) is None


def test_bytes_that_changed_meanwhile_are_written_again(scene: Scene, out: Path):
    interrupt(scene, out, 4)
    journal = read_journal(out / PARTIAL)
    assert journal is not None and len(journal.tensors) == 4
    files = sorted(out.glob("*.safetensors.partial"))
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    result = scene.merge(out)
    assert result.reused == 3
    assert_same(contents(out), scene.expected)


@pytest.mark.parametrize("harm", ["gone", "short", "long"])
def test_a_shard_that_was_tampered_with_is_written_again(scene: Scene, out: Path, harm: str):
    interrupt(scene, out, 5)
    file = sorted(out.glob("*.safetensors.partial"))[0]
    if harm == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size + (100 if harm == "long" else -100))
    scene.merge(out)
    assert_same(contents(out), scene.expected)


@pytest.mark.parametrize("keep", [0, 40, -1, -40])
def test_a_torn_journal_counts_as_far_as_it_is_whole(scene: Scene, out: Path, keep: int):
    interrupt(scene, out, 4)
    data = (out / PARTIAL).read_bytes()
    (out / PARTIAL).write_bytes(data[:keep])
    if keep >= 0:
        with pytest.raises(OutputError, match="without a journal"):
            scene.merge(out)
        return
    assert scene.merge(out).reused == 3
    assert_same(contents(out), scene.expected)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_journal_with_a_flipped_bit_tells_no_lie(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    """Whatever bit flips, the records that count are a beginning of those that were written."""
    text = bytearray(scene.expected[JOURNAL])
    file = tmp_path_factory.mktemp("journal") / JOURNAL
    file.write_bytes(text)
    whole = read_journal(file)
    assert whole is not None and whole.sealed
    bit = data.draw(st.integers(0, len(text) * 8 - 1))
    text[bit // 8] ^= 1 << bit % 8
    file.write_bytes(text)
    found = read_journal(file)
    if found is not None:
        assert not found.sealed
        assert found.start == whole.start
        names = list(whole.tensors)
        assert found.tensors == {name: whole.tensors[name] for name in names[: len(found.tensors)]}


# --- nothing to do, and starting over ---------------------------------------------------------


def test_onto_its_complete_output_there_is_nothing_to_do(scene: Scene, out: Path):
    first = scene.merge(out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    events: list[Event] = []
    again = scene.merge(out, on_event=events.append)
    assert again.was_complete and again.reused == 6
    assert again.report == json.loads(json.dumps(first.report))
    assert events == []
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_a_complete_output_that_lacks_something_is_not_complete(scene: Scene, out: Path, harm: str):
    scene.merge(out)
    file = out / "config.json"
    file.unlink() if harm == "gone" else file.write_bytes(b"{}")
    with pytest.raises(OutputError, match=r"complete lean-merge output, but files are missing"):
        scene.merge(out)
    scene.merge(out, overwrite=True)
    assert_same(contents(out), scene.expected)


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": False}])
def test_a_damaged_output_is_made_anew_when_that_is_asked_for(
    scene: Scene, out: Path, options: dict[str, bool]
):
    """Its files are there in their lengths, so that only reading them tells of the damage."""
    scene.merge(out)
    shard = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = scene.merge(out, **options)
    assert result.reused == 0 and not result.was_complete
    assert_same(contents(out), scene.expected)


def test_what_was_added_to_a_complete_output_is_not_lost_by_starting_over(scene: Scene, out: Path):
    scene.merge(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"this very merge, and notes\.txt\); .*--overwrite"):
        scene.merge(out, resume=False)
    assert (out / "notes.txt").read_text() == "mine"


def test_starting_over_uses_nothing(scene: Scene, out: Path):
    interrupt(scene, out, 4)
    (out / "notes.txt").write_text("mine")
    result = scene.merge(out, resume=False)
    assert result.reused == 0
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert_same(contents(out), scene.expected)
    assert scene.merge(out, resume=False).reused == 0
    assert scene.merge(out, resume=False, overwrite=True).reused == 0


def test_starting_over_with_another_recipe_leaves_nothing_of_the_first(scene: Scene, out: Path):
    interrupt(scene, out, 4, shard_size=900)
    scene.merge(out, resume=False)
    assert_same(contents(out), scene.expected)


def test_overwriting_goes_on_beside(scene: Scene, out: Path):
    shutil.copytree(scene.folder / "old" / "out", out)
    interrupt(scene, out, 4, overwrite=True)
    beside = out.parent / ".out.lean-merge-new"
    assert beside.is_dir()
    with pytest.raises(OutputError, match="--overwrite"):
        scene.merge(out)
    assert scene.merge(out, overwrite=True).reused == 4
    assert_same(contents(out), scene.expected)
    assert not beside.exists()


def test_overwriting_does_not_go_on_with_another_merge_beside(scene: Scene, out: Path):
    shutil.copytree(scene.folder / "old" / "out", out)
    interrupt(scene, out, 4, overwrite=True, scale=0.125)
    assert scene.merge(out, overwrite=True).reused == 0
    assert_same(contents(out), scene.expected)


# --- refusals ---------------------------------------------------------------------------------


def refused(scene: Scene, out: Path, **options: Any) -> str:
    """The message of a merge onto an unfinished output, which stays as it is."""
    before = contents(out)
    with pytest.raises(OutputError) as caught:
        scene.merge(out, **options)
    assert contents(out) == before
    message = str(caught.value)
    assert message.startswith(f"{out}: cannot be resumed, because ")
    assert "--no-resume" in message
    return message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"rounding": "nearest"}, "rounding was 'stochastic', is 'nearest'"),
        ({"scale": 0.5}, "parameters was None, is {'scale': 0.5}"),
        ({"merge_method": "task_arithmetic"}, "merge_method was 'ip_merging'"),
        ({"shard_size": 10_000}, "shard_size was 2000, is 10000"),
    ],
)
def test_another_recipe_is_refused(scene: Scene, out: Path, options: dict[str, Any], words: str):
    interrupt(scene, out, 2)
    assert f"the recipe has changed ({words}" in refused(scene, out, **options)
    assert_never_half_done(out.parent, scene)


@pytest.mark.parametrize("role", ["base", "mllm", "expert1"])
@pytest.mark.parametrize("change", ["weight", "same length and time", "config", "more"])
def test_a_changed_input_is_refused(tmp_path: Path, role: str, change: str):
    scene = make_scene(tmp_path)
    out = tmp_path / "here" / "out"
    interrupt(scene, out, 2)
    folder = tmp_path / "in" / role
    named = "expert 1" if role == "expert1" else role
    if change == "config":
        (folder / "config.json").write_text('{"model_type": "llama", "x": 1}')
        words = f"config.json of the {named} has changed"
    elif change == "more":
        (folder / "vocab.json").write_text("{}")
        words = f"vocab.json of the {named} has changed"
    else:
        file = folder / "model.safetensors"
        status = file.stat()
        tensors = load_file(file)
        tensors["model.norm.weight"] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        if change == "same length and time":
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            assert file.stat().st_mtime_ns == status.st_mtime_ns
        words = f"model.safetensors of the {named} has changed"
    if change == "more" and role != "mllm":
        # Only the MLLM's files come along.
        scene.merge(out)
        return
    assert words in refused(scene, out)


def test_an_input_elsewhere_is_refused(scene: Scene, out: Path, tmp_path: Path):
    interrupt(scene, out, 2)
    copy = tmp_path / "copy"
    shutil.copytree(scene.triple.base, copy)
    recipe = scene.triple.recipe()
    facts = runfacts.run_facts(plan(recipe), out)
    facts["inputs"][0]["path"] = "../../elsewhere"
    moved = runfacts.run_facts(plan(recipe), out)
    from lean_merge.store.state import difference

    old = {"format": 1, "run": moved, "shards": []}
    words = "the base was '../../in/base', is '../../elsewhere'"
    assert difference(old, {**old, "run": facts}) == words


def test_another_machine_or_library_is_refused(
    scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupt(scene, out, 2)
    real = runfacts.environment
    monkeypatch.setattr(
        runfacts, "environment", lambda device: {**real(device), "torch": "9.9", "processor": "Z"}
    )
    message = refused(scene, out)
    assert f"(torch was {torch.__version__!r}, is '9.9')" in message
    monkeypatch.undo()
    scene.merge(out)
    monkeypatch.setattr(runfacts, "environment", lambda device: {"torch": "9.9"})
    # What is complete was made elsewhere, and is complete nevertheless.
    assert scene.merge(out).was_complete


def test_an_input_that_changes_while_it_is_read_is_not_sealed(tmp_path: Path):
    scene = make_scene(tmp_path)
    out = tmp_path / "here" / "out"

    def touch(event: Event) -> None:
        os.utime(scene.triple.base / "model.safetensors")

    with pytest.raises(
        CheckpointError, match=r"base/model\.safetensors: this file of .* has changed"
    ):
        scene.merge(out, on_event=touch)
    assert assert_never_half_done(out.parent, scene) == "unfinished"
    scene.merge(out, resume=False)
    found, wanted = contents(out), dict(scene.expected)
    del found[JOURNAL], wanted[JOURNAL], found[REPORT], wanted[REPORT]
    assert found == wanted


# --- two at once, and what is left ------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="locks of folders are POSIX")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_is_refused_while_the_first_lives(scene: Scene, out: Path, overwrite: bool):
    if overwrite:
        shutil.copytree(scene.folder / "old" / "out", out)
    messages: list[str] = []

    def second(event: Event) -> None:
        for resume in (True, False):
            with pytest.raises(OutputError) as caught:
                scene.merge(out, overwrite=overwrite, resume=resume)
            messages.append(str(caught.value))

    scene.merge(out, overwrite=overwrite, on_event=second)
    assert len(messages) == 12
    assert all("another lean-merge is writing there" in message for message in messages)
    assert_same(contents(out), scene.expected)


@pytest.mark.skipif(os.name == "nt", reason="locks of folders are POSIX")
def test_the_lock_dies_with_its_owner(tmp_path: Path):
    """Killed without a chance to let go, while a child that it forked lives on."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from lean_merge.store.storage import lock_folder\n"
        "lock = lock_folder(Path(sys.argv[1]))\n"
        "if os.fork(): print('locked', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(OutputError, match="another lean-merge"):
            OutputFolder.create(tmp_path, (), inputs=(), overwrite=False)
        owner.kill()
    OutputFolder.create(tmp_path, (), inputs=(), overwrite=False).abort()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_descriptors_and_threads_are_bounded_and_given_back(scene: Scene, out: Path):
    """However many shards: every tensor has one of its own here."""
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    most = [0, 0]

    def count(event: Event) -> None:
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")))
        most[1] = max(most[1], threading.active_count())

    scene.merge(out, shard_size=1, threads=16, on_event=count)
    # 64 of the reader, 64 of the writer, the journal and the lock; the workers that were asked for,
    # the 2 that drive them, and 3 helpers.
    assert most[0] <= before[0] + 130
    assert most[1] <= before[1] + 16 + 2 + 3
    interrupt(scene, out.parent / "other", 2, threads=16)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


# --- the command line -------------------------------------------------------------------------


def arguments(scene: Scene, out: Path, *more: str) -> list[str]:
    recipe = scene.folder / "recipe.yml"
    recipe.write_text(scene.triple.recipe(shard_size=2000, seed=3).to_yaml())
    return ["merge", str(recipe), "--out", str(out), "--device", "cpu", *more]


def test_the_command_line_says_what_it_found(
    scene: Scene, out: Path, capsys: pytest.CaptureFixture[str]
):
    options = {"shard_size": 2000, "seed": 3}
    recipe = scene.triple.recipe(**options)
    with pytest.raises(Stop):
        merge(recipe, out, resources=Resources(device="cpu"), on_event=stopping(4))
    cli.main(arguments(scene, out))
    assert "4 of 6 tensors were on the disk" in capsys.readouterr().err
    cli.main(arguments(scene, out))
    assert "is complete already; there is nothing to do" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main(arguments(scene, out, "--seed", "4"))
    assert left.value.code == 1
    assert "the recipe has changed (seed was 3, is 4)" in capsys.readouterr().err
    cli.main(["plan", *arguments(scene, out, "--quiet")[1:]])


def test_an_interrupt_leaves_with_5_and_goes_on(
    scene: Scene, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from lean_merge.outputs.checkpoint import CheckpointSink

    finish = CheckpointSink.finish
    left = [3]

    def interrupted(self: CheckpointSink, task: Any, note: Any) -> None:
        finish(self, task, note)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSink, "finish", interrupted)
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments(scene, out, "--quiet"))
    assert exit.value.code == 5
    assert "the same command goes on" in capsys.readouterr().err
    cli.main(arguments(scene, out, "--quiet"))
    assert (out / "model.safetensors.index.json").exists()
