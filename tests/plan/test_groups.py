"""The memory that is planned with: within the limits of every control group of the process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lean_merge import memory

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1000 MiB free, whose groups the test describes in files."""
    monkeypatch.setattr(memory, "_CGROUP", str(tmp_path / "fs"))
    monkeypatch.setattr(memory, "_OWN_GROUPS", str(tmp_path / "own"))
    free = SimpleNamespace(available=1000 * MIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
    return tmp_path


def describe(groups: Path, own: str, files: dict[str, str]) -> None:
    (groups / "own").write_text(own)
    for name, text in files.items():
        (groups / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / "fs" / name).write_text(text)


def stat(anonymous: int, word: str = "anon") -> str:
    return f"file 123\n{word} {anonymous * MIB}\nshmem 7\n"


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("", {}, 1000),
        ("0::/\n", {"memory.max": "max\n", "memory.stat": stat(5)}, 1000),
        ("0::/\n", {"memory.max": f"{300 * MIB}\n", "memory.stat": stat(100)}, 200),
        (
            "0::/job/step\n",
            {
                "job/memory.max": f"{400 * MIB}",
                "job/memory.stat": stat(150),
                "job/step/memory.max": "max",
                "job/step/memory.stat": stat(50),
            },
            250,
        ),
        (
            "0::/job/step\n",
            {"job/step/memory.max": f"{90 * MIB}", "job/step/memory.stat": stat(100)},
            0,
        ),
        # A container sees its own folder as the root, and not the path that the host gives it.
        ("0::/docker/0af\n", {"memory.max": f"{64 * MIB}", "memory.stat": stat(4)}, 60),
        (
            "12:cpu,cpuacct:/x\n4:memory:/user/job\n1:name=systemd:/x\n",
            {
                "memory/user/job/memory.limit_in_bytes": f"{500 * MIB}",
                "memory/user/job/memory.stat": "rss 1\n" + stat(100, "total_rss"),
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.stat": stat(900, "total_rss"),
            },
            400,
        ),
        (
            "4:memory:/docker/0af\n",
            {
                "memory/memory.limit_in_bytes": f"{70 * MIB}",
                "memory/memory.stat": stat(20, "total_rss"),
            },
            50,
        ),
        ("nonsense\n\n0::\n", {"memory.max": "much\n", "memory.stat": ""}, 1000),
    ],
)
def test_the_tightest_group_counts(groups: Path, own: str, files: dict[str, str], free: int):
    describe(groups, own, files)
    assert memory.available() == free * MIB
