"""Writing the output: layout known beforehand, bytes at their offsets, whole or visibly unfinished.

Shards, side files and model card become a checkpoint by one last rename.
"""

from lean_merge.output.adapter import (
    ADAPTER,
    AdapterModule,
    StoredFactors,
    adapter_layout,
    cast_factors,
    write_adapter,
)
from lean_merge.output.blocks import Block, BlockStore, Group, Reserve
from lean_merge.output.card import adapter_card, license_of, model_card
from lean_merge.output.check import Difference, FolderCheck, check_folder
from lean_merge.output.factors import FACTORS, factor_shapes, factors_layout, write_factors
from lean_merge.output.folder import OutputFolder
from lean_merge.output.journal import JOURNAL, Journal, read_journal
from lean_merge.output.layout import OutputTensor, Shard, index_json, plan_shards
from lean_merge.output.opening import check_output, find_complete
from lean_merge.output.sharing import EqualShard, Sharing
from lean_merge.output.sidefiles import (
    copy_side_files,
    missing_from_cache,
    remote_code,
    side_files,
)
from lean_merge.output.state import changed_input

__all__ = [
    "ADAPTER",
    "FACTORS",
    "JOURNAL",
    "AdapterModule",
    "Block",
    "BlockStore",
    "Difference",
    "EqualShard",
    "FolderCheck",
    "Group",
    "Journal",
    "OutputFolder",
    "OutputTensor",
    "Reserve",
    "Shard",
    "Sharing",
    "StoredFactors",
    "adapter_card",
    "adapter_layout",
    "cast_factors",
    "changed_input",
    "check_folder",
    "check_output",
    "copy_side_files",
    "factor_shapes",
    "factors_layout",
    "find_complete",
    "index_json",
    "license_of",
    "missing_from_cache",
    "model_card",
    "plan_shards",
    "read_journal",
    "remote_code",
    "side_files",
    "write_adapter",
    "write_factors",
]
