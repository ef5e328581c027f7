"""Commands that measure: what they are told, what is read of them, and that they leave nobody."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lean_merge import OutputError, RecipeError
from lean_merge.studies.sweep import evaluation as module
from lean_merge.studies.sweep.evaluation import Evaluation, Measured, measure, read_result

pytestmark = pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
FACTS = {"path": "/a b/threshold-0.3", "name": "threshold-0.3", "threshold": "0.3"}


def run(command: str, tmp_path: Path, **options: Any) -> Measured:
    return measure(Evaluation(command, **options), FACTS, logs=tmp_path / "logs")


def python(tmp_path: Path, code: str) -> str:
    """A command that runs `code`."""
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    return f"{sys.executable} -S '{tmp_path / 'code.py'}'"


# --- what it is told --------------------------------------------------------------------------


def test_words_and_environment_say_which_result_it_is(tmp_path: Path):
    code = (
        "import json, os, sys\n"
        "assert sys.argv[1] == '/a b/threshold-0.3' == os.environ['LEAN_MERGE_PATH']\n"
        "assert sys.argv[3] == '{}{unknown}{PATH}' and os.environ['LEAN_MERGE_NAME']\n"
        "print(float(sys.argv[2]) + float(os.environ['LEAN_MERGE_THRESHOLD']))\n"
    )
    command = python(tmp_path, code) + " {path} {threshold} '{}{unknown}{PATH}'"
    measured = run(command, tmp_path)
    assert (measured.result, measured.error) == (0.6, None)
    assert measured.seconds > 0


def test_a_shell_gets_quoted_words(tmp_path: Path):
    evaluation = Evaluation("printf '%s\\n' {path} >&2; echo 1 | tail -n 1", shell=True)
    facts = FACTS | {"path": "/a'; exit 3; echo '$(exit 4)"}
    measured = measure(evaluation, facts, logs=tmp_path / "logs")
    assert (measured.result, measured.error) == (1, None)
    assert (tmp_path / "logs" / "threshold-0.3.stderr.txt").read_text() == facts["path"] + "\n"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_words_are_put_in_whole(path: str):
    evaluation = Evaluation("measure --model={path},x {name}")
    assert evaluation.arguments({"path": path, "name": "n"}) == [
        "measure",
        f"--model={path},x",
        "n",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": ""}, "not a command"),
        ({"command": " "}, "not a command"),
        ({"command": "a\0b"}, "not a command"),
        ({"command": "a 'b"}, "split into words"),
        ({"command": "a", "timeout": 0}, "time in seconds"),
        ({"command": "a", "timeout": float("nan")}, "time in seconds"),
    ],
)
def test_what_is_no_command_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        Evaluation(**options)


def test_a_parameter_that_is_not_swept_is_refused():
    with pytest.raises(RecipeError, match=r"\{scale\}, which is not swept; give --scales"):
        Evaluation("a {threshold} {scale}").check({"threshold": (0.3,)})
    Evaluation("a {threshold} {other} {path}").check({"threshold": (0.3,)})


# --- what is read of it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("0.5", 0.5),
        ("loading\n12\n", 12),
        ("1\n2\ndone.\n", 2),
        ("50%|####| 0.5\r100%|####| 1\r0.25\r\n", 0.25),
        ('{"acc": 0.5, "n": 10}', {"acc": 0.5, "n": 10}),
        ('{"a": 1}\n{"b": 2} trailing\n', {"a": 1}),
        (
            '{"a": {"b": 0.5, "c": {"d": 1}}, "e": "x", "f": [1], "g": true}',
            {"a.b": 0.5, "a.c.d": 1},
        ),
        ('  {\n  "outer": {\n   "x": 1,\n   "y":\n    2\n  }\n }\n', {"outer.x": 1, "outer.y": 2}),
        ("[\n 1,\n 2\n]\n3", 3),
    ],
)
def test_the_last_json_value_counts(text: str, result: Any):
    assert read_result(text) == (result, None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON value"),
        ("accuracy: 0.5\n", "no JSON value"),
        ("0.5 percent", "no JSON value"),
        ("5\n[1, 2]", "not a finite number"),
        ("true", "True, not a finite number"),
        ("NaN", "not finite"),
        ("Infinity", "not finite"),
        ('"0.5"', "'0.5', not a finite number"),
        ('{"a": "b"}', "no finite number"),
        ('{"a": NaN}', "no finite number"),
        (json.dumps({str(n): n for n in range(300)}), "holds 300 numbers"),
        ("1" * 5000, "no JSON value"),
        ("1" * 400, "not a finite number"),
        ("[" * 100_000, "no JSON value"),
        ("[\n" * 20_000, "no JSON value"),
    ],
)
def test_what_is_no_result_is_explained(text: str, why: str):
    result, error = read_result(text)
    assert result is None and error is not None and why in error
    assert len(error) < 300


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
names = st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=6)


@given(
    numbers | st.dictionaries(names, numbers, min_size=1, max_size=5),
    st.sampled_from([None, 1, "\t"]),
    st.lists(st.text(st.characters(codec="ascii"), max_size=20), max_size=4),
)
def test_a_result_comes_back_whatever_was_printed_before(
    value: Any, indent: Any, before: list[str]
):
    noise = "\n".join(f"> {line}" for line in before)
    assert read_result(f"{noise}\n{json.dumps(value, indent=indent)}\n") == (value, None)


# --- what may go wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; print(1); sys.exit(3)", "ended with exit code 3"),
        ("import os; print(1); os.kill(os.getpid(), 9)", "was ended by signal 9"),
        ("import sys; print('no model', file=sys.stderr); sys.exit(1)", "its last words: no model"),
        ("print('nothing')", "no JSON value"),
    ],
)
def test_a_command_that_fails_is_an_answer(tmp_path: Path, code: str, error: str):
    measured = run(python(tmp_path, code), tmp_path)
    assert measured.result is None and measured.error is not None and error in measured.error


def test_a_command_that_cannot_be_started_is_an_answer(tmp_path: Path):
    measured = run("./no-such-program {path}", tmp_path)
    assert measured.error == (
        "the command './no-such-program' could not be started (No such file or directory)"
    )


def test_the_logs_hold_all_that_was_printed_and_replace_older_ones(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "threshold-0.3.stdout.txt").symlink_to(victim)
    run(python(tmp_path, "import sys; print('out', 1); print('err', file=sys.stderr)"), tmp_path)
    logs = {file.name: file.read_text() for file in (tmp_path / "logs").iterdir()}
    assert logs == {
        "threshold-0.3.stdout.txt": "out 1\n",
        "threshold-0.3.stderr.txt": "err\n",
    }
    assert victim.read_text() == "precious"


def test_logs_that_cannot_be_written_are_an_error(tmp_path: Path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        run("true", tmp_path)


STRAYS = """
import os, pathlib, signal, subprocess, sys, time
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
pathlib.Path({file!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
print(1, flush=True)
{end}
"""


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def strays(tmp_path: Path, *, end: str, stubborn: bool = False) -> tuple[str, Path]:
    file = tmp_path / "pids"
    code = STRAYS.format(file=str(file), end=end, stubborn=stubborn)
    return python(tmp_path, code), file


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("how", ["ends", "times out, stubborn", "is interrupted"])
def test_no_process_is_left_behind(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GRACE", 0.3)
    end = "" if how == "ends" else "time.sleep(60)"
    command, file = strays(tmp_path, end=end, stubborn="stubborn" in how)
    if how == "is interrupted":
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            while not file.exists() or not file.read_text():
                time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                run(command, tmp_path)
        finally:
            thread.join()
            signal.signal(signal.SIGINT, before)
    else:
        measured = run(command, tmp_path, timeout=None if how == "ends" else 3)
        assert (measured.error is None) is (how == "ends")
        assert how == "ends" or "longer than 3 s" in str(measured.error)
    pids = [int(word) for word in file.read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))
