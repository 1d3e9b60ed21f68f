"""Chunks are decoded as HDF5 decodes them, and never to more bytes than a chunk may hold."""

from __future__ import annotations

import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from bbx.errors import FileError
from bbx.store import FeatureFile, chunks, inspection
from tests.test_store_toys import KEYS, RUN, make

SHAPE = (7, 5, 6, 4)
CHUNKS = [(1, 5, 6, 4), (7, 5, 6, 4), (3, 5, 6, 4), (1, 2, 6, 4), (2, 3, 4, 3), (1, 1, 1, 1), (5, 4, 5, 4)]
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "deflate": {"compression": "gzip"},
    "shuffle": {"shuffle": True},
    "fletcher32": {"fletcher32": True},
    "all": {"compression": "gzip", "compression_opts": 9, "shuffle": True, "fletcher32": True},
}
RAW = 5 * 6 * 4 * 4


def values(dtype: str = "f4") -> np.ndarray:
    made = np.random.default_rng(0).normal(size=SHAPE).astype(dtype)
    made[2] = np.nan
    made[3] = 0
    return made


def dataset(path: Path, **options: Any) -> h5py.Dataset:
    """A stage in chunks of one image."""
    file = h5py.File(path, "w")
    return file.create_dataset("stem", data=values(), **{"chunks": (1, *SHAPE[1:]), **options})


def empty(path: Path, filters: list[str], dtype: str = "f4") -> h5py.Dataset:
    """A stage of no chunk yet, its filters in the order given."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((1, *SHAPE[1:]))
    for name in filters:
        getattr(plan, f"set_{name}")()
    file = h5py.File(path, "w")
    space = h5py.h5s.create_simple(SHAPE)
    h5py.h5d.create(file.id, b"stem", h5py.h5t.py_create(np.dtype(dtype)), space, plan)
    return file["stem"]


def rows(data: h5py.Dataset, first: int, last: int) -> np.ndarray:
    out = np.empty((last - first, *data.shape[1:]), data.dtype)
    chunks.read(data, first, last, out)
    return out


def put(data: h5py.Dataset, chunk: bytes, mask: int = 0) -> None:
    data.id.write_direct_chunk((0, 0, 0, 0), chunk, mask)
    data.file.flush()


# The same as HDF5 reads


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_any_rows_of_any_chunks_read_as_hdf5_reads_them(tmp_path: Path, chunk, filters: str, dtype: str) -> None:
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("stem", data=values(dtype), chunks=chunk, **FILTERS[filters])
    with h5py.File(path) as file:
        for first, last in [(0, 7), (0, 1), (6, 7), (2, 5), (4, 4)]:
            np.testing.assert_array_equal(rows(file["stem"], first, last), file["stem"][first:last])


@pytest.mark.parametrize(
    "odd", [["deflate", "shuffle"], ["fletcher32", "deflate"], ["fletcher32", "shuffle", "deflate"]]
)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_filters_are_undone_in_the_order_of_the_file(tmp_path: Path, odd: list[str], dtype: str) -> None:
    data = empty(tmp_path / "f.h5", odd, dtype)
    data[:] = values(dtype)
    data.file.flush()
    np.testing.assert_array_equal(rows(data, 0, 7), values(dtype))


@pytest.mark.parametrize("skipped", range(8))
def test_a_filter_that_was_left_out_of_a_chunk_is_not_undone(tmp_path: Path, skipped: int) -> None:
    names = ["shuffle", "deflate", "fletcher32"]
    donor = empty(tmp_path / "donor.h5", [name for place, name in enumerate(names) if not skipped >> place & 1])
    donor[:] = values()
    donor.file.flush()
    data = empty(tmp_path / "f.h5", names)
    put(data, donor.id.read_direct_chunk((0, 0, 0, 0))[1], skipped)
    data.file.close()  # HDF5 gives the handle that wrote a chunk a mask of 0
    with h5py.File(tmp_path / "f.h5") as file:
        np.testing.assert_array_equal(rows(file["stem"], 0, 1), values()[:1])
        np.testing.assert_array_equal(rows(file["stem"], 0, 1), file["stem"][:1])


@pytest.mark.parametrize("fill", [0x00, 0xFF])
@pytest.mark.parametrize("width", [1, 3, 70_001, 140_002])
def test_the_checksum_is_that_of_hdf5_for_any_length(tmp_path: Path, fill: int, width: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (2, width), np.uint8)
    noise[1] = fill
    with h5py.File(tmp_path / "f.h5", "w") as file:
        data = file.create_dataset("stem", data=noise, chunks=(1, width), fletcher32=True)
        file.flush()
        np.testing.assert_array_equal(rows(data, 0, 2), noise)


def test_noise_that_deflate_makes_larger_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (2, 1 << 20), np.uint8)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        data = file.create_dataset("stem", data=noise, chunks=(1, 1 << 20), compression="gzip", fletcher32=True)
        file.flush()
        assert data.id.get_storage_size() > noise.nbytes
        np.testing.assert_array_equal(rows(data, 0, 2), noise)


def test_the_lock_is_free_while_a_chunk_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(tmp_path / "f.h5", compression="gzip")
    data.file.flush()
    lock, held, real = threading.Lock(), [], zlib.decompressobj
    monkeypatch.setattr(chunks.zlib, "decompressobj", lambda: held.append(lock.locked()) or real())
    chunks.read(data, 0, 2, np.empty((2, *SHAPE[1:]), "f4"), lock=lock)
    assert held == [False, False]


# A chunk that holds too much


def test_a_bomb_is_refused_at_the_first_byte_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = empty(tmp_path / "f.h5", ["deflate"])
    put(data, zlib.compress(bytes(RAW * 1000), 9))
    given, real = [], zlib.decompressobj

    class Watched:
        def __init__(self) -> None:
            self.real = real()

        def decompress(self, data: Any, most: int) -> bytes:
            given.append(len(found := self.real.decompress(data, most)))
            return found

    monkeypatch.setattr(chunks.zlib, "decompressobj", Watched)
    with pytest.raises(FileError, match="a chunk of /stem holds more than it may"):
        rows(data, 0, 1)
    assert given == [RAW + 1]


def test_a_bomb_takes_the_memory_of_a_few_chunks(tmp_path: Path) -> None:
    nbytes = 1 << 20
    with h5py.File(tmp_path / "f.h5", "w") as file:
        data = file.create_dataset("stem", (1, nbytes), "u1", chunks=(1, nbytes), compression="gzip")
        data.id.write_direct_chunk((0, 0), zlib.compress(bytes(nbytes * 500), 9))
        file.flush()
        out = np.empty((1, nbytes), np.uint8)
        tracemalloc.start()
        try:
            with pytest.raises(FileError, match="holds more than it may"):
                chunks.read(data, 0, 1, out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 6 * nbytes


def test_a_chunk_that_takes_more_of_the_file_than_it_may_is_not_read(tmp_path: Path) -> None:
    data = empty(tmp_path / "f.h5", ["deflate"])
    put(data, zlib.compress(values()[0].tobytes()) + bytes(100_000))
    with pytest.raises(FileError, match=r"a chunk of /stem takes 10\d{4} bytes, and may take 4580"):
        rows(data, 0, 1)


def test_a_bomb_in_a_feature_file_is_an_error_of_that_file(tmp_path: Path) -> None:
    out = make(tmp_path / "f.h5")
    with h5py.File(out, "r+") as file:
        held = file["stem"][:]
        del file["stem"]
        data = file.create_dataset("stem", data=held, chunks=(1, *held.shape[1:]), compression="gzip")
        data.id.write_direct_chunk((3, 0, 0, 0), zlib.compress(bytes(held.nbytes * 50), 9))
    with FeatureFile(out) as opened:
        assert np.array_equal(opened["stem", 2], held[2])
        with pytest.raises(FileError, match="holds more than it may") as caught:
            opened.verify_row("stem", 3)
        assert str(out) in caught.value.message


# A chunk that is damaged


@pytest.mark.parametrize(
    ("filters", "chunk", "message"),
    [
        (["deflate"], b"no zlib stream at all", "is damaged (zlib: Error -3"),
        (["deflate"], zlib.compress(values()[0].tobytes())[:200], "is damaged (zlib: it is cut off)"),
        (["deflate"], zlib.compress(values()[0].tobytes())[:-1], "is damaged (zlib: it is cut off)"),
        (["deflate"], zlib.compress(values()[0].tobytes())[:-1] + b"?", "is damaged (zlib: Error -3"),
        (["deflate"], zlib.compress(bytes(RAW - 1)), f"has {RAW - 1} bytes for {RAW}"),
        (["shuffle"], bytes(RAW + 1), f"has {RAW + 1} bytes for {RAW}"),
        (["shuffle"], bytes(RAW - 3), f"has {RAW - 3} bytes for {RAW}"),
        (["fletcher32"], bytes(RAW) + b"\0\0\0\1", "is damaged (fletcher32"),
        (["fletcher32"], b"\0\0\0", "is damaged (fletcher32"),
        (["fletcher32", "deflate"], zlib.compress(bytes(RAW)), f"has {RAW - 4} bytes for {RAW}"),
    ],
)
def test_a_damaged_chunk_is_an_error(tmp_path: Path, filters: list[str], chunk: bytes, message: str) -> None:
    data = empty(tmp_path / "f.h5", filters)
    put(data, chunk)
    with pytest.raises(FileError) as caught:
        rows(data, 0, 1)
    assert "/stem" in caught.value.message
    assert message in caught.value.message


@pytest.mark.parametrize("written", [False, True], ids=["nothing written", "another written"])
def test_a_chunk_that_was_never_written_is_no_row_of_fill_values(tmp_path: Path, written: bool) -> None:
    data = empty(tmp_path / "f.h5", ["deflate"])
    if written:
        put(data, zlib.compress(values()[0].tobytes()))
    with pytest.raises(FileError, match=r"/stem has no chunk at \(1, 0, 0, 0\)"):
        rows(data, 1, 2)


@pytest.mark.parametrize(("kept", "message"), [("chunks", "is damaged (zlib"), ("header", "cannot be read")])
def test_a_file_that_is_cut_off_while_it_is_open_is_an_error(tmp_path: Path, kept: str, message: str) -> None:
    path = tmp_path / "f.h5"
    data = dataset(path, compression="gzip")
    data.file.flush()
    end = data.id.get_chunk_info_by_coord((6, 0, 0, 0)).byte_offset if kept == "chunks" else 1000
    data.file.close()
    with h5py.File(path) as file:
        data = file["stem"]
        with path.open("r+b") as raw:
            raw.truncate(end)
        with pytest.raises(FileError) as caught:
            rows(data, 6, 7)
        assert message in caught.value.message


# What is refused at once


def replaced(out: Path, **options: Any) -> Path:
    with h5py.File(out, "r+") as file:
        held = file["stem"][:]
        del file["stem"]
        file.create_dataset("stem", data=held, **options)
    return out


def test_chunks_larger_than_a_limit_and_than_an_image_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_CHUNK_NBYTES", 2 * RUN.stages[0].shape[0] * 8 * 8 * 4 - 1)
    row = RUN.stages[0].shape
    out = make(tmp_path / "f.h5")
    with pytest.raises(FileError, match="/stem has chunks of"):
        FeatureFile(replaced(out, chunks=(2, *row), compression="gzip"))
    monkeypatch.setattr(inspection, "_CHUNK_NBYTES", 1)
    with FeatureFile(replaced(out, chunks=(1, *row), compression="gzip")) as opened:
        assert all(opened.verify_row("stem", index) for index in range(len(KEYS)))


def test_a_filter_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "f.h5")
    with h5py.File(out, "r+") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((1, *RUN.stages[0].shape))
        plan.set_deflate()
        plan.set_deflate()
        kind, space = file["stem"].id.get_type(), file["stem"].id.get_space()
        del file["stem"]
        h5py.h5d.create(file.id, b"stem", kind, space, plan)
    with pytest.raises(FileError, match="/stem has a filter twice"):
        FeatureFile(out)
