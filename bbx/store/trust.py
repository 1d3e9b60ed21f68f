"""Open a feature file that anybody may have made, and believe nothing in it that its size does not bear out.

Refused: whatever leads out of the file (external links, external storage, virtual datasets unless allowed), filters
that HDF5 does not bring along, and any shape, length or text that a file of this size cannot hold.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.errors import BbxError, FileError, UsageError
from bbx.spec import RunSpec, run_digest
from bbx.store import disk, format, virtual
from bbx.store.format import Column

_BLOCK = 16_384
_FILTERS = {h5py.h5z.FILTER_DEFLATE: 1032, h5py.h5z.FILTER_SHUFFLE: 1, h5py.h5z.FILTER_FLETCHER32: 1}
"""Filters that are let through, each with the largest ratio it can shrink by (deflate's is a fact of its format)."""
_CHUNK_NBYTES = 64 << 20
"""A chunk is decoded whole: a larger one is let through only where an image is as large."""
_HEAP_REFERENCE = np.dtype([("nbytes", "<u4"), ("address", "<u8"), ("index", "<u4")])


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checked file says about itself; equal for one file opened twice, `birth` being its first start's id."""

    run: RunSpec
    rows: int
    row_start: int
    rows_total: int
    columns: dict[str, Column]
    birth: str

    @property
    def sealed(self) -> bool:
        """Whether each row carries a seal and its input's facts, which files of version 1.0 do not."""
        return format.SEAL in self.columns


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A checked file: HDF5's handle, a plain descriptor for contiguous rows, and the facts."""

    path: Path
    file: h5py.File
    fd: int
    facts: Facts

    def close(self) -> None:
        """Close both handles."""
        with guarded(self.path):
            self.file.close()
        os.close(self.fd)

    def rows(self, name: str, start: int, count: int) -> NDArray[np.generic]:
        """`count` rows of a contiguous column from row `start`, `(count, *row_shape)`."""
        column = self.facts.columns[name]
        assert column.offset is not None
        out = np.empty((count, *column.row_shape), column.dtype)
        with guarded(self.path):
            disk.read_at(self.fd, out.view(np.uint8), column.offset + start * column.row_nbytes)
        return out

    def status(self) -> NDArray[np.uint8]:
        """The commit record as it is now, uint8 `(n,)`."""
        status = self.rows(format.STATUS, 0, self.facts.rows).astype(np.uint8, copy=False)
        if status.max() > format.FAILED:
            raise FileError(f"{self.path} is damaged: a row has status {status.max()}")
        return status

    def row_facts(self, start: int, keys: Sequence[bytes]) -> format.RowFacts:
        """What the file, a sealed one, says of the rows from `start` whose stored keys are `keys`."""

        def column(name: str) -> NDArray[Any]:
            return self.rows(name, start, len(keys))

        return format.RowFacts(
            keys,
            status=column(format.STATUS),
            reasons=column(format.FAILURE),
            nbytes=column(format.INPUT_NBYTES),
            mtimes=column(format.INPUT_MTIME),
            digests=column(format.INPUT_DIGEST),
            sums=np.stack([column(format.checksum_name(stage.name)) for stage in self.facts.run.stages], axis=1),
        )

    def broken_seals(self) -> NDArray[np.int64]:
        """The rows, done or failed, whose seal is not that of what the file says of them; none in a 1.0 file."""
        found, start = [np.empty(0, np.int64)], 0
        for keys in self.key_blocks() if self.facts.sealed else ():
            facts = self.row_facts(start, keys)
            stored = self.rows(format.SEAL, start, len(keys))
            found.append(start + np.flatnonzero((facts.status != format.PENDING) & (facts.seals() != stored)))
            start += len(keys)
        return np.concatenate(found)

    def key_blocks(self) -> Iterator[list[bytes]]:
        """Every row's key as stored, in blocks of bounded size."""
        with guarded(self.path):
            path = _dataset(self.file, format.PATH)
            lengths = _text_lengths(self.fd, path, self.facts.rows)
            size = os.fstat(self.fd).st_size
            if lengths.max() > format.MAX_KEY_NBYTES or int(lengths.sum()) > size:
                raise FileError(f"{self.path} is damaged: its keys are longer than the file")
            for start in range(0, self.facts.rows, _BLOCK):
                yield path[start : start + _BLOCK].tolist()


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn whatever HDF5 raises over a damaged file, which may be anything, into a `FileError`."""
    try:
        yield
    except FileError as error:
        if str(path) in error.message:
            raise
        raise FileError(f"{path}: {error.message}", error.hint) from None
    except BbxError:
        raise
    except BlockingIOError as error:
        raise FileError(f"{path} is open for writing in another program", "close it there") from error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise FileError(f"{path} is damaged, or no feature file ({text[:300]})") from error


def open_checked(path: Path, *, allow_virtual: bool = True) -> OpenFile:
    """Open `path` read-only and check all of it but the rows. Raises `FileError`."""
    while True:
        fd = _descriptor(path)
        try:
            with guarded(path):
                file = h5py.File(path, "r", locking="best-effort")
            try:
                facts = _inspect(file, fd, path, allow_virtual)
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return OpenFile(path, file, fd, facts)
            except BaseException:
                file.close()
                raise
            file.close()
        except FileNotFoundError:
            os.close(fd)
            raise FileError(f"{path} went away while it was opened") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the path changed hands between the two opens: look again


def _descriptor(path: Path) -> int:
    try:
        if path.is_file():
            return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        reason = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
    raise FileError(f"{path} {reason}", "give the .h5 file that bbx extract made")


def _inspect(file: h5py.File, fd: int, path: Path, allow_virtual: bool) -> Facts:
    with guarded(path):
        _check_format(file, path)
        _refuse_external_links(file)
        if file.id.get_create_plist().get_sizes() != (8, 8):
            raise FileError(f"{path} does not use 64-bit offsets")
        run, text = _run(file, fd)
        start, stop, total = (_whole(file, name) for name in ("row_start", "row_stop", "rows_total"))
        if not 0 <= start < stop <= total:
            raise FileError(f"{path} is damaged: it says it holds rows {start} to {stop} of {total}")
        if _version(file) >= (1, 1) and _whole(file, "bbx_label_crc32") != format.label(text, start, stop, total):
            raise FileError("what the file says of itself does not match its own checksum")
        size = os.fstat(fd).st_size
        rows = stop - start
        _check_contiguous(_dataset(file, format.PATH), (rows,), 16 * rows, size)
        if not _is_text(_dataset(file, format.PATH)):
            raise FileError(f"{path} is damaged: /path holds no UTF-8 text")
        stages = {stage.name for stage in run.stages}
        columns = {}
        for column in format.columns(run, _version(file)):
            length = format.ATTEMPT_SLOTS if column.name == format.ATTEMPTS else rows
            data = _dataset(file, column.name)
            if column.name in stages:
                columns[column.name] = _placed_stage(data, column, rows, size, path, allow_virtual)
            else:
                columns[column.name] = _placed(data, column, length, size)
        slot = bytearray(format.ATTEMPT_NBYTES)
        offset = columns[format.ATTEMPTS].offset
        assert offset is not None
        disk.read_at(fd, slot, offset)
        birth = format.decode_attempt(bytes(slot)).get(format.BIRTH)
        return Facts(run, rows, start, total, columns, str(birth) if birth else slot.decode("latin-1"))


def _check_format(file: h5py.File, path: Path) -> None:
    if _word(file, "bbx_format") != format.FORMAT:
        raise FileError(f"{path} is an HDF5 file, but not one of bbx", "give the .h5 file that bbx extract made")
    _version(file)


def _version(file: h5py.File) -> tuple[int, int]:
    """The format's (major, minor)."""
    text = _word(file, "bbx_format_version")
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text)
    ours = int(format.VERSION.split(".")[0])
    if not found or int(found[1]) != ours:
        raise FileError(
            f"the file has format {text or 'none'}, and this bbx reads {format.VERSION}", "pip install -U bbx"
        )
    return ours, int(found[2])


def _word(file: h5py.File, name: str) -> str:
    if name not in file.attrs:
        return ""
    attribute = file.attrs.get_id(name)
    text = file.attrs[name] if attribute.shape == () and h5py.check_string_dtype(attribute.dtype) else ""
    return text if isinstance(text, str) else ""


def _whole(file: h5py.File, name: str) -> int:
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "iu":
        raise FileError(f"the attribute {name} is no whole number")
    return int(file.attrs[name])


def _refuse_external_links(file: h5py.File) -> None:
    """Look at every link without following any but plain ones; a loop of groups ends at the second visit."""
    seen: set[int] = set()
    waiting: list[h5py.Group] = [file]
    while waiting:
        group = waiting.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            continue
        seen.add(address)
        for name in group:
            kind = group.get(name, getclass=True, getlink=True)
            if kind not in (h5py.HardLink, h5py.SoftLink):
                raise FileError(f"the link {name[:80]!r} leads out of the file", "such files are not opened")
            if kind is h5py.HardLink and group.get(name, getclass=True) is h5py.Group:
                waiting.append(group[name])


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset `name`, reached by plain links alone."""
    found = file
    for part in name.split("/"):
        if not isinstance(found, h5py.Group) or part not in found:
            raise FileError(f"the dataset /{name} is missing")
        if found.get(part, getclass=True, getlink=True) is not h5py.HardLink:
            raise FileError(f"/{name} is only a link")
        found = found[part]
    if not isinstance(found, h5py.Dataset):
        raise FileError(f"/{name} is no dataset")
    return found


def _is_text(data: h5py.Dataset) -> bool:
    text = h5py.check_string_dtype(data.dtype)
    return text is not None and text.length is None


def _text_lengths(fd: int, data: h5py.Dataset, count: int) -> NDArray[np.uint32]:
    """Bytes of each variable-length string, `(count,)`, from the raw references, before HDF5 allocates any of it."""
    references = np.empty(count, _HEAP_REFERENCE)
    disk.read_at(fd, references.view(np.uint8), data.id.get_offset())
    return references["nbytes"]


def _run(file: h5py.File, fd: int) -> tuple[RunSpec, str]:
    data = _dataset(file, format.RUN)
    _check_contiguous(data, (), 16, os.fstat(fd).st_size)
    if not _is_text(data) or _text_lengths(fd, data, 1)[0] > format.MAX_RUN_NBYTES:
        raise FileError("the run description is no text, or too long")
    text = data[()].decode()
    run = RunSpec.from_json(text)
    try:
        format.check_run(run)
    except UsageError as error:
        raise FileError(f"the run description is damaged ({error.message})") from None
    # Over the text as it stands, so that a field that a later bbx adds does not make older files look damaged.
    if run_digest(json.loads(text)) != _word(file, "bbx_run_sha256"):
        raise FileError("the run description does not match its own digest")
    return run, text


def _check_contiguous(data: h5py.Dataset, shape: tuple[int, ...], nbytes: int, size: int) -> int:
    """The offset of a dataset that lies in the file whole and in one piece; `FileError` for any other."""
    plan = data.id.get_create_plist()
    if data.shape != shape:
        raise FileError(f"{data.name} has shape {data.shape}, and the run says {shape}")
    if plan.get_layout() != h5py.h5d.CONTIGUOUS or plan.get_external_count():
        raise FileError(f"{data.name} is not stored in one piece in the file", "repack only the stages, if any")
    offset = data.id.get_offset()
    if offset is None or offset + nbytes > size or data.id.get_storage_size() != nbytes:
        raise FileError(f"{data.name} does not fit in the file", "the file is cut off: copy it again")
    return int(offset)


def _placed(data: h5py.Dataset, column: Column, length: int, size: int) -> Column:
    if data.dtype != column.dtype:
        raise FileError(f"/{column.name} has type {data.dtype}, and the run says {column.dtype}")
    shape = (length, *column.row_shape)
    return replace(column, offset=_check_contiguous(data, shape, length * column.row_nbytes, size))


def _placed_stage(data: h5py.Dataset, column: Column, rows: int, size: int, path: Path, allow_virtual: bool) -> Column:
    """A stage may also be chunked and compressed, or virtual where that is allowed: then HDF5 reads it."""
    if data.dtype != column.dtype or data.shape != (rows, *column.row_shape):
        raise FileError(
            f"/{column.name} is {data.dtype} {data.shape}, and the run says {column.dtype} {column.row_shape}"
        )
    plan = data.id.get_create_plist()
    layout = plan.get_layout()
    if layout == h5py.h5d.VIRTUAL and allow_virtual:
        _check_sources(data, path)
    elif layout == h5py.h5d.VIRTUAL:
        raise FileError(
            f"/{column.name} lies in other files", "allow_virtual=True follows them, inside this file's folder"
        )
    elif layout == h5py.h5d.CHUNKED:
        _check_chunks(data, plan, rows * column.row_nbytes, size)
    else:
        return _placed(data, column, rows, size)
    return column


def _check_chunks(data: h5py.Dataset, plan: h5py.h5p.PropDCID, nbytes: int, size: int) -> None:
    filters = [plan.get_filter(index)[0] for index in range(plan.get_nfilters())]
    unknown = [code for code in filters if code not in _FILTERS]
    if unknown:
        raise FileError(f"{data.name} needs HDF5 filter {unknown[0]}", "bbx reads shuffle, deflate and fletcher32")
    if len(filters) > len(set(filters)):
        raise FileError(f"{data.name} has a filter twice")
    chunk = plan.get_chunk()
    if any(part > whole for part, whole in zip(chunk, data.shape, strict=True)):
        raise FileError(f"{data.name} has chunks larger than itself")
    if nbytes > size * math.prod(_FILTERS[code] for code in set(filters)):
        raise FileError(f"{data.name} says it holds {disk.size_text(nbytes)}, more than this file can")
    held = math.prod(chunk) * data.dtype.itemsize
    if held > max(_CHUNK_NBYTES, nbytes // data.shape[0]):
        raise FileError(f"{data.name} has chunks of {disk.size_text(held)}", "h5repack it with one image in a chunk")


def _check_sources(data: h5py.Dataset, path: Path) -> None:
    """Every row of a virtual dataset is still the one that was merged, by the mark and checksum that this file has.

    It lies in a checked file of the same run, beside or below `path`, that takes no rows from elsewhere itself.
    """
    run = RunSpec.from_json(data.file[format.RUN][()].decode())
    linked = [one for stage in run.stages if (one := _dataset(data.file, stage.name)).is_virtual]
    if data.name != linked[0].name:
        return  # with the first one, all were checked: each source is opened once
    sources: dict[str, dict[str, list[virtual.Piece]]] = {}
    for one in linked:
        stage, rows = one.name.strip("/"), data.file[format.STATUS][()] == format.DONE
        for piece in virtual.pieces(one):
            sources.setdefault(piece.name, {}).setdefault(stage, []).append(piece)
            rows[piece.at : piece.at + piece.count] = False
        if rows.any():
            raise FileError(f"{one.name} takes row {np.argmax(rows)} from no file")
    for name, stages in sources.items():
        opened = open_checked(_source(path, name), allow_virtual=False)
        try:
            for stage, pieces in stages.items():
                _check_same_run(opened.facts.run, run, stage, opened.path)
                for piece in pieces:
                    _check_piece(opened, data.file, stage, piece)
        finally:
            opened.close()


def _source(path: Path, name: str) -> Path:
    """Where the source `name` of the virtual file at `path` lies."""
    folder = path.resolve().parent
    place = virtual.place(folder, name)
    if place == path.resolve():
        raise FileError("rows are taken from the file itself")
    # HDF5 looks beside the name that it was given, which may be a link from another folder.
    if path.parent.resolve() != folder and (path.parent / name).exists():
        raise FileError(f"rows are taken from {name!r}, which lies beside the link {path} too")
    return place


def _check_piece(opened: OpenFile, file: h5py.File, stage: str, piece: virtual.Piece) -> None:
    """The rows of a source have the marks and checksums that `file` has for them, plain columns checked before."""
    last = piece.first + piece.count
    if last > opened.facts.rows or piece.rows not in (0, opened.facts.rows):
        raise FileError(f"{opened.path} has {opened.facts.rows} rows, and had {last} or more when it was merged")
    for name in (format.STATUS, format.checksum_name(stage)):
        same = opened.rows(name, piece.first, piece.count) == file[name][piece.at : piece.at + piece.count]
        if not same.all():
            row = piece.first + int(np.argmin(same))
            raise FileError(f"row {row} of {opened.path} is another one than was merged", "merge the files again")


def _check_same_run(there: RunSpec, here: RunSpec, stage: str, place: Path) -> None:
    """`stage` of a source is the one that was merged, computed in the same way."""
    differences = replace(here, stages=()).differences(replace(there, stages=()))
    for name, mine, theirs in differences:
        raise FileError(f"{place} belongs to another run: {name} is {theirs} there and {mine} here")
    wanted = next(one for one in here.stages if one.name == stage)
    if wanted not in there.stages:
        raise FileError(f"{place} has no stage {stage} like the one that was merged", "merge the files again")
