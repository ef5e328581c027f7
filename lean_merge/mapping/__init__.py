"""Find the logical weights of the base in the MLLM and in every expert."""

from lean_merge.mapping.kinship import heads as stated_heads
from lean_merge.mapping.names import Coverage, map_roles
from lean_merge.mapping.structure import language_layout
from lean_merge.mapping.weights import LogicalWeight, MappedWeight, layer_of

__all__ = [
    "Coverage",
    "LogicalWeight",
    "MappedWeight",
    "language_layout",
    "layer_of",
    "map_roles",
    "stated_heads",
]
