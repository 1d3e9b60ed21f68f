"""The schema of bbx-features 1.1: names, types and texts of everything in the file, in one place.

Keys are stored as valid UTF-8 whatever a file system holds. A byte that is not UTF-8 reaches Python as a lone
surrogate, and is written as JSON would write it (`\\udcff`); a real backslash that would read as such an escape becomes
`\\u005c`. So every key comes back exactly, and a plain reader (h5py, netCDF) never meets text that it cannot decode.
"""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bbx.errors import UsageError
from bbx.spec import InputFile, RunSpec, Stage
from bbx.stages import storable_name
from bbx.store.checksum import crc32

FORMAT = "bbx-features"
VERSION = "1.1"
PENDING, DONE, FAILED = 0, 1, 2
STATUS_WORDS = ("pending", "done", "failed")

IMAGE, PATH, STATUS = "image", "path", "status"
RUN, ATTEMPTS, FAILURE = "provenance/run", "provenance/attempts", "provenance/failure"
ATTEMPT_SLOTS, ATTEMPT_NBYTES, FAILURE_NBYTES = 16, 4096, 256
INPUT_NBYTES, INPUT_MTIME, INPUT_DIGEST = (f"provenance/input_{fact}" for fact in ("nbytes", "mtime", "digest"))
SEAL = "provenance/seal"
DIGEST_NBYTES = 16
"""BLAKE2b of an input file's content; zeros where it was not taken."""
MAX_KEY_NBYTES = 65_535
MAX_RUN_NBYTES = 1 << 24

ALIGN_FROM, ALIGN_TO = 65_536, 4096
"""Objects of at least `ALIGN_FROM` bytes start at a multiple of `ALIGN_TO` bytes."""

BIRTH = "id"
"""What tells a start from every other; the first one's tells a file from every other."""
_CRC = "crc32"
_CRC_NBYTES = len(f', "{_CRC}": "00000000"')
"""The last member of a start's JSON: the CRC32 of the text without it."""

_ESCAPE = re.compile(r"\\u(005c|d[89a-f][0-9a-f]{2})")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Counts(NamedTuple):
    """Rows by status."""

    done: int
    failed: int
    pending: int

    @classmethod
    def of(cls, status: NDArray[np.uint8]) -> Counts:
        """Count `status`, uint8 `(n,)`."""
        pending, done, failed = np.bincount(status, minlength=3)[:3].tolist()
        return cls(done, failed, pending)


@dataclass(frozen=True, slots=True)
class Column:
    """Where a dataset's rows lie: `row` of them starts at `offset + row * row_nbytes`, or nowhere fixed (None)."""

    name: str
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]
    offset: int | None = None

    @property
    def row_nbytes(self) -> int:
        """Bytes per row."""
        return self.dtype.itemsize * math.prod(self.row_shape)


def columns(run: RunSpec, version: tuple[int, int] = (1, 1)) -> tuple[Column, ...]:
    """Every dataset that is written after the skeleton is built, one row per image (attempts: per slot), unplaced.

    Files of version 1.0 have neither the input's facts nor seals.
    """
    real = np.dtype("<f2" if run.dtype == "float16" else "<f4")
    sealed = (
        Column(INPUT_NBYTES, np.dtype("<i8"), ()),
        Column(INPUT_MTIME, np.dtype("<i8"), ()),
        Column(INPUT_DIGEST, np.dtype("u1"), (DIGEST_NBYTES,)),
        Column(SEAL, np.dtype("<u4"), ()),
    )
    return (
        *(sealed if version >= (1, 1) else ()),
        Column(STATUS, np.dtype("u1"), ()),
        Column(FAILURE, np.dtype(f"S{FAILURE_NBYTES}"), ()),
        Column(ATTEMPTS, np.dtype("u1"), (ATTEMPT_NBYTES,)),
        *(Column(checksum_name(stage.name), np.dtype("<u4"), ()) for stage in run.stages),
        *(Column(stage.name, real, stage.shape) for stage in run.stages),
    )


def label(run_text: str, start: int, stop: int, total: int) -> int:
    """CRC32 of the run as the file has it, labels included, and of its place in the job: what no seal covers."""
    return crc32(f"{run_text}\n{start} {stop} {total}".encode())


def checksum_name(stage: str) -> str:
    """Name of the dataset that holds the CRC32 of each of the stage's rows."""
    return f"checksum/{stage}"


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What a file says of `k` rows beside their features: one array per column, as on disk, and keys as stored."""

    keys: Sequence[bytes]
    status: NDArray[np.uint8]
    reasons: NDArray[np.bytes_]
    nbytes: NDArray[np.int64]
    mtimes: NDArray[np.int64]
    digests: NDArray[np.uint8]
    sums: NDArray[np.uint32]

    def seals(self) -> NDArray[np.uint32]:
        """CRC32 over key, status, reason, input file and the stages' checksums `(k, stages)`, each row's own `(k,)`.

        It binds a row to its image: a key, a mark or a reason that changed is told from the one that was written.
        """
        parts = (
            self.status.astype("u1")[:, None],
            self.reasons.astype(f"S{FAILURE_NBYTES}").view("u1").reshape(len(self.keys), -1),
            self.nbytes.astype("<i8")[:, None].view("u1"),
            self.mtimes.astype("<i8")[:, None].view("u1"),
            self.digests,
            np.ascontiguousarray(self.sums, "<u4").view("u1").reshape(len(self.keys), -1),
        )
        block = np.concatenate(parts, axis=1)
        return np.array([crc32(row.data, crc32(key)) for key, row in zip(self.keys, block, strict=True)], "<u4")


def input_arrays(inputs: Sequence[InputFile]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Sizes `(k,)`, mtimes `(k,)` and digests `(k, 16)` as they are stored."""
    digests = b"".join(one.digest[:DIGEST_NBYTES].ljust(DIGEST_NBYTES, b"\0") for one in inputs)
    return (
        np.array([one.nbytes for one in inputs], "<i8"),
        np.array([one.mtime_ns for one in inputs], "<i8"),
        np.frombuffer(digests, np.uint8).reshape(len(inputs), DIGEST_NBYTES),
    )


def axes(stage: Stage) -> tuple[str, ...]:
    """Names of the stage's axes after `image`."""
    return {3: ("channel", "y", "x"), 2: ("token", "feature"), 1: ("channel",)}[len(stage.shape)]


def coordinates(stage: Stage, axis: str, length: int) -> NDArray[Any]:
    """Coordinates along an axis, `(length,)`: cell centres in input pixels for y and x, else indices."""
    if axis in ("y", "x"):
        return ((np.arange(length) + 0.5) * stage.stride - 0.5).astype("<f4")
    return np.arange(length, dtype="<i4")


def check_run(run: RunSpec) -> None:
    """Raise `UsageError` for a run that the file cannot hold: no stages, or their names or shapes."""
    names = [stage.name for stage in run.stages]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"a feature file needs one or more stages, each once; got {', '.join(names) or 'none'}")
    for stage in run.stages:
        if storable_name(stage.name) != stage.name:
            raise UsageError(f"{stage.name!r} clashes with the file's own names", f"use {storable_name(stage.name)!r}")
        if not 1 <= len(stage.shape) <= 3 or min(stage.shape) < 1:
            raise UsageError(f"stage {stage.name} has shape {stage.shape}", "(c, h, w), (t, d) or (c,), none empty")


def encode_key(key: str) -> bytes:
    """The UTF-8 text that stores `key`; raises `UsageError` for one that HDF5 strings cannot hold."""
    if "\\u" in key:
        key = _ESCAPE.sub(lambda found: "\\u005c" + found[0][1:], key)
    try:
        data = key.encode()
    except UnicodeEncodeError:
        data = _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", key).encode()
    if b"\0" in data or len(data) > MAX_KEY_NBYTES:
        raise UsageError(f"the key {key[:80]!r} holds a NUL or is longer than {MAX_KEY_NBYTES} bytes")
    return data


def decode_key(data: bytes) -> str:
    """The key that `encode_key` stored; raises `UnicodeDecodeError` for text that it never writes."""
    text = data.decode()
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if "\\u" in text else text


def encode_reason(reason: str) -> bytes:
    """`reason` as at most 256 bytes of UTF-8, cut at a character's boundary."""
    text = " ".join(reason.replace("\0", " ").split()) or "no reason given"
    data = text.encode("utf-8", "backslashreplace")[:FAILURE_NBYTES]
    return data.decode("utf-8", "ignore").encode()


def decode_reason(value: bytes) -> str:
    """The reason that `encode_reason` wrote."""
    return bytes(value).decode("utf-8", "replace")


def encode_attempt(attempt: Mapping[str, object] | None) -> bytes:
    """One start as JSON in 4096 bytes, NUL-padded; adds time and host where missing, cuts the longest value to fit."""
    facts: dict[str, object] = {
        "time": now(),
        "host": socket.gethostname(),
        **{str(name): value for name, value in (attempt or {}).items()},
    }
    facts.pop(_CRC, None)
    text = json.dumps(facts, default=str)
    while (excess := len(text) - (ATTEMPT_NBYTES - 1 - _CRC_NBYTES)) > 0:
        nbytes, longest = max((len(json.dumps(value, default=str)), name) for name, value in facts.items())
        value = facts.pop(longest)
        keep = (nbytes - excess - 12) / nbytes  # 12: the quotes and the ellipsis, as JSON
        if isinstance(value, str) and len(value) * keep >= 1:
            facts[longest] = value[: int(len(value) * keep)] + "…"
        text = json.dumps(facts, default=str)
    sealed = f'{text[:-1]}, "{_CRC}": "{crc32(text.encode()):08x}"}}'
    return sealed.encode().ljust(ATTEMPT_NBYTES, b"\0")


def now() -> str:
    """This second, as the file records it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def decode_attempt(slot: bytes, *, sealed: bool = False) -> dict[str, Any]:
    """The facts of one start; a slot that a power loss tore comes back as `{"unreadable": …}`, not as an error.

    `sealed`: a slot without its CRC32 is unreadable too; those of version 1.0 have none.
    """
    text = slot.rstrip(b"\0").decode("utf-8", "replace")
    if found := re.search(rf', "{_CRC}": "([0-9a-f]{{8}})"}}$', text):
        text = text[: found.start()] + "}"
    if int(found[1], 16) != crc32(text.encode()) if found else sealed:
        return {"unreadable": text[:80]}
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    return facts if isinstance(facts, dict) else {"unreadable": text[:80]}
