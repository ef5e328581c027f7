"""bench/pins.py tells a tree that writes other bytes from one that does not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ("defaults", "refused recipes")


@pytest.mark.long
def test_another_default_is_found_by_the_cases_that_depend_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import pininputs
    import pins

    # Both cases merge this triple; the others take longer to write than all the rest.
    monkeypatch.setattr(pininputs, "FAMILIES", {"plain": pininputs.FAMILIES["plain"]})
    other = tmp_path / "tree" / "lean_merge"
    demo = shutil.ignore_patterns("demo", "__pycache__")
    shutil.copytree(ROOT / "lean_merge", other, ignore=demo)
    line, changed = "temperature: float = 32.0", 0
    for file in other.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        changed += text.count(line)
        file.write_text(text.replace(line, "temperature: float = 31.0"), encoding="utf-8")
    assert changed == 1
    monkeypatch.setattr(sys, "argv", ["pins.py", str(ROOT), str(other.parent), "--only", *CASES])
    with pytest.raises(SystemExit) as ended:
        pins.main()
    printed = capsys.readouterr()
    assert ended.value.code == 1, printed.err
    lines = printed.out.splitlines()
    assert [each for each in lines if each.startswith("DIFFERS")] == ["DIFFERS defaults"]
    assert lines[1].startswith("        out/model.safetensors: sha256 differs, in 1 place")
    assert lines[-1] == "1 of 2 cases are equal, 1 differ"


def test_keys_are_named_and_allowed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import pins

    old = {"seconds": 1, "memory": {"pinned": 0}, "rows": [{"a": 1, "b": None}, {"a": 2, "b": 3}]}
    new = {"seconds": 2, "rows": [{"a": 1, "b": None}, {"a": 5, "b": 3}], "more": []}
    found = pins.differences(old, new, volatile=list(pins.VOLATILE), dropped=(), added=())
    assert [each.partition(",")[0] for each in found] == [
        "memory.pinned is gone",
        "rows.a differs",
        "more is new",
    ]
    names = {"volatile": ("seconds", "rows.a"), "dropped": ("memory",), "added": ("more",)}
    assert pins.differences(old, new, **names) == []
