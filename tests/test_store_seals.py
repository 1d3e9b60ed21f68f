"""Every row carries its input file's facts and a seal that binds them, its key, its mark and its features together."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bbx.errors import FileError, StartError, UsageError
from bbx.spec import InputFile
from bbx.store import FeatureFile, FeatureWriter, check_target
from tests.test_store_toys import KEYS, RUN, row_maps

BAD = 5


def inputs(rows: list[int]) -> list[InputFile]:
    return [InputFile(100 + row, 10**18 + row, hashlib.blake2b(b"%d" % row, digest_size=16).digest()) for row in rows]


def fill(writer: FeatureWriter) -> None:
    rows = [row for row in writer.pending.tolist() if row != BAD]
    writer.write(rows, row_maps(rows), inputs(rows))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished file with one failed row."""
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        fill(writer)
        writer.fail(BAD, "truncated", InputFile(7, 8))
    return tmp_path / "f.h5"


def test_the_input_files_are_recorded(out: Path) -> None:
    with FeatureFile(out) as file:
        assert file.sealed
        assert file.inputs([3, 0]) == inputs([3, 0])
        assert file.inputs([BAD]) == [InputFile(7, 8, b"")]
        assert len(file.inputs()) == len(KEYS)


def test_seals_of_an_untouched_file_hold(out: Path) -> None:
    with FeatureFile(out) as file:
        assert file.broken_seals().tolist() == []


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("status", 3), ("status", BAD), ("provenance/failure", BAD), ("provenance/failure", 3),
        ("provenance/input_nbytes", 3), ("provenance/input_mtime", 3), ("provenance/input_digest", 3),
        ("provenance/seal", 3), ("checksum/stem", 3), ("checksum/stem", BAD),
    ],
)  # fmt: skip
def test_whatever_is_changed_breaks_its_own_rows_seal(out: Path, name: str, row: int) -> None:
    with h5py.File(out, "r+") as file:
        offset = file[name].id.get_offset() + row * file[name].id.get_storage_size() // len(file[name])
    data = bytearray(out.read_bytes())
    data[offset] = {1: 2, 2: 1}[data[offset]] if name == "status" else data[offset] ^ 1
    out.write_bytes(data)
    with FeatureFile(out) as file:
        assert file.broken_seals().tolist() == [row]


def test_a_changed_key_breaks_its_seal(out: Path) -> None:
    data = out.read_bytes()
    key = KEYS[3].encode()
    assert data.count(key) == 1
    out.write_bytes(data.replace(key, b"X" + key[1:]))
    with FeatureFile(out) as file:
        assert file.broken_seals().tolist() == [3]


def test_a_start_is_told_from_one_that_was_changed(out: Path) -> None:
    with FeatureFile(out) as file:
        assert file.attempts[0]["done"] == len(KEYS) - 1
        assert file.attempts[0]["end"] >= file.attempts[0]["time"]
    data = out.read_bytes()
    out.write_bytes(data.replace(b'"done": 19', b'"done": 18'))
    with FeatureFile(out) as file:
        assert list(file.attempts[0]) == ["unreadable"]


def test_a_reader_outlives_the_end_of_the_run(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write([0], row_maps([0]))
        writer.commit()
        watching = FeatureFile(tmp_path / "f.h5", partial=True)
        first = watching._access.facts
        rows = [row for row in range(1, 20) if row != BAD]
        writer.write(rows, row_maps(rows))
        writer.fail(BAD, "bad")
    watching.close()
    assert FeatureFile(tmp_path / "f.h5")._access.facts == first  # what a DataLoader worker compares


def test_failed_rows_are_tried_again(out: Path) -> None:
    assert check_target(out, RUN, KEYS, retry_failed=True).reopen
    with FeatureWriter.open(out, RUN, KEYS, retry_failed=True) as writer:
        assert writer.pending.tolist() == [BAD]
        assert not out.exists()
        assert Path(f"{out}.partial").exists()
        writer.write([BAD], row_maps([BAD]), inputs([BAD]))
    with FeatureFile(out) as file:
        assert file.counts == (20, 0, 0)
        assert file.failed == {}
        assert file.broken_seals().size == 0
        assert h5py.File(out)["provenance/failure"][BAD] == b""
        np.testing.assert_array_equal(file["stem", BAD], row_maps([BAD])["stem"][0])
        assert len(file.attempts) == 2


def test_a_retry_that_ends_early_goes_on_as_any_run(out: Path) -> None:
    with FeatureWriter.open(out, RUN, KEYS, retry_failed=True):
        pass
    assert check_target(out, RUN, KEYS).pending == 1
    with FeatureWriter.open(out, RUN, KEYS) as writer:
        writer.fail(BAD, "still bad")
    with FeatureFile(out) as file:
        assert file.failed == {KEYS[BAD]: "still bad"}
        assert file.broken_seals().size == 0


def test_a_retry_of_an_unfinished_run_takes_pending_and_failed_rows(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write([0, 1], row_maps([0, 1]))
        writer.fail(BAD, "bad")
    assert check_target(tmp_path / "f.h5", RUN, KEYS, retry_failed=True).pending == 18
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS, retry_failed=True) as writer:
        assert writer.pending.tolist() == list(range(2, 20))


def test_nothing_to_retry_leaves_the_file_alone(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write(range(20), row_maps(range(20)))
    before = (tmp_path / "f.h5").read_bytes()
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS, retry_failed=True) as writer:
        assert writer.complete
    assert (tmp_path / "f.h5").read_bytes() == before


def test_a_retry_does_not_bury_an_unfinished_overwrite(out: Path) -> None:
    Path(f"{out}.partial").write_bytes(out.read_bytes())
    with pytest.raises(StartError, match="in the way"):
        check_target(out, RUN, KEYS, retry_failed=True)


def test_one_input_file_for_each_row(tmp_path: Path) -> None:
    with (
        FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer,
        pytest.raises(UsageError, match="2 input files for 1 rows"),
    ):
        writer.write([0], row_maps([0]), inputs([0, 1]))


def test_a_file_of_format_1_0_is_read_and_gone_on_with(tmp_path: Path) -> None:
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        writer.write([0, 1], row_maps([0, 1]))
    partial = tmp_path / "f.h5.partial"
    with h5py.File(partial, "r+") as file:
        file.attrs["bbx_format_version"] = "1.0"
        for name in ("input_nbytes", "input_mtime", "input_digest", "seal"):
            del file["provenance"][name]
    with FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS) as writer:
        fill(writer)
        writer.fail(BAD, "bad")
    with FeatureFile(tmp_path / "f.h5") as file:
        assert not file.sealed
        assert file.counts == (19, 1, 0)
        assert file.inputs([0]) == [InputFile()]
        assert file.broken_seals().size == 0


def test_a_version_that_is_none_is_refused(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        file.attrs["bbx_format_version"] = "1.x"
    with pytest.raises(FileError, match=r"format 1\.x"):
        FeatureFile(out)


def test_the_labels_of_a_run_do_not_make_another_run() -> None:
    other = replace(RUN, source='{"model": "swin-tiny"}', weights="other")
    assert other == RUN
    assert other.sha256 == RUN.sha256
    assert type(RUN).from_json(other.to_json()).source == other.source


def test_no_thread_writes_to_a_descriptor_after_an_interrupt_of_the_end(tmp_path: Path, monkeypatch) -> None:
    import threading
    import time

    from bbx.store import disk

    writer = FeatureWriter.open(tmp_path / "f.h5", RUN, KEYS)
    writer.write([0], row_maps([0]))
    begun, go_on, real, late = threading.Event(), threading.Event(), disk.make_durable, []

    def slow(fd: int) -> None:
        begun.set()
        go_on.wait(30)
        real(fd)

    monkeypatch.setattr(disk, "make_durable", slow)
    write_at = disk.write_at
    monkeypatch.setattr(
        disk, "write_at", lambda fd, data, at: (late.append(writer._rows._closed), write_at(fd, data, at))[1]
    )
    writer._committer._wake.set()
    assert begun.wait(30)
    join, times = threading.Thread.join, []

    def interrupted(self: threading.Thread, *given: float) -> None:
        if self is writer._committer._thread and not times:
            times.append(time.monotonic())
            threading.Timer(0.2, go_on.set).start()
            raise KeyboardInterrupt
        join(self, *given)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert late
    assert not any(late)
    assert not writer._committer._thread.is_alive()
