"""What a feature file says of itself, believed only as far as its size bears out: `inspect`.

Refused: whatever leads out of the file (external links, external storage, virtual datasets unless allowed), filters
that HDF5 does not bring along, and any shape, length or text that a file of this size cannot hold.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from bbx.errors import FileError, UsageError
from bbx.spec import RunSpec, run_digest
from bbx.store import disk, format
from bbx.store.format import Column

_FILTERS = {h5py.h5z.FILTER_DEFLATE: 1032, h5py.h5z.FILTER_SHUFFLE: 1, h5py.h5z.FILTER_FLETCHER32: 1}
"""Filters that are let through, each with the largest ratio it can shrink by (deflate's is a fact of its format)."""
_CHUNK_NBYTES = 64 << 20
"""A chunk is decoded whole: a larger one is let through only where an image is as large."""
_HEAP_REFERENCE = np.dtype([("nbytes", "<u4"), ("address", "<u8"), ("index", "<u4")])


CheckSources = Callable[[h5py.Dataset], None]
"""Raises `FileError` unless a virtual dataset takes its rows from where it may."""


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


def inspect(file: h5py.File, fd: int, path: Path, check_sources: CheckSources | None) -> Facts:
    """All that the file at `path`, open as `file` and `fd`, says of itself; without `check_sources`, nothing virtual.

    Raises `FileError`, and whatever HDF5 raises over a damaged file.
    """
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
    _check_contiguous(dataset(file, format.PATH), (rows,), 16 * rows, size)
    if not _is_text(dataset(file, format.PATH)):
        raise FileError(f"{path} is damaged: /path holds no UTF-8 text")
    stages = {stage.name for stage in run.stages}
    columns = {}
    for column in format.columns(run, _version(file)):
        length = format.ATTEMPT_SLOTS if column.name == format.ATTEMPTS else rows
        data = dataset(file, column.name)
        if column.name in stages:
            columns[column.name] = _placed_stage(data, column, rows, size, check_sources)
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


def dataset(file: h5py.File, name: str) -> h5py.Dataset:
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


def text_lengths(fd: int, data: h5py.Dataset, count: int) -> NDArray[np.uint32]:
    """Bytes of each variable-length string, `(count,)`, from the raw references, before HDF5 allocates any of it."""
    references = np.empty(count, _HEAP_REFERENCE)
    disk.read_at(fd, references.view(np.uint8), data.id.get_offset())
    return references["nbytes"]


def _run(file: h5py.File, fd: int) -> tuple[RunSpec, str]:
    data = dataset(file, format.RUN)
    _check_contiguous(data, (), 16, os.fstat(fd).st_size)
    if not _is_text(data) or text_lengths(fd, data, 1)[0] > format.MAX_RUN_NBYTES:
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


def _placed_stage(
    data: h5py.Dataset, column: Column, rows: int, size: int, check_sources: CheckSources | None
) -> Column:
    """A stage may also be chunked and compressed, or virtual where that is allowed: then HDF5 reads it."""
    if data.dtype != column.dtype or data.shape != (rows, *column.row_shape):
        raise FileError(
            f"/{column.name} is {data.dtype} {data.shape}, and the run says {column.dtype} {column.row_shape}"
        )
    plan = data.id.get_create_plist()
    layout = plan.get_layout()
    if layout == h5py.h5d.VIRTUAL and check_sources:
        check_sources(data)
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
