"""The feature file: the only package that knows HDF5. `FeatureWriter` makes one, `FeatureFile` reads it.

What `bbx merge` alone needs is in `store.merge`: every command that reads would pay for its import.
"""

from bbx.store.disk import check_room, size_text
from bbx.store.format import Counts
from bbx.store.reader import FeatureFile, RowError, StageView, open_finished_or_partial
from bbx.store.target import Target, check_target
from bbx.store.writer import FeatureWriter

__all__ = [
    "Counts",
    "FeatureFile",
    "FeatureWriter",
    "RowError",
    "StageView",
    "Target",
    "check_room",
    "check_target",
    "open_finished_or_partial",
    "size_text",
]
