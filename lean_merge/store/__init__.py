"""Write an output folder so that it is whole or visibly unfinished, even after a crash.

The layout of its files is known before a byte is written, and one last rename makes it whole.
"""

from lean_merge.store.blocks import BlockGroup, BlockStore, StoredBlock
from lean_merge.store.folder import OutputFolder, Spans, WriteBytes
from lean_merge.store.journal import JOURNAL, Difference, Journal, read_journal
from lean_merge.store.layout import OutputTensor, Shard, index_json, plan_shards
from lean_merge.store.workplace import checked_place, find_complete

__all__ = [
    "JOURNAL",
    "BlockGroup",
    "BlockStore",
    "Difference",
    "Journal",
    "OutputFolder",
    "OutputTensor",
    "Shard",
    "Spans",
    "StoredBlock",
    "WriteBytes",
    "checked_place",
    "find_complete",
    "index_json",
    "plan_shards",
    "read_journal",
]
