"""What lies beside the weights: the MLLM's side files, and the model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lean_merge.checkpoints.sidefiles import side_files
from lean_merge.errors import CheckpointError
from lean_merge.outputs.card import license_of, model_card
from lean_merge.outputs.companions import copy_side_files
from lean_merge.store import OutputFolder, OutputTensor, plan_shards


def create(out: Path) -> OutputFolder:
    shards = plan_shards([OutputTensor("t", "U8", (4,), 4)], shard_size=10)
    return OutputFolder.create(out, shards, inputs=(), overwrite=False)


@pytest.fixture
def mllm(tmp_path: Path) -> Path:
    """An MLLM's folder with a file of every kind."""
    folder = tmp_path / "mllm"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in (
        *("tokenizer.json", "tokenizer.model", "merges.txt", "preprocessor_config.json"),
        *("modeling_x.py", "chat_template.jinja", "LICENSE", "additional_chat_templates/t.jinja"),
        *("model.safetensors", "model.safetensors.index.json", "model.safetensors.partial"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "x.GGUF", "o.pt"),
        *("spk.npz", "optimizer.pt", "rng_state_0.pth", "consolidated.00.pth"),
        *("README.md", ".gitattributes", "lean_merge_report.json", "lean-merge.yaml"),
        "model.safetensors.index.fp16.json",
    ):
        (folder / name).write_bytes(name.encode())
    text: dict[str, Any] = {"torch_dtype": "float16", "dtype": "float16", "hidden_act": "é"}
    config = {"torch_dtype": "float16", "text_config": text, "vision_config": {"x": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "onnx").mkdir()
    return folder


SIDE = [
    *("LICENSE", "additional_chat_templates/t.jinja", "chat_template.jinja", "config.json"),
    *("merges.txt", "modeling_x.py", "o.pt", "preprocessor_config.json", "spk.npz"),
    *("tokenizer.json", "tokenizer.model"),
]


def along(mllm: Path) -> tuple[Path, ...]:
    return side_files(mllm, [mllm / "model.safetensors"])[0]


def test_side_files_are_everything_but_weights_and_training_states(mllm: Path):
    """They are told by the names that libraries give them, not by how the names end."""
    files, left = side_files(mllm, [mllm / "model.safetensors"])
    assert [file.relative_to(mllm).as_posix() for file in files] == SIDE
    assert left == (
        *("consolidated.00.pth", "model.safetensors.partial", "onnx", "optimizer.pt"),
        *("pytorch_model.bin", "rng_state_0.pth", "tf_model.h5", "x.GGUF"),
    )


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_a_name_that_cannot_be_written_down_is_refused(mllm: Path):
    with open(os.fsencode(mllm) + b"/a\xff.json", "wb"):
        pass
    with pytest.raises(CheckpointError, match="not valid Unicode; rename it"):
        side_files(mllm)


def test_side_files_are_copied_byte_for_byte(mllm: Path, tmp_path: Path):
    with create(tmp_path / "out") as folder:
        assert list(copy_side_files(mllm, along(mllm), folder, out_dtype=None)) == SIDE
    for name in SIDE:
        assert (tmp_path / "out" / name).read_bytes() == (mllm / name).read_bytes()


@pytest.mark.parametrize("dtype", ["BF16", "bfloat16"])
def test_the_config_says_the_new_dtype_wherever_it_said_one(mllm: Path, tmp_path: Path, dtype: str):
    with create(tmp_path / "out") as folder:
        copy_side_files(mllm, along(mllm), folder, out_dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == {
        "torch_dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "dtype": "bfloat16", "hidden_act": "é"},
        "vision_config": {"x": 1},
    }


def test_a_config_without_dtype_gets_one(mllm: Path, tmp_path: Path):
    (mllm / "config.json").write_text("{}")
    with create(tmp_path / "out") as folder:
        copy_side_files(mllm, along(mllm), folder, out_dtype="F32")
        with pytest.raises(ValueError, match="int8"):
            copy_side_files(mllm, along(mllm), folder, out_dtype="int8")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "float32"}


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_side_file_that_links_elsewhere_is_not_published(mllm: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("key")
    (mllm / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"vocab\.json: is a link out of its folder"):
        side_files(mllm)


def card(**changes: Any) -> tuple[dict[str, Any], str]:
    text = model_card(
        **{
            "recipe_yaml": "merge_method: ip_merging\n",
            "base": "org/base@main",
            "mllm": "org/mllm",
            "experts": ["/data/models/math", "org/code"],
            "license_fields": {"license": "other", "license_name": "x", "junk": "y"},
            "summary": "224 weights merged.",
            **changes,
        }
    )
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_was_merged():
    front, body = card()
    assert front == {
        "base_model": ["org/mllm", "org/base", "math", "org/code"],
        "library_name": "transformers",
        "tags": ["merge", "lean-merge"],
        "license": "other",
        "license_name": "x",
    }
    assert "```yaml\nmerge_method: ip_merging\n```" in body
    assert "224 weights merged." in body
    assert "/data" not in body


def test_a_recipe_cannot_end_its_block():
    _, body = card(recipe_yaml="note: |\n  ```\n  # not a heading\n")
    assert "````yaml\n" in body
    assert body.rstrip().endswith("````")


def test_a_local_folder_named_like_a_hub_id_is_not_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "mllm").mkdir(parents=True)
    assert card()[0]["base_model"][0] == "mllm"


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: llama2\ntags: [a]\n---\n# X\n", {"license": "llama2"}),
        ("\ufeff---\r\nlicense: no\r\n---\r\n", {"license": "no"}),
        (
            "---\nlicense: other\nlicense_name: n\nlicense_link: LICENSE\n---",
            {"license": "other", "license_name": "n", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system [x]\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_the_licence_is_read_from_the_front_matter(
    tmp_path: Path, readme: str, found: dict[str, str]
):
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert license_of(tmp_path) == found


def test_a_model_without_readme_has_no_licence(tmp_path: Path):
    assert license_of(tmp_path) == {}
