"""Quantised checkpoints that no other form understands are refused, with the method's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lean_merge.checkpoints.forms import Encoding, Form, all_forms
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.errors import CheckpointError, shown

MEND = "merging needs the original weights in bf16, fp16 or fp32, so pass that checkpoint"
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_METHODS = MappingProxyType(
    {
        "gptq": "GPTQ",
        "awq": "AWQ",
        "bitsandbytes": "bitsandbytes",
        "gguf": "GGUF",
        "eetq": "EETQ",
        "hqq": "HQQ",
        "aqlm": "AQLM",
        "quanto": "Quanto",
        "torchao": "torchao",
        "mxfp4": "MXFP4",
        "mxfp8": "MXFP8",
        "nvfp4": "NVFP4",
        "compressed-tensors": "compressed-tensors",
        "auto-round": "AutoRound",
        "intel/auto-round": "AutoRound",
        "bitnet": "BitNet",
        "vptq": "VPTQ",
        "spqr": "SpQR",
        "higgs": "HIGGS",
        "exl2": "EXL2",
        "exl3": "EXL3",
    }
)
_SIGNS = MappingProxyType(
    {
        ".qzeros": "GPTQ or AWQ",
        ".qweight": "GPTQ or AWQ",
        ".SCB": "bitsandbytes (8 bit)",
        ".absmax": "bitsandbytes (4 bit)",
        ".quant_map": "bitsandbytes (4 bit)",
        ".weight_packed": "compressed-tensors (packed)",
        ".codebooks": "AQLM",
        ".W_q": "HQQ",
        ".weight._data": "Quanto",
        ".trellis": "EXL3",
        ".q_weight": "EXL2",
    }
)
"""The ends of tensors' names that reveal a method if no config does."""


class Unsupported(Form):
    """Checkpoints that are quantised by a method that no other form understands."""

    def check(
        self, tensors: Mapping[str, TensorSpec], settings: Sequence[Mapping[str, Any]]
    ) -> None:
        """Raise CheckpointError for a quantization_config that no form understands."""
        for each in settings:
            if not any(form.understands(each) for form in all_forms()):
                folder = next((spec.file.parent for spec in tensors.values()), "config.json")
                raise CheckpointError(f"{folder}: is quantised with {_method(each)}; {MEND}.")

    def decode(
        self, tensors: Mapping[str, TensorSpec], settings: Sequence[Mapping[str, Any]]
    ) -> tuple[Mapping[str, TensorSpec], Mapping[str, Encoding]]:
        """Raise CheckpointError for a tensor that gives a method away, if it is left by others."""
        del settings
        for name, spec in tensors.items():
            if (sign := _sign(name, spec, tensors)) is not None:
                raise CheckpointError(
                    f"{spec.file}: tensor {shown(name)} shows that it is quantised with {sign}; "
                    f"{MEND}."
                )
        return tensors, {}


FORM = Unsupported()


def _method(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method", ""))
    detail = ""
    if method == "bitsandbytes":
        detail = " (8 bit)" if settings.get("load_in_8bit") else " (4 bit)"
    elif method == "compressed-tensors" and (found := integer_format(settings)):
        detail = f" ({found})"
    return _METHODS.get(method, shown(method) if method else "an unnamed method") + detail


def integer_format(settings: Mapping[str, Any]) -> str | None:
    """Return the format that compressed-tensors stores instead of fp8, such as "int4", or None."""
    name = settings.get("format", "float-quantized")
    if name not in ("float-quantized", "naive-quantized"):
        return _word(name)
    for weights in weight_groups(settings):
        kind, bits = weights.get("type", "float"), weights.get("num_bits", 8)
        if kind != "float" or bits != 8:
            return f"{_word(kind)}{_word(bits)}"
    return None


def _word(value: Any) -> str:
    """Return `value` for a message, without quotes if it is short and plain, as "int" and 4 are."""
    text = value if isinstance(value, str) else shown(value)
    return text if _WORD.fullmatch(text) else shown(value)


def weight_groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield compressed-tensors' settings of the weights, by groups of layers."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _sign(name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
    """Return the method that a tensor's name, and the names beside it, reveal."""
    for end, method in _SIGNS.items():
        if name.endswith(end):
            return method
    if spec.dtype == "U8" and name.endswith("_blocks"):
        return "MXFP4" if f"{name.removesuffix('_blocks')}_scales" in tensors else None
    if spec.dtype not in ("U8", "I8") or not name.endswith(".weight"):
        return None
    if any(part.startswith("bitsandbytes") for part in name.split(".")):
        return "bitsandbytes"
    stem = name.removesuffix(".weight")
    if f"{stem}.weight_scale_2" in tensors:
        return "NVFP4"
    if f"{stem}.weight_scales" in tensors or f"{stem}.scales" in tensors:
        return "EETQ"
    if f"{stem}.weight_scale" in tensors:
        return "8-bit integers" if spec.dtype == "I8" else "packed integers"
    return None
