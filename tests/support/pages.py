"""Pages read as a browser's parser reads them, and dictionaries of which pages are made."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

HOSTILE = (
    "</script><script>document.title='caught'</script>",
    "<img src=x onerror=\"document.title='caught'\">",
    "<a href='https://example.com'>%{x}</a>&lt;b&gt;",
    "$\\alpha$ `${1}` \u202etxt\u2028\u0000",
)
"""Names that a page must show and not obey."""
LONG = (
    "W" * 300,
    "deep.module_path." * 20,
    "漢字" * 90,
    "שלום عالم " * 30,
)
"""Names that leave no room for anything else, where they are shown whole."""


class Page(HTMLParser):
    """The elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.styles = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif "style" in self._open:
            self.styles += data
        else:
            self.texts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        """What the scripts are given."""
        return json.loads(self.scripts[0])

    @property
    def text(self) -> str:
        """All text between tags."""
        return " ".join(" ".join(self.texts).split())

    @property
    def policy(self) -> dict[str, list[str]]:
        """The Content-Security-Policy by directive."""
        (content,) = [
            attributes["content"] or ""
            for tag, attributes in self.elements
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        words = [each.split() for each in content.split(";")]
        return {each[0]: each[1:] for each in words}

    def digests(self) -> list[str]:
        """Of the scripts that run, as the policy names them."""
        return [
            "'sha256-" + base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() + "'"
            for each in self.scripts[1:]
        ]

    def addresses(self) -> list[str]:
        """Every address that an element would open by itself."""
        named = ("src", "srcset", "data", "poster", "background")
        found = [
            value or ""
            for tag, attributes in self.elements
            for name, value in attributes.items()
            if name in named or (name == "href" and tag != "a")
        ]
        return [each for each in found if not each.startswith("data:")]

    def style_addresses(self) -> list[str]:
        """What the style sheet would fetch."""
        return re.findall(r"url\(|@import", self.styles)


def sweep(points: int = 9) -> dict[str, Any]:
    """A sweep over thresholds and two sets of stages, with a result but for one that failed."""
    thresholds = [round(0.1 + 0.8 * n / max(1, points - 1), 3) for n in range(points)]
    stages = ["select", "select,rescale,project"]
    rows = []
    for stage in stages:
        for n, threshold in enumerate(thresholds):
            failed = n == 2 and stage == "select"
            rows.append(
                {
                    "name": f"t{threshold:g}-{stage}",
                    "path": f"points/{stage}/{n}",
                    "parameters": {"threshold": threshold, "stages": stage},
                    "selected": 224 - 20 * n,
                    "update_norm": 9.0 / (1 + n),
                    "bytes_own": 10_000_000 * (n + 1),
                    "bytes_shared": 4_000_000_000,
                    "seconds": 3.5 + n,
                    "same_as": rows[-1]["name"] if n == points - 1 else None,
                    "result": None if failed else {"sums": 0.7 + 0.02 * n, "read": 0.97},
                    "error": "the command ended with exit code 1" if failed else None,
                }
            )
    axes = {"threshold": thresholds, "stages": stages, "scale": [], "temperature": []}
    return {"version": 1, "analysis": "analysis", "axes": axes, "points": rows}


def renamed_sweep(names: Sequence[str]) -> dict[str, Any]:
    """A sweep in which strangers chose every name."""
    found = sweep()
    stages = dict(zip(found["axes"].pop("stages"), names, strict=False))
    found["axes"][names[2]] = list(stages.values())
    found["analysis"] = names[3]
    for point in found["points"]:
        parameters = point["parameters"]
        parameters[names[2]] = stages[parameters.pop("stages")]
        point.update(name=names[3], same_as=point["same_as"] and names[0])
        point["error"] = point["error"] and names[1]
        if point["result"]:
            point["result"] = dict(zip(names, point["result"].values(), strict=False))
    return found


def renamed_comparison(names: Sequence[str]) -> dict[str, Any]:
    """A comparison in which strangers chose every name."""
    found = comparison()
    found["reason"] = "\n".join(names)
    for model in found["models"]:
        model.update(source=names[0], fault=names[1])
        model["facts"][names[2]] = {names[0]: names[1], names[1]: names[0]}
    for place, row in enumerate(found["weights"]):
        row["module"] = names[place % 7 % len(names)]
        row["weight"] = f"layers.{row['layer']}.{row['module']}"
    for pair in found["pairs"]:
        pair["verdict"] = names[3]
    return found


def comparison(layers: int = 32) -> dict[str, Any]:
    """A comparison of 7B models with an expert of other feed-forward widths and heads."""
    from support.analyses import LEAVES

    def shape(leaf: str, middle: int) -> list[int]:
        tall, wide = LEAVES[leaf]
        return [middle if tall > 1 else 4096, middle if wide > 1 else 4096]

    rows = []
    for layer in range(layers):
        for leaf in LEAVES:
            ours, theirs = shape(leaf, 11008), shape(leaf, 14336)
            near = {"distance": 0.02, "distance_unrelated": 1.41}
            far = {"distance": 1.4, "distance_unrelated": 1.41, "cosine": 1e-4}
            near |= {"cosine": 0.9998 - 1e-4 * layer, "cosine_unrelated": 6e-4}
            far |= {"cosine_unrelated": 6e-4}
            rows.append(
                {
                    "weight": f"layers.{layer}.{leaf}",
                    "layer": layer,
                    "module": leaf.rpartition(".")[2],
                    "shapes": {"base": ours, "mllm": ours, "expert 1": theirs},
                    "pairs": [near, far if ours == theirs else None, None],
                }
            )
    sizes = {"hidden size": 4096, "intermediate size": 11008, "attention heads": 32}
    models = [
        {
            "role": role,
            "source": f"org/{role.replace(' ', '-')}",
            "prefix": "model.layers.",
            "fault": None,
            "facts": {
                "sizes": sizes | ({"intermediate size": 14336} if role == "expert 1" else {}),
                "positions": {"rope_theta": "500000" if role == "expert 1" else "10000"},
                "format": {"dtype": "BF16", "tied embeddings": False},
            },
        }
        for role in ("base", "mllm", "expert 1")
    ]
    summary = {"distance": 0.02, "distance_unrelated": 1.41, "cosine": 0.999}
    summary |= {"cosine_unrelated": 6e-4, "only_in_one": 0, "beyond_unrelated": 224}
    pairs = [
        {"one": "mllm", "other": "base", "equal_shape": 224, "unequal_shape": 0, **summary}
        | {"compared": 224, "verdict": "one origin"},
        {"one": "expert 1", "other": "base", "equal_shape": 128, "unequal_shape": 96, **summary}
        | {"compared": 128, "cosine": 1e-4, "distance": 1.4, "verdict": "unrelated"},
        {"one": "expert 1", "other": "mllm", "equal_shape": 0, "unequal_shape": 224, **summary}
        | {"compared": 0, "cosine": None, "distance": None, "verdict": "not comparable"},
    ]
    tokenizers = [
        {"role": "mllm", "tokens": 32003, "base_tokens": 32000, "shared": 32000, "moved": 0},
        {"role": "expert 1", "tokens": 128256, "base_tokens": 32000, "shared": 21000, "moved": 9},
    ]
    return {
        "version": 1,
        "reason": "The models do not map onto each other at 96 places.\n  layers.0.mlp.gate_proj",
        "models": models,
        "differences": [],
        "tokenizers": tokenizers,
        "pairs": pairs,
        "weights": rows,
    }
