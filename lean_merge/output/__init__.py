"""Writing the output: layout known beforehand, bytes at their offsets, whole or visibly unfinished.

Shards, side files and model card become a checkpoint by one last rename.
"""

from lean_merge.output.adapter import (
    ADAPTER,
    AdapterModule,
    FactorStore,
    StoredFactors,
    adapter_layout,
    write_adapter,
)
from lean_merge.output.card import adapter_card, license_of, model_card
from lean_merge.output.folder import OutputFolder, check_output
from lean_merge.output.layout import OutputTensor, Shard, index_json, plan_shards
from lean_merge.output.sidefiles import copy_side_files, remote_code, side_files

__all__ = [
    "ADAPTER",
    "AdapterModule",
    "FactorStore",
    "OutputFolder",
    "OutputTensor",
    "Shard",
    "StoredFactors",
    "adapter_card",
    "adapter_layout",
    "check_output",
    "copy_side_files",
    "index_json",
    "license_of",
    "model_card",
    "plan_shards",
    "remote_code",
    "side_files",
    "write_adapter",
]
