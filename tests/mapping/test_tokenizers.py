"""Tokenizers are compared token by token, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lean_merge.mapping import kinship
from lean_merge.studies.compare.roles import vocabulary

TOKENS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def saved(folder: Path, content: Any, **options: Any) -> Any:
    (folder / "tokenizer.json").write_text(json.dumps(content, **options), encoding="utf-8")
    return SimpleNamespace(path=folder)


def moved(folder: Path, first: Any, second: Any, **options: Any) -> tuple[int, int]:
    """How many tokens both have, and how many of them have other ids."""
    one = kinship._token_ids(saved(folder, first, **options))
    other = kinship._token_ids(saved(folder, second))
    _, here, there = np.intersect1d(one[0], other[0], assume_unique=True, return_indices=True)
    return len(here), int((one[1][here] != other[1][there]).sum())


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    vocabularies=st.lists(
        st.one_of(
            st.dictionaries(TOKENS, st.integers(0, 99), max_size=8),
            st.lists(st.tuples(TOKENS, st.floats(-9, 0)), max_size=8),
        ),
        min_size=2,
        max_size=2,
    ),
    added=st.lists(st.tuples(TOKENS, st.integers(0, 99)), max_size=3),
    chunk=st.sampled_from([64, 100, 1 << 20]),
    ascii_only=st.booleans(),
)
def test_they_are_those_that_parsing_the_whole_file_gives(
    tmp_path: Path,
    vocabularies: list[Any],
    added: list[tuple[str, int]],
    chunk: int,
    ascii_only: bool,
):
    items = [{"content": text, "id": place, "special": True} for text, place in added]
    contents = [
        {"added_tokens": items, "model": {"type": "BPE", "vocab": each, "merges": [["a", "b"]]}}
        for each in vocabularies
    ]
    one, other = (vocabulary(saved(tmp_path, each)) for each in contents)
    common = one.keys() & other.keys()
    expected = len(common), sum(one[token] != other[token] for token in common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinship, "_CHUNK", chunk)
        assert moved(tmp_path, *contents, ensure_ascii=ascii_only, indent=1) == expected


def test_large_ones_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With its merges it has 700 kB here, and parsing it whole would take ten times that."""
    monkeypatch.setattr(kinship, "_CHUNK", 1 << 16)
    words = {f"token {number}": number for number in range(5_000)}
    merges = [[f"token {number}", f"of {number}"] for number in range(15_000)]
    file = saved(tmp_path, {"model": {"vocab": words, "merges": merges}, "added_tokens": []})
    tracemalloc.start()
    try:
        found = kinship._token_ids(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert len(found[0]) == 5_000


def test_an_id_that_no_model_can_have_is_no_token(tmp_path: Path):
    vocab = {"b": 1, "c": -(10**20), "a": 10**30}
    added = [{"content": "d", "id": 10**25}, {"content": "e", "id": 2}]
    _, ids = kinship._token_ids(saved(tmp_path, {"model": {"vocab": vocab}, "added_tokens": added}))
    assert sorted(ids.tolist()) == [1, 2]
