"""A compressed file holds every row of the plain one, is read by any HDF5 program, and costs none if packing fails."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import zlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.errors import FileError, InterruptedRunError, StartError, WriteError
from bbx.spec import Stage
from bbx.store import FeatureFile, FeatureWriter, compress, format
from bbx.store.compress import pack
from bbx.store.safefile import SafeFile
from tests.test_store_toys import KEYS, RUN, STAGES, make, row_maps

HALF = replace(RUN, dtype="float16")
BIG = replace(RUN, stages=(Stage("stem", (16, 64, 64), 4, "conv1", 0), Stage("pooled", (512,), 0, "head")))
BIG_KEYS = [f"{row:04}.png" for row in range(60)]


def unfinished(folder: Path, run=RUN, keys=KEYS, failed=()) -> Path:
    """What an extraction leaves just before packing: a `.partial` with no pending row."""
    return make(folder / "f.h5", run, keys, failed).rename(folder / "f.h5.partial")


def assert_same_rows(packed: Path, plain: Path) -> None:
    """Every dataset holds the same, through plain h5py."""
    names: list[str] = []
    with h5py.File(plain) as one, h5py.File(packed) as other:
        one.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert len(names) > 10
        for name in names:
            np.testing.assert_array_equal(one[name][()], other[name][()], err_msg=name)
        assert dict(one.attrs).keys() == dict(other.attrs).keys()


@pytest.mark.parametrize("run", [RUN, HALF], ids=["float32", "float16"])
def test_every_row_and_fact_is_as_in_the_plain_file(tmp_path: Path, run) -> None:
    plain = make(tmp_path / "plain.h5", run, failed=[3, 19])
    partial = Path(str(tmp_path / "f.h5") + ".partial")
    partial.write_bytes(plain.read_bytes())
    pack(partial, tmp_path / "f.h5")
    assert_same_rows(tmp_path / "f.h5", plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.h5", "plain.h5"]
    with FeatureFile(tmp_path / "f.h5") as file, FeatureFile(plain) as other:
        assert file.failed == other.failed
        assert file.attempts == other.attempts
        assert not len(file.broken_seals())
        assert all(file.verify_row(stage, row) for stage in file for row in range(len(file)))
        assert np.isnan(file["stem"].get(3, missing="nan")).all()
        assert np.array_equal(file["tokens", "cats/007.png"], row_maps([7], run)["tokens"][0])


def test_the_chunks_are_images_and_the_filters_are_those_of_every_hdf5(tmp_path: Path) -> None:
    pack(unfinished(tmp_path), tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        for stage in STAGES:
            assert file[stage.name].chunks == (1, *stage.shape)
            assert (file[stage.name].shuffle, file[stage.name].compression) == (True, "gzip")
            assert file[stage.name].dims[0].keys() == ["image"]
        assert file["status"].chunks is None
        assert np.array_equal(file["plot/stem/features"][5], row_maps([5])["stem"][0])


@pytest.mark.parametrize(("most", "channels"), [(600, 2), (400, 1), (1, 1), (767, 2), (768, 3)])
def test_a_large_image_is_split_along_its_channels_and_never_shares_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, channels: int
) -> None:
    monkeypatch.setattr(compress, "CHUNK_NBYTES", most)
    run = replace(RUN, stages=(replace(STAGES[0], shape=(5, 8, 8)),))
    plain = make(tmp_path / "plain.h5", run)
    partial = unfinished(tmp_path, run)
    pack(partial, tmp_path / "f.h5")
    with h5py.File(plain) as one, h5py.File(tmp_path / "f.h5") as other:
        assert other["stem"].chunks == (1, channels, 8, 8)
        assert np.array_equal(one["stem"][()], other["stem"][()])


def test_failed_rows_take_next_to_nothing(tmp_path: Path) -> None:
    partial = unfinished(tmp_path, BIG, BIG_KEYS, failed=range(1, 60))
    nbytes = partial.stat().st_size
    pack(partial, tmp_path / "f.h5")
    assert (tmp_path / "f.h5").stat().st_size < nbytes / 20


def test_a_file_with_pending_rows_is_not_packed(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write([0], row_maps([0]))
    with pytest.raises(StartError, match="pending rows"):
        pack(tmp_path / "f.h5.partial", tmp_path / "f.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5.partial"]


def test_a_stale_draft_is_written_over(tmp_path: Path) -> None:
    partial = unfinished(tmp_path)
    (tmp_path / "f.h5.packing").write_bytes(b"\x89HDF" + bytes(1 << 20))
    pack(partial, tmp_path / "f.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]


def flip(path: Path, name: str, row: int) -> None:
    """Change one byte of a row."""
    with h5py.File(path) as file:
        data = file[name]
        offset = data.id.get_offset() + row * data.id.get_storage_size() // len(data)
    with path.open("r+b") as raw:
        raw.seek(offset + 1)
        (byte,) = raw.read(1)
        raw.seek(offset + 1)
        raw.write(bytes([byte ^ 0x55]))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("stage1", "does not match its checksum in stage1"),
        ("checksum/stage1", "is not what its seal says"),
        ("provenance/input_nbytes", "is not what its seal says"),
    ],
)
def test_a_damaged_row_is_named_and_never_packed(tmp_path: Path, name: str, what: str) -> None:
    partial = unfinished(tmp_path)
    flip(partial, name, 7)
    with pytest.raises(FileError, match=f"row 7, 'cats/007.png', of .*partial {what}") as caught:
        pack(partial, tmp_path / "f.h5")
    assert "bbx verify" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5.partial"]


def test_a_file_of_format_1_0_gets_seals(tmp_path: Path) -> None:
    partial = unfinished(tmp_path, failed=[4])
    with h5py.File(partial, "r+") as file:
        for name in ("input_nbytes", "input_mtime", "input_digest", "seal"):
            del file["provenance"][name]
        file.attrs["bbx_format_version"] = "1.0"
    pack(partial, tmp_path / "f.h5")
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.sealed
        assert not len(file.broken_seals())
        assert file.failed == {"cats/004.png": "not an image"}


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    partial = unfinished(tmp_path)
    pack(partial, tmp_path / "f.h5", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (20 * RUN.row_nbytes, 20 * RUN.row_nbytes)
    assert told == sorted(told)


@pytest.mark.parametrize("at", [1, 30, 100, 155])
def test_a_signal_stops_it_and_leaves_the_plain_file(tmp_path: Path, at: int) -> None:
    partial = unfinished(tmp_path)
    before, asked = partial.read_bytes(), iter(range(1, 1000))
    with pytest.raises(InterruptedRunError) as caught:
        pack(partial, tmp_path / "f.h5", stop=lambda: 15 if next(asked) == at else None)
    assert caught.value.exit_code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5.partial"]
    assert partial.read_bytes() == before


@pytest.mark.parametrize("encoder", ["zlib", *(["isal"] if find_spec("isal") else [])])
def test_every_encoder_writes_what_zlib_reads(encoder: str) -> None:
    rng = np.random.default_rng(1)
    encode = compress._deflate_zlib if encoder == "zlib" else compress._deflate()
    for data in (b"", b"\0" * 100_000, rng.bytes(100_000), b"\0\0\xc0\x7f" * 5000, bytes(rng.integers(0, 3, 70_000))):
        assert zlib.decompress(encode(data)) == data


class Disk:
    """`os.pwrite` on a disk that takes a few bytes at a time and is full after `calls` of them."""

    def __init__(self, calls: int, code: int) -> None:
        self.left = calls
        self.code = code
        self.real = os.pwrite

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(fd, data[: max(1, len(data) * 2 // 3)], offset)


def failures_survived(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> int:
    """Packs on a disk that fails at each `step`-th write, one after the other, until one packing gets through.

    Each failure has to say what the system said and to leave the plain file, and it alone, as it was. How many writes
    the packing took.
    """
    run = replace(RUN, stages=STAGES[:2])
    calls, partial = 0, unfinished(tmp_path, run, KEYS[:6])
    before = partial.read_bytes()
    while True:
        partial.write_bytes(before)
        broken = Disk(calls, code)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", broken.pwrite)
                pack(partial, tmp_path / "f.h5")
        except WriteError as error:
            assert os.strerror(code) in error.message  # noqa: PT017 - the last round raises nothing
            assert [path.name for path in tmp_path.iterdir()] == ["f.h5.partial"]
            assert partial.read_bytes() == before
        else:
            break
        calls += step
    return calls


def test_a_disk_that_fails_at_any_write_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures_survived(17, tmp_path, monkeypatch, errno.ENOSPC) > 50


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_each_write_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert failures_survived(1, tmp_path, monkeypatch, code) > 50


def test_hdf5_closes_in_peace_on_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDONLY | os.O_CREAT)
    target = SafeFile(fd)  # every write is refused: EBADF
    with h5py.File(target, "w") as file:
        file.create_dataset("x", data=np.arange(100_000), chunks=(1000,))
    os.close(fd)
    assert target.error is not None
    assert target.error.errno == errno.EBADF
    with pytest.raises(OSError, match="Bad file descriptor"):
        target.check()


def pack_it(folder: str) -> None:
    """The victim of the tests below."""
    out = Path(folder) / "f.h5"
    os.write(1, b"packing\n")
    try:
        pack(Path(f"{out}.partial"), out)
    except WriteError as error:
        os.write(1, error.message.encode())
        sys.exit(3)


LIMITED = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
LIMITED += "resource.setrlimit(resource.RLIMIT_FSIZE, ({nbytes}, {nbytes})); "
MOUNTS = ["unshare", "-Urm"]
CAN_MOUNT = (
    sys.platform == "linux"
    and subprocess.run([*MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode
    == 0
)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_limit_of_the_system_is_an_error_and_no_crash(tmp_path: Path, part: float) -> None:
    partial = unfinished(tmp_path, BIG, BIG_KEYS)
    before = partial.read_bytes()
    code = LIMITED.format(nbytes=int(len(before) * 0.9 * part))
    code += f"from tests.test_compress import *; pack_it('{tmp_path}')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (3, "")
    assert "File too large" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5.partial"]
    assert partial.read_bytes() == before
    pack(partial, tmp_path / "f.h5")


@pytest.mark.parametrize("room", [0.05, 0.4, 0.8] if CAN_MOUNT else [])
def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, room: float) -> None:
    partial = unfinished(tmp_path, BIG, BIG_KEYS)
    small = tmp_path / "disk"
    small.mkdir()
    size = int(partial.stat().st_size * (1 + room))
    script = (
        f"mount -t tmpfs -o size={size} none {small} && cp {partial} {small} && cd {Path(__file__).parent.parent} && "
        f"{sys.executable} -c \"from tests.test_compress import *; pack_it('{small}')\"; code=$?; "
        f"ls {small}; cmp {partial} {small}/f.h5.partial && exit $code"
    )
    ran = subprocess.run([*MOUNTS, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (3, "")
    assert "No space left on device" in ran.stdout
    assert ran.stdout.endswith("f.h5.partial\n")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_instant_one_whole_file_is_left(tmp_path: Path, seed: int) -> None:
    chance, kills = random.Random(seed), 0
    plain = make(tmp_path / "plain.h5", BIG, BIG_KEYS, failed=[5])
    out, partial = tmp_path / "f.h5", tmp_path / "f.h5.partial"
    partial.write_bytes(plain.read_bytes())
    while kills < 12:
        victim = subprocess.Popen(
            [sys.executable, "-c", f"from tests.test_compress import *; pack_it('{tmp_path}')"], stdout=subprocess.PIPE
        )
        assert victim.stdout is not None
        victim.stdout.readline()
        try:
            victim.wait(chance.uniform(0, 0.8))
        except subprocess.TimeoutExpired:
            victim.kill()
            kills += 1
        victim.communicate()
        for place in (out, partial):
            if place.exists():
                assert_same_rows(place, plain)
        assert out.exists() or partial.exists()
        if out.exists():
            out.unlink()
            partial.write_bytes(plain.read_bytes())
    pack(partial, out)
    assert_same_rows(out, plain)
    assert format.Counts.of(FeatureFile(out).status).failed == 1
