"""The rows of a feature file on their way out: block by block, in order, and none that does not match its checksum."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError
from bbx.spec import Stage
from bbx.store import FeatureFile, format
from bbx.store.checksum import crc32

Missing = Literal["skip", "nan"]

VERSION = "1.0"
"""Of what bbx puts beside the features; an export is recognised by the name under which it stands, `bbx_export`."""
BLOCK_NBYTES = 64 * 1024 * 1024
BLOCK_ROWS = 65_536
"""A block ends at whichever comes first: a short vector's key is larger than its features."""


class Source:
    """The rows of `file` that are exported; position `i` here is row `rows[i]` of the file.

    `rows` int64 `(n,)` ascending, `status` uint8 `(n,)`, `stages` those asked for, in network order.
    """

    def __init__(
        self,
        file: FeatureFile,
        names: tuple[str, ...],
        to: str,
        *,
        missing: Missing,
        shard_nbytes: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.file = file
        self.stages: tuple[Stage, ...] = tuple(file.stages[name] for name in names)
        self.rows = file.done if missing == "skip" else np.arange(len(file))
        self.status = file.status[self.rows]
        self.dtype = np.dtype("<f2" if file.run.dtype == "float16" else "<f4")
        self.shard_nbytes = shard_nbytes
        self._to = to
        self._missing = missing
        self._progress = progress
        self._read_nbytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one image over all exported stages."""
        return self.dtype.itemsize * sum(stage.values for stage in self.stages)

    @property
    def nbytes(self) -> int:
        """Bytes of all features that are exported."""
        return len(self) * self.row_nbytes

    @property
    def images(self) -> NDArray[np.int64]:
        """Row of each position in the whole job, as `/image` has it: a shard's rows do not begin at 0. int64 `(n,)`."""
        return self.rows + self.file.rows.start

    def spans(self, row_nbytes: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Positions from `start` to `stop` as half-open ranges, each of a block's size at `row_nbytes` per row."""
        step = min(max(BLOCK_NBYTES // row_nbytes, 1), BLOCK_ROWS)
        end = len(self) if stop is None else stop
        return ((first, min(first + step, end)) for first in range(start, end, step))

    def keys(self, first: int, last: int) -> list[str]:
        """Keys of the positions, exactly as the images were named; one may hold lone surrogates."""
        keys = self.file.keys
        return [keys[row] for row in self.rows[first:last]]

    def texts(self, first: int, last: int) -> list[str]:
        """Keys of the positions as `/path` stores them: valid UTF-8, whatever the images' names held."""
        return [format.encode_key(key).decode() for key in self.keys(first, last)]

    def words(self, first: int, last: int) -> list[str]:
        """Status of the positions: done, failed or pending."""
        return [format.STATUS_WORDS[status] for status in self.status[first:last]]

    def block(self, stage: str, first: int, last: int) -> NDArray[Any]:
        """The stage's features of the positions, `(last - first, *stage.shape)`, NaN where a row holds none.

        Raises `FileError` naming the first row of which the bytes do not match their checksum.
        """
        rows = self.rows[first:last]
        block = self.file[stage].get(rows, missing="nan")
        sums = self._checksums(stage, rows)
        for place in np.flatnonzero(self.status[first:last] == format.DONE).tolist():
            if crc32(block[place].data) != sums[place]:
                raise self._damaged(int(rows[place]), f"its features of {stage} do not match their checksum")
        self._read_nbytes += block.nbytes
        if self._progress is not None:
            self._progress(self._read_nbytes, self.nbytes)
        return block

    def check_seals(self) -> None:
        """Raise `FileError` for a row whose key or mark was changed since it was written; 1.0 files cannot tell."""
        self.file.check_marks()

    def facts(self, holds: list[str]) -> dict[str, Any]:
        """Where the export comes from, as JSON data. `holds` are the names in its folder, by which it is known."""
        file = self.file
        return {
            "bbx_export": VERSION,
            "to": self._to,
            "creator": f"bbx {metadata.version('bbx')}",
            "source": str(file.path),
            "run": json.loads(file.run.to_json()),
            "run_sha256": file.run.sha256,
            "attempts": file.attempts,
            "rows": len(self),
            "rows_total": file.rows_total,
            "rows_by_status": file.counts._asdict(),
            "missing": self._missing,
            "stages": {stage.name: {"shape": list(stage.shape), "dtype": self.dtype.name} for stage in self.stages},
            "holds": holds,
        }

    def _checksums(self, stage: str, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The stored CRC32 of each of `rows`, ascending; what lies between them is four bytes a row."""
        first, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
        found: NDArray[np.uint32] = self.file._access.rows(format.checksum_name(stage), first, count)[rows - first]
        return found

    def _damaged(self, row: int, fault: str) -> FileError:
        return FileError(
            f"{self.file.path} is damaged in row {row}, {self.file.keys[row]!r}: {fault}",
            f"bbx verify {self.file.path} finds every such row; nothing was exported",
        )
