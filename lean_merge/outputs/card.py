"""Write the model card: what was merged, its licence, and the recipe to repeat the merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lean_merge.checkpoints.safepaths import checked_file, open_regular
from lean_merge.errors import CheckpointError

_LICENSE_FIELDS = ("license", "license_name", "license_link")
_MAX_FRONT_MATTER = 65_536
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?", re.ASCII)


def model_card(
    *,
    recipe_yaml: str,
    base: str,
    mllm: str,
    experts: Sequence[str],
    license_fields: Mapping[str, str],
    summary: str,
) -> str:
    """Return the content of README.md.

    Parameters
    ----------
    recipe_yaml
        The recipe, as YAML.
    base, mllm, experts
        The sources, as the user named them. For a local folder, only its name appears in the card.
    license_fields
        From `license_of`.
    summary
        Markdown: what was merged, copied and skipped.
    """
    is_text = mllm == base
    mllm, base, *others = (_public_name(source) for source in (mllm, base, *experts))
    given = ", ".join(others)
    front: dict[str, object] = {
        "base_model": list(dict.fromkeys([mllm, base, *others])),
        "library_name": "transformers",
        "tags": ["merge", "lean-merge"],
    }
    told = (
        f"{base} was merged with {given} by lean-merge, without training. They were tuned from it."
        if is_text
        else f"The language model of {mllm} was merged with {given} by lean-merge, without "
        f"training. {base} is the base that they were tuned from. Everything else, vision "
        f"tower and processor included, is {mllm}'s own."
    )
    body = f"# {mllm.rsplit('/', 1)[-1]} merged with {given}\n\n{told}\n\n{summary.strip()}"
    return _card(front, license_fields, body, recipe_yaml)


def adapter_card(
    *,
    recipe_yaml: str,
    base: str,
    mllm: str,
    experts: Sequence[str],
    license_fields: Mapping[str, str],
    summary: str,
) -> str:
    """Return the content of an adapter's README.md; the parameters are those of `model_card`."""
    mllm, base, *others = (_public_name(source) for source in (mllm, base, *experts))
    given = ", ".join(others)
    front: dict[str, object] = {
        "base_model": mllm,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["merge", "lean-merge", "lora"],
    }
    body = (
        f"# {given} as an adapter for {mllm.rsplit('/', 1)[-1]}\n\n"
        f"What lean-merge adds to the language model of {mllm} when it merges it with "
        f"{given}, without training, as a LoRA adapter. {base} is the base that they were "
        "tuned from.\n\n"
        "```python\n"
        "from peft import PeftModel\n\n"
        f"# model: {mllm}, loaded with transformers\n"
        'model = PeftModel.from_pretrained(model, "path/of/this/folder")\n'
        "```\n\n"
        f"{summary.strip()}"
    )
    return _card(front, license_fields, body, recipe_yaml)


def _card(
    front: dict[str, object], license_fields: Mapping[str, str], body: str, recipe_yaml: str
) -> str:
    front = front | {key: license_fields[key] for key in _LICENSE_FIELDS if key in license_fields}
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    # The fence is longer than any in the recipe, so that no line of the recipe ends the block.
    longest = max(map(len, re.findall(r"`+", recipe_yaml)), default=0)
    fence = "`" * max(3, longest + 1)
    return (
        f"---\n{matter}---\n\n{body}\n\n## Recipe\n\n{fence}yaml\n{recipe_yaml.strip()}\n{fence}\n"
    )


def _public_name(source: str) -> str:
    """Return a hub id without its revision, or a path's last part: paths tell of their owner."""
    path = Path(source).expanduser()
    match = _HUB_ID.fullmatch(source)
    if match and not path.exists():
        return match[1]
    # Line ends are replaced, because they would end a heading.
    return " ".join((path.resolve().name or source).split())


def license_of(mllm_path: Path) -> dict[str, str]:
    """Return license, license_name and license_link, as far as README.md's front matter has them.

    A README that is absent, too long or malformed has none. Raises CheckpointError if it is a link
    out of the folder.
    """
    file = mllm_path / "README.md"
    if not file.exists():
        return {}
    try:
        with open_regular(checked_file(mllm_path, file)) as stream:
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
    found = {key: front.get(key) for key in _LICENSE_FIELDS}
    return {key: value for key, value in found.items() if isinstance(value, str) and value}
