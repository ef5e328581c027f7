"""Writing the output: layout known beforehand, bytes at their offsets, whole or visibly unfinished.

Shards, side files and model card become a checkpoint by one last rename.
"""

from lean_merge.store.blocks import Block, BlockStore, Group
from lean_merge.store.card import adapter_card, license_of, model_card
from lean_merge.store.folder import OutputFolder, Spans, WriteBytes
from lean_merge.store.journal import JOURNAL, Difference, Journal, read_journal
from lean_merge.store.layout import OutputTensor, Shard, index_json, plan_shards
from lean_merge.store.sidefiles import (
    copy_side_files,
    missing_from_cache,
    remote_code,
    side_files,
)
from lean_merge.store.state import changed_input
from lean_merge.store.workplace import check_output, checked_place, find_complete

__all__ = [
    "JOURNAL",
    "Block",
    "BlockStore",
    "Difference",
    "Group",
    "Journal",
    "OutputFolder",
    "OutputTensor",
    "Shard",
    "Spans",
    "WriteBytes",
    "adapter_card",
    "changed_input",
    "check_output",
    "checked_place",
    "copy_side_files",
    "find_complete",
    "index_json",
    "license_of",
    "missing_from_cache",
    "model_card",
    "plan_shards",
    "read_journal",
    "remote_code",
    "side_files",
]
