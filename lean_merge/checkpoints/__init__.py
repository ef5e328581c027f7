"""Reading checkpoints: headers, folders and hub ids, row-block reads, and whose weight is whose.

What is read is untrusted, so every file is checked before anything is computed from it. Nothing
here loads a model or runs code that came with one.
"""

from lean_merge.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_expert
from lean_merge.checkpoints.dtypes import (
    FLOATING,
    ITEM_BITS,
    common_dtype,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.checkpoints.header import TensorSpec, read_header
from lean_merge.checkpoints.hub import downloads_shown
from lean_merge.checkpoints.identity import identify
from lean_merge.checkpoints.modules import module_name
from lean_merge.checkpoints.names import (
    Coverage,
    LogicalWeight,
    MappedWeight,
    language_layout,
    map_roles,
)
from lean_merge.checkpoints.placement import Place
from lean_merge.checkpoints.reader import TensorReader, as_bytes
from lean_merge.checkpoints.rows import WeightSource
from lean_merge.checkpoints.sources import decoded_matrices

__all__ = [
    "FLOATING",
    "ITEM_BITS",
    "Checkpoint",
    "Coverage",
    "LogicalWeight",
    "MappedWeight",
    "Place",
    "TensorReader",
    "TensorSpec",
    "WeightSource",
    "as_bytes",
    "common_dtype",
    "decoded_matrices",
    "downloads_shown",
    "identify",
    "language_layout",
    "map_roles",
    "module_name",
    "open_checkpoint",
    "open_expert",
    "read_header",
    "safetensors_dtype",
    "torch_dtype",
]
