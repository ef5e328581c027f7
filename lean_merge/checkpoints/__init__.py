"""Read checkpoints: their folders or hub ids, their headers, and blocks of rows.

Files are untrusted, so each is checked before anything is computed from it. Nothing here loads a
model or runs code that came with one.
"""

from lean_merge.checkpoints.checkpoint import Checkpoint, by_role, open_checkpoint, open_expert
from lean_merge.checkpoints.dtypes import (
    FLOATING,
    ITEM_BITS,
    common_dtype,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.checkpoints.forms import downloads_shown
from lean_merge.checkpoints.header import TensorSpec, read_header
from lean_merge.checkpoints.identity import identify
from lean_merge.checkpoints.reader import TensorReader, as_bytes
from lean_merge.checkpoints.rows import Place, WeightSource

__all__ = [
    "FLOATING",
    "ITEM_BITS",
    "Checkpoint",
    "Place",
    "TensorReader",
    "TensorSpec",
    "WeightSource",
    "as_bytes",
    "by_role",
    "common_dtype",
    "downloads_shown",
    "identify",
    "open_checkpoint",
    "open_expert",
    "read_header",
    "safetensors_dtype",
    "torch_dtype",
]
