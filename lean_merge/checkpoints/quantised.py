"""Quantised checkpoints: fp8 with its scales is understood, everything else is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lean_merge.checkpoints.header import TensorSpec
from lean_merge.errors import CheckpointError, shown

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_DTYPES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})
_DEFAULT_BLOCK = (128, 128)
_MEND = "merging needs the original weights in bf16, fp16 or fp32, so pass that checkpoint"
# Scales of activations and caches: a model whose weights are no longer fp8 has no use for them.
_ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "activation_scale", "output_scale"),
    *("q_scale", "k_scale", "v_scale", "prob_scale", "prob_output_scale"),
)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_FP8_METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark"})
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
"""Ends of tensors' names that give a method away where no config does."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What the numbers of an fp8 tensor [..., out, in] are multiplied by.

    Attributes
    ----------
    tensor
        One factor for each block: [..., ceil(out / rows), ceil(in / columns)] in row order.
    block
        Rows and columns of a block.
    """

    tensor: TensorSpec
    block: tuple[int, int]


def split_scales(
    folder: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec], dict[str, Scale]]:
    """The model's own tensors, and the scale of each that is fp8.

    The layouts are those of transformers' FineGrainedFP8 (`weight_scale_inv`, a factor for each
    block) and of compressed-tensors, FBGEMM and ModelOpt (`weight_scale`, one factor, or one for
    each row, group or column). Scales of activations are in neither result.

    Raises
    ------
    CheckpointError
        The checkpoint is quantised otherwise, or an fp8 tensor has no scales that fit it.
    """
    settings = list(_settings(config))
    for each in settings:
        _refuse_other_methods(folder, each)
    _refuse_signs(tensors)
    stated = [block for each in settings for block in _blocks(each)]
    scales: dict[str, Scale] = {}
    for name, spec in tensors.items():
        if spec.dtype not in FP8 or not spec.shape:
            continue
        found = [tensors[name + end] for end in _SCALE_SUFFIXES if name + end in tensors]
        if found:
            scales[name] = _scale(spec, found[0], stated, in_columns=_turned(spec, settings))
        elif settings:
            raise CheckpointError(
                f"{spec.file}: fp8 tensor {shown(name)} has no scales ({shown(name)} with "
                f"{' or '.join(_SCALE_SUFFIXES)}), so its numbers are not known; download the "
                "checkpoint again."
            )
    if not scales:
        return dict(tensors), {}
    spent = {scale.tensor.name for scale in scales.values()}
    kept = {
        name: spec
        for name, spec in tensors.items()
        if name not in spent and not name.rsplit(".", 1)[-1].endswith(_ACTIVATIONS)
    }
    return kept, scales


def _settings(config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """What config.json says of quantisation, for the whole model or for a part."""
    for part in (config or {}, *(v for v in (config or {}).values() if isinstance(v, dict))):
        for key in ("quantization_config", "compression_config"):
            value = part.get(key)
            if isinstance(value, dict) and value:
                yield value


def _refuse_other_methods(folder: Path, settings: Mapping[str, Any]) -> None:
    method = str(settings.get("quant_method", ""))
    detail = ""
    if method == "bitsandbytes":
        detail = " (8 bit)" if settings.get("load_in_8bit") else " (4 bit)"
    elif method == "compressed-tensors" and (form := _integer_format(settings)):
        detail = f" ({form})"
    elif method in _FP8_METHODS and not _is_four_bit(settings):
        return
    named = _METHODS.get(method, shown(method) if method else "an unnamed method")
    raise CheckpointError(f"{folder}: is quantised with {named}{detail}; {_MEND}.")


def _is_four_bit(settings: Mapping[str, Any]) -> bool:
    """Whether ModelOpt or Quark name another format than fp8."""
    algorithm = settings.get("quant_algo", "FP8")
    return isinstance(algorithm, str) and "FP8" not in algorithm.upper()


def _integer_format(settings: Mapping[str, Any]) -> str | None:
    """The format of compressed-tensors if it is not fp8's."""
    form = settings.get("format", "float-quantized")
    if form not in ("float-quantized", "naive-quantized"):
        return _word(form)
    for weights in _weight_groups(settings):
        kind, bits = weights.get("type", "float"), weights.get("num_bits", 8)
        if kind != "float" or bits != 8:
            return f"{_word(kind)}{_word(bits)}"
    return None


def _word(value: Any) -> str:
    """`value` in a message: bare if it is short and plain, as "int" and 4 are."""
    text = value if isinstance(value, str) else shown(value)
    return text if _WORD.fullmatch(text) else shown(value)


def _weight_groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _refuse_signs(tensors: Mapping[str, TensorSpec]) -> None:
    for name, spec in tensors.items():
        sign = next((method for end, method in _SIGNS.items() if name.endswith(end)), None)
        if sign is None and name.endswith("_blocks") and spec.dtype == "U8":
            sign = "MXFP4" if f"{name.removesuffix('_blocks')}_scales" in tensors else None
        if sign is None and name.endswith(".weight") and spec.dtype in ("U8", "I8"):
            sign = _by_neighbours(name, spec, tensors)
        if sign is not None:
            raise CheckpointError(
                f"{spec.file}: tensor {shown(name)} shows that it is quantised with {sign}; "
                f"{_MEND}."
            )


def _by_neighbours(name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
    """What the names beside a weight of 8-bit integers say of it."""
    if any(other.startswith("bitsandbytes") for other in name.split(".")):
        return "bitsandbytes"
    stem = name.removesuffix(".weight")
    if f"{stem}.weight_scale_2" in tensors:
        return "NVFP4"
    if f"{stem}.weight_scales" in tensors or f"{stem}.scales" in tensors:
        return "EETQ"
    if f"{stem}.weight_scale" in tensors:
        return "8-bit integers" if spec.dtype == "I8" else "packed integers"
    return None


def _blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The block sizes that a config states."""
    stated = [settings.get("weight_block_size")]
    stated += [weights.get("block_structure") for weights in _weight_groups(settings)]
    for block in stated:
        if isinstance(block, list) and len(block) == 2:
            if all(type(length) is int and length > 0 for length in block):
                yield block[0], block[1]


def _turned(spec: TensorSpec, settings: list[Mapping[str, Any]]) -> bool:
    """Whether a tensor holds Llama 4's experts as FBGEMM leaves them: a factor for each column."""
    methods = [each.get("quant_method") for each in settings]
    return len(spec.shape) == 3 and "fbgemm_fp8" in methods


def _scale(
    spec: TensorSpec, scale: TensorSpec, stated: list[tuple[int, int]], *, in_columns: bool
) -> Scale:
    """`scale` with the block size that its shape means.

    With `in_columns`, [..., columns, 1] has a factor for each column, as [..., 1, columns] always.
    """
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: scales {shown(scale.name)} have the dtype {scale.dtype}, which is "
            f"not understood; {_MEND}."
        )
    rows, columns = (1, 1, *spec.shape)[-2:]
    count, factors = math.prod(spec.shape[:-2]), math.prod(scale.shape)
    by_row = (rows, 1) if scale.shape[-1:] == (1,) else (rows,)
    if factors == count and 0 not in spec.shape:
        return Scale(scale, (rows, columns))
    by_column = [(1, columns), (columns, 1)][: 1 + in_columns]
    if 0 not in spec.shape and scale.shape in [(*spec.shape[:-2], *each) for each in by_column]:
        return Scale(scale, (rows, 1))
    if scale.shape == (*spec.shape[:-2], *by_row):
        return Scale(scale, (1, columns))
    grid = scale.shape[-2:]
    if len(scale.shape) == len(spec.shape) and scale.shape[:-2] == spec.shape[:-2]:
        for high, wide in (*stated, _DEFAULT_BLOCK):
            if grid == (-(-rows // high), -(-columns // wide)):
                return Scale(scale, (high, wide))
        if grid[0] == rows and grid[1] and columns % grid[1] == 0:
            return Scale(scale, (1, columns // grid[1]))
    raise CheckpointError(
        f"{scale.file}: scales {shown(scale.name)} of shape {list(scale.shape)} do not fit "
        f"{shown(spec.name)} of shape {list(spec.shape)}; download the checkpoint again."
    )
