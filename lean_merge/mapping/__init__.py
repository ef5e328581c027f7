"""Whose weight is whose: logical weights of the base, found in the MLLM and in every expert."""

from lean_merge.mapping.modules import module_name
from lean_merge.mapping.names import (
    Coverage,
    LogicalWeight,
    MappedWeight,
    language_layout,
    layer_of,
    map_roles,
)
from lean_merge.mapping.placement import Place
from lean_merge.mapping.rows import WeightSource
from lean_merge.mapping.sources import decoded_matrices

__all__ = [
    "Coverage",
    "LogicalWeight",
    "MappedWeight",
    "Place",
    "WeightSource",
    "decoded_matrices",
    "language_layout",
    "layer_of",
    "map_roles",
    "module_name",
]
