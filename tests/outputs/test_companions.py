"""What lies beside the weights: the MLLM's side files, and the model card."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lean_merge import MergeRecipe
from lean_merge.checkpoints.sidefiles import side_files
from lean_merge.errors import CheckpointError
from lean_merge.outputs.card import CardFacts, front_matter_of, model_card
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


def card(config: dict[str, Any] | None = None, **changes: Any) -> tuple[dict[str, Any], str]:
    recipe = MergeRecipe(
        **{
            "base_model": "org/base@main",
            "mllm_model": "org/mllm",
            "experts": ["/data/models/math", "org/code"],
            **changes,
        }
    )
    front = {"license": "other", "license_name": "x", "junk": "y", "language": ["en", "de"]}
    shown = {"pipeline_tag": "image-text-to-text", **front}
    facts = CardFacts(recipe, config or {}, shown, "arXiv:2510.14387", "224 weights merged.")
    _, matter, body = model_card(facts).split("---\n", 2)
    return yaml.safe_load(matter), body


def test_the_card_says_what_was_merged_and_how_it_is_loaded():
    front, body = card({"architectures": ["LlavaForConditionalGeneration"]})
    assert front == {
        "base_model": ["org/mllm", "org/base", "org/code"],
        "library_name": "transformers",
        "tags": ["merge", "lean-merge", "arxiv:2510.14387"],
        "pipeline_tag": "image-text-to-text",
        "language": ["en", "de"],
        "license": "other",
        "license_name": "x",
    }
    assert "224 weights merged." in body
    assert "model = LlavaForConditionalGeneration.from_pretrained(folder" in body
    assert "https://arxiv.org/abs/2510.14387" in body
    # The recipe is there with ids and names of folders, but without their paths.
    recipe = MergeRecipe.from_yaml(re.search(r"```yaml\n(.*?)\n```", body, re.DOTALL)[1])
    assert recipe.base_model == "org/base@main"
    assert [each.model for each in recipe.experts] == ["math", "org/code"]
    assert "/data" not in body


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "AutoModelForCausalLM.from_pretrained"),
        ({"architectures": ["os; import x"]}, "AutoModelForImageTextToText.from_pretrained"),
        ({}, "AutoModelForImageTextToText.from_pretrained"),
    ],
)
def test_the_card_loads_a_model_by_the_class_that_its_config_names(
    config: dict[str, Any], line: str
):
    _, body = card(config)
    assert line in body and "import x" not in body
    assert ("trust_remote_code=True" in body) is ("auto_map" in config)


def test_a_recipe_cannot_end_its_block():
    _, body = card(include=["```"])
    assert "````yaml\n" in body
    assert body.rstrip().endswith("````")


def test_a_local_folder_named_like_a_hub_id_is_not_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "mllm").mkdir(parents=True)
    assert card()[0]["base_model"] == ["org/base", "org/code"]


def test_a_folder_of_the_hubs_cache_tells_its_id(tmp_path: Path):
    folder = tmp_path / "hub" / "models--org--mllm-7b" / "snapshots" / "0123"
    front, body = card(mllm_model=str(folder))
    assert front["base_model"][0] == "org/mllm-7b"
    assert str(tmp_path) not in body


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: llama2\ntags: [a]\n---\n# X\n", {"license": "llama2"}),
        ("\ufeff---\r\nlicense: no\r\n---\r\n", {"license": "no"}),
        (
            "---\nlicense: other\nlicense_name: n\nlicense_link: LICENSE\n---",
            {"license": "other", "license_name": "n", "license_link": "LICENSE"},
        ),
        ("---\nlicense: {mit: 1}\n---\n", {}),
        (
            "---\nlanguage: [en, no]\npipeline_tag: image-text-to-text\nmodel-index: []\n---\n",
            {"language": ["en", "no"], "pipeline_tag": "image-text-to-text"},
        ),
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
    assert front_matter_of(tmp_path) == found


def test_a_model_without_readme_has_no_licence(tmp_path: Path):
    assert front_matter_of(tmp_path) == {}
