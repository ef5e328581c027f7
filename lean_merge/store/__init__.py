"""Writing the output: layout known beforehand, bytes at their offsets, whole or visibly unfinished.

All files of an output become a model by one last rename.
"""

from lean_merge.store.blocks import Block, BlockStore, Group
from lean_merge.store.folder import OutputFolder, Spans, WriteBytes
from lean_merge.store.journal import JOURNAL, Difference, Journal, read_journal
from lean_merge.store.layout import OutputTensor, Shard, index_json, plan_shards
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
    "changed_input",
    "check_output",
    "checked_place",
    "find_complete",
    "index_json",
    "plan_shards",
    "read_journal",
]
