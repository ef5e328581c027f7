"""Write the model card: what was merged, how to load it, its licence, sources and recipe.

A card is published, so it names models by hub ids, or by the last part of a folder's path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lean_merge.checkpoints.safepaths import checked_file, open_regular
from lean_merge.errors import CheckpointError
from lean_merge.recipe import MergeRecipe

_LICENSE_FIELDS = ("license", "license_name", "license_link")
_KIND_FIELDS = ("pipeline_tag", "language")
_MAX_FRONT_MATTER = 65_536
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_CLASS = re.compile(r"[A-Za-z]\w{0,80}", re.ASCII)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The facts that every card states.

    Attributes
    ----------
    recipe
        The recipe of the merge.
    config
        The config of the model that receives; empty if it has none.
    front
        The fields of its own card's front matter, from `front_matter_of`.
    reference
        Where the method was published, such as "arXiv:2510.14387".
    summary
        Sentences on what was merged, and lines of the summary.
    """

    recipe: MergeRecipe
    config: Mapping[str, Any]
    front: Mapping[str, Any]
    reference: str
    summary: str


def model_card(facts: CardFacts) -> str:
    """Return the content of a merged model's README.md."""
    mllm, base, given = _names(facts.recipe)
    is_text = facts.recipe.mllm_model is None
    told = (
        f"{base} was merged with {given} by lean-merge, without training. They were tuned from it."
        if is_text
        else f"The language model of {mllm} was merged with {given} by lean-merge, without "
        f"training. {base} is the base that they were tuned from. Everything else, vision "
        f"tower and processor included, is {mllm}'s own."
    )
    kind, remote = loading_class(facts.config, is_text=is_text)
    reads = "AutoTokenizer" if is_text else "AutoProcessor"
    trust = ", trust_remote_code=True" if remote else ""
    loading = (
        f"from transformers import {kind}, {reads}\n\n"
        'folder = "path/of/this/folder"\n'
        f'model = {kind}.from_pretrained(folder, dtype="auto"{trust})\n'
        f"{reads.removeprefix('Auto').lower()} = {reads}.from_pretrained(folder{trust})"
    )
    front = {"library_name": "transformers", "tags": ["merge", "lean-merge"]}
    title = f"{mllm.rsplit('/', 1)[-1]} merged with {given}"
    models = [facts.recipe.receiver, facts.recipe.base_model, *_experts(facts.recipe)]
    return _card(facts, front, models, title, told, loading)


def adapter_card(facts: CardFacts) -> str:
    """Return the content of an adapter's README.md."""
    mllm, base, given = _names(facts.recipe)
    kind, remote = loading_class(facts.config, is_text=facts.recipe.mllm_model is None)
    trust = ", trust_remote_code=True" if remote else ""
    source = hub_id(facts.recipe.receiver) or f"path/of/{mllm}"
    loading = (
        "from peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("{source}", dtype="auto"{trust})\n'
        'model = PeftModel.from_pretrained(model, "path/of/this/folder")'
    )
    told = (
        f"What lean-merge adds to the language model of {mllm} when it merges it with {given}, "
        f"without training, as a LoRA adapter. {base} is the base that they were tuned from."
    )
    front = {"library_name": "peft", "tags": ["merge", "lean-merge", "lora"]}
    title = f"{given} as an adapter for {mllm.rsplit('/', 1)[-1]}"
    return _card(facts, front, [facts.recipe.receiver], title, told, loading)


def _card(
    facts: CardFacts,
    front: dict[str, Any],
    models: Sequence[str],
    title: str,
    told: str,
    loading: str,
) -> str:
    """Return a card. Its `base_model` names those of `models` that the hub has."""
    ids = list(dict.fromkeys(each for each in map(hub_id, models) if each))
    arxiv = _ARXIV.fullmatch(facts.reference)
    if ids:
        relation = {"base_model_relation": "adapter"} if len(models) == 1 else {}
        front = {"base_model": ids[0] if relation else ids, **relation, **front}
    front["tags"] = [*front["tags"], *([f"arxiv:{arxiv[1]}"] if arxiv else [])]
    fields = (*_KIND_FIELDS, *_LICENSE_FIELDS)
    front |= {key: facts.front[key] for key in fields if key in facts.front}
    if "pipeline_tag" not in front and "vision_config" in facts.config:
        front["pipeline_tag"] = "image-text-to-text"
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    link = f"[{facts.reference}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else facts.reference
    recipe = _public_recipe(facts.recipe).to_yaml().strip()
    # The fence is longer than any in the recipe, so that no line of the recipe ends the block.
    fence = "`" * max(3, max(map(len, re.findall(r"`+", recipe)), default=0) + 1)
    return (
        f"---\n{matter}---\n\n# {title}\n\n{told}\n\n```python\n{loading}\n```\n\n"
        f"## Merge\n\n{facts.summary.strip()}\n\n"
        f"The method is {facts.recipe.merge_method}, published as {link}. Please cite it, and the "
        f"models that were merged.\n\n## Recipe\n\n{fence}yaml\n{recipe}\n{fence}\n"
    )


def _names(recipe: MergeRecipe) -> tuple[str, str, str]:
    """Return the names of the receiver, the base and the experts, for people."""
    given = ", ".join(map(public_name, _experts(recipe)))
    return public_name(recipe.receiver), public_name(recipe.base_model), given


def _experts(recipe: MergeRecipe) -> list[str]:
    return [expert.model for expert in recipe.experts]


def _public_recipe(recipe: MergeRecipe) -> MergeRecipe:
    """Return the recipe with the names of models that the card may show."""

    def named(source: str) -> str:
        found = hub_id(source)
        # A hub id keeps its revision.
        is_id = found is not None and source.removeprefix("hf://").startswith(found)
        return source if is_id else public_name(source)

    experts = tuple(
        replace(each, model=named(each.model), parent=each.parent and named(each.parent))
        for each in recipe.experts
    )
    return replace(
        recipe,
        base_model=named(recipe.base_model),
        mllm_model=recipe.mllm_model and named(recipe.mllm_model),
        experts=experts,
    )


def loading_class(config: Mapping[str, Any], *, is_text: bool) -> tuple[str, bool]:
    """Return the class of transformers that loads a model, and whether its own code is needed."""
    own = config.get("auto_map")
    if isinstance(own, dict):
        return next((each for each in _AUTO if each in own), "AutoModel"), True
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(found, str) and _CLASS.fullmatch(found):
        return found, False
    return _AUTO[1] if is_text else _AUTO[0], False


def hub_id(source: str) -> str | None:
    """Return the id of a model on the hub, without its revision; None for other sources.

    A folder of the hub's cache tells its id, and so does hf://org/name.
    """
    path = Path(source).expanduser()
    match = _HUB_ID.fullmatch(source.removeprefix("hf://"))
    if match and not path.exists():
        return match[1]
    cached = [found for part in path.parts if (found := _CACHED.fullmatch(part))]
    return f"{cached[-1][1]}/{cached[-1][2]}" if cached else None


def public_name(source: str) -> str:
    """Return a hub id without its revision, or a path's last part: paths tell of their owner."""
    # Line ends are replaced, because they would end a heading.
    last = Path(source).expanduser().resolve().name
    return hub_id(source) or " ".join((last or source).split())


def front_matter_of(folder: Path) -> dict[str, Any]:
    """Return the licence, kind and language of a model, as far as its card's front matter has them.

    A README.md that is absent, too long or malformed has none. Raises CheckpointError if it is a
    link out of the folder.
    """
    file = folder / "README.md"
    if not file.exists():
        return {}
    try:
        with open_regular(checked_file(folder, file)) as stream:
            text = stream.read(_MAX_FRONT_MATTER).decode("utf-8-sig", errors="ignore")
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}); check its rights."
        ) from error
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        # BaseLoader builds strings, lists and dicts only, so "no" stays a word.
        front = yaml.load(match[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(front, dict):
        return {}
    found = {key: front.get(key) for key in (*_LICENSE_FIELDS, *_KIND_FIELDS)}
    # A model may have several languages, and nothing else several times.
    languages = found["language"]
    if not isinstance(languages, list) or not all(isinstance(each, str) for each in languages):
        languages = []
    kept = {key: value for key, value in found.items() if isinstance(value, str) and value}
    return kept | ({"language": languages[:100]} if languages else {})
