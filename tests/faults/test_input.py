"""Whatever lies in a folder: each row is what Pillow makes of its file or says why not, and no row is another's."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bbx.store import FeatureFile
from tests.faults import oddities as odd
from tests.faults.corpus import BOMBS, KINDS, NAMES, TURNS, Corpus, Decoded, Fails, Kind, Skipped, build, sentinel
from tests.test_cli import ENVIRONMENT, toy_command
from tests.toy import Toy

# Nothing here takes a minute; a run that hangs is ended and its traces shown.
HANGS = 180.0
MIB = 1 << 20
STAGES = ("stem", "stage1", "stage2")
# The same numbers in a batch of another size differ by a few 1e-7; one grey level in one pixel by 1e-3.
CLOSE = 2e-5

Maps = dict[str, np.ndarray]


def test_there_are_more_than_sixty_kinds_and_no_two_share_a_name():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    # However one counts: without the formats that are cut short, the numbers of orientations, the ways to break EXIF.
    counted = {re.sub(r"truncated.*|EXIF.*|broken EXIF.*", "of many", kind.name) for kind in KINDS}
    assert len(KINDS) >= 60
    assert len(counted) >= 60


# What Pillow makes of a file, said again with Pillow and NumPy alone


def pixels(path: str | Path, turn: Image.Transpose | None = None) -> np.ndarray:
    """`(32, 32, 3)` uint8: RGB, upright, the short side scaled to 36, the centre cut out.

    Of the open file: given a name, Pillow 13 maps an uncompressed TIFF, and scrambles it at orientations 5 to 8.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Path(path).open("rb") as file, Image.open(file) as image:
            image.load()
            rgb = eight_bits(image).convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    width, height = rgb.size
    size = (36, int(36 * height / width)) if width <= height else (int(36 * width / height), 36)
    scaled = rgb.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - 32) / 2) for side in size)
    return np.asarray(scaled.crop((left, top, left + 32, top + 32)))


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by its high byte, everything else as it is."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def features(cells: Sequence[np.ndarray]) -> list[Maps]:
    """The toy's maps of these pictures, by the toy alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        toy = Toy().eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        x = (torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).float() / 255 - mean) / std
        stem = toy.stem(x)
        one = toy.one(stem.relu())  # the toy's own ReLU writes over its input: a stage is what came before it
        two = toy.two(one.relu())
    return [{name: tensor[row].numpy() for name, tensor in zip(STAGES, (stem, one, two), strict=True)}
            for row in range(len(cells))]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    made = build(tmp_path_factory.mktemp("input") / "corpus")
    assert all(kind.expect is not None for kind in made.odd.values())
    yield made
    for path in made.root.glob("*shut*"):
        path.chmod(0o755)


@dataclass
class Truth:
    """What each decodable row has to be."""

    maps: dict[str, Maps]

    @classmethod
    def of(cls, corpus: Corpus, *, exif: bool = True) -> Truth:
        turns = {key: kind.expect.turn for key, kind in corpus.odd.items() if isinstance(kind.expect, Decoded)}
        turns |= dict.fromkeys(corpus.sentinels)
        keys = list(turns)
        return cls(dict(zip(keys, features([pixels(corpus.root / key, turns[key] if exif else None) for key in keys]),
                            strict=True)))  # fmt: skip


@pytest.fixture(scope="module")
def truth(corpus: Corpus) -> Truth:
    return Truth.of(corpus)


@pytest.mark.slow
def test_the_table_says_what_pillow_says(corpus):
    """Whether a kind is decoded or fails is no choice of bbx's, but where the table says so."""
    for key, kind in corpus.odd.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(kind.expect, Decoded):
                with (corpus.root / key).open("rb") as file, Image.open(file) as image:
                    image.load()
                    plain = image.copy()
                    try:
                        upright = ImageOps.exif_transpose(image)
                    except SyntaxError:
                        assert "broken EXIF" in kind.name, key  # it counts as none
                        upright = plain
                turned = plain if kind.expect.turn is None else plain.transpose(kind.expect.turn)
                assert np.array_equal(np.asarray(upright), np.asarray(turned), equal_nan=True), key
                if kind.name == "orientations of TIFF":
                    turn = TURNS[int(Path(key).stem)]
                    stored = odd.smooth().convert("L")
                    assert np.array_equal(
                        np.asarray(upright), np.asarray(stored.transpose(turn) if turn is not None else stored)
                    )
            elif isinstance(kind.expect, Fails) and not kind.expect.ours:
                with pytest.raises(Exception, match=""):  # noqa: PT011 - plugins raise anything
                    Image.open(corpus.root / key).load()


@pytest.mark.slow
def test_no_two_sentinels_are_close_to_one_another(truth, corpus):
    stems = np.stack([truth.maps[key]["stem"].ravel() for key in corpus.sentinels])
    for row, stem in enumerate(stems[:-1]):
        assert np.abs(stems[row + 1 :] - stem).max(1).min() > 1000 * CLOSE


# A run in a process of its own


# Root may read what nobody may; not so a root that has lost the two capabilities for it, which exec takes away.
DROP = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; refused where they are not held anyway
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass
class Ran:
    """What a command came to; `peaks` holds the peak of the resident memory in bytes: its own, and its workers'."""

    code: int
    out: bytes
    err: bytes
    peaks: dict[int, int] = field(default_factory=dict)
    pid: int = 0

    @property
    def facts(self) -> dict:
        return json.loads(self.out)

    @property
    def own_peak(self) -> int:
        return self.peaks[self.pid]

    @property
    def worker_peak(self) -> int:
        return max((peak for pid, peak in self.peaks.items() if pid != self.pid), default=0)


def run(command: Sequence[str | bytes], folder: Path, *, stdin: bytes = b"", watch: bool = False) -> Ran:
    """Runs `command` with a limit on its time, as somebody who may not read everything."""
    whole = [sys.executable, "-c", DROP, *command]
    # Half of the tests compute by two streams: the same ones each time.
    threads = 1 + crc32(os.environ["PYTEST_CURRENT_TEST"].partition(" (")[0].encode()) % 2
    environment = {**ENVIRONMENT, "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with (folder / "stdin").open("wb+") as given:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(whole, cwd=folder, env=environment, stdin=given, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)  # fmt: skip
    peaks: dict[int, int] = {}
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    if watch:
        watcher.start()
    try:
        out, err = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler shows where it hangs
        out, err = process.communicate()
        pytest.fail(f"hangs:\n{err.decode(errors='replace')[-4000:]}")
    finally:
        if watch:
            watcher.join()
    assert process.returncode in (0, 4), err.decode(errors="replace")[-4000:]
    return Ran(process.returncode, out, err, peaks, process.pid)


def _watch(process: subprocess.Popen[bytes], peaks: dict[int, int]) -> None:
    """Reads the kernel's own record of the peak, of the process and of all below it, until it has ended."""
    while process.poll() is None:
        family = {process.pid}
        for status in sorted(Path("/proc").glob("[0-9]*/status"), key=lambda path: int(path.parent.name)):
            try:
                facts = dict(line.split(":\t") for line in status.read_text().splitlines() if ":\t" in line)
            except OSError:
                continue  # it has just ended
            pid = int(facts["Pid"])
            if pid in family or int(facts["PPid"]) in family:
                family.add(pid)
                peaks[pid] = max(peaks.get(pid, 0), int(facts.get("VmHWM", "0 kB").split()[0]) * 1024)
        time.sleep(0.02)


def extract(folder: Path, *words: object, stdin: bytes = b"", watch: bool = False) -> Ran:
    command = toy_command("extract", "--json", "--model", "toy", "--stages", "all", "-o", "f.h5")
    return run([*command, *map(os.fsencode, map(str, words))], folder, stdin=stdin, watch=watch)


def misfits(path: Path, keys: Sequence[str], odd_ones: Mapping[str, Kind], truth: Truth) -> list[str]:
    """What is not as it has to be in a feature file: nothing."""
    with FeatureFile(path) as file:
        assert file.keys == list(keys)
        failed = file.failed
        maps = {name: file[name].get(slice(None), missing="nan") for name in STAGES}
    wrong = []
    for row, key in enumerate(keys):
        expect = odd_ones[key].expect if key in odd_ones else Decoded()
        got = {name: values[row] for name, values in maps.items()}
        if isinstance(expect, Fails):
            reason = failed.get(key)
            if reason is None:
                wrong.append(f"{key!r}: decoded, and should fail with {expect.reason!r}")
            elif not re.search(expect.reason, reason) or not is_plain(reason):
                wrong.append(f"{key!r}: failed with {reason!r}, not {expect.reason!r}")
            elif not all(np.isnan(values).all() for values in got.values()):
                wrong.append(f"{key!r}: failed, and yet has features")
        elif key in failed:
            wrong.append(f"{key!r}: failed with {failed[key]!r}, and should be decoded")
        elif not same(got, truth.maps[key]):
            owner = next((other for other, those in truth.maps.items() if same(got, those)), "nobody")
            wrong.append(f"{key!r}: other features than of Pillow's picture; they are {owner!r}'s")
    return wrong


def same(some: Maps, others: Maps) -> bool:
    return all(np.allclose(some[name], others[name], rtol=CLOSE, atol=CLOSE) for name in STAGES)


def is_plain(reason: str) -> bool:
    return reason.isascii() and reason.isprintable() and 0 < len(reason) <= 200 and reason == reason.strip()


def is_clean(text: bytes) -> bool:
    """Nothing in what was printed can move a cursor, change a colour, or turn the writing round."""
    return text.decode().replace("\n", "").isprintable()


# The whole corpus, by every way in


@pytest.mark.slow
def test_the_command_line_gives_every_row_its_picture_or_its_reason(corpus, truth, tmp_path):
    ran = extract(tmp_path, corpus.root)
    assert not misfits(tmp_path / "f.h5", corpus.rows, corpus.odd, truth)
    bad = sorted(key for key, kind in corpus.odd.items() if isinstance(kind.expect, Fails))
    assert (ran.code, ran.facts["exit_code"], ran.facts["rows"]) == (4, 4, len(corpus.rows))
    assert (ran.facts["done"], ran.facts["failed"]) == (len(corpus.rows) - len(bad), len(bad))
    assert sorted(ran.facts["failures"]) == bad
    assert is_clean(ran.out)
    assert is_clean(ran.err)


@pytest.mark.slow
def test_what_is_no_row_is_counted_and_where_it_is_strange_named(corpus, tmp_path):
    facts = run(toy_command("extract", "--json", "--dry-run", "--model", "toy", corpus.root), tmp_path).facts
    expected = {key: kind.expect for key, kind in corpus.absent.items() if isinstance(kind.expect, Skipped)}
    assert facts["images"] == len(corpus.rows)
    assert facts["skipped"] == sum(expect.counted for expect in expected.values())
    for key, expect in expected.items():
        number = key.split(" ")[0]
        found = [line for line in facts["warnings"] if f"/{number} " in line]
        assert bool(found) == bool(expect.warning), key
        assert all(re.search(expect.warning, line) and line.isprintable() for line in found), found


@pytest.mark.slow
def test_the_library_gives_the_same_in_batches_of_one_three_and_eight(corpus, truth, tmp_path):
    code = (
        "import sys, bbx, bbx.providers; bbx.providers.PROVIDERS['toy'] = ('tests.toy',)\n"
        "for size in (1, 3, 8):\n"
        "    bbx.extract(sys.argv[1], model='toy', stages='all', batch_size=size, workers=2, output=f'{size}.h5')\n"
    )
    assert run([sys.executable, "-c", code, str(corpus.root)], tmp_path).out == b""
    for size in (1, 3, 8):
        assert not misfits(tmp_path / f"{size}.h5", corpus.rows, corpus.odd, truth)
    files = [FeatureFile(tmp_path / f"{size}.h5") for size in (1, 3, 8)]
    assert files[0].failed == files[1].failed == files[2].failed


@pytest.mark.slow
def test_a_list_names_them_all_but_those_that_break_its_lines(corpus, truth, tmp_path):
    keys = [key for key in reversed(corpus.rows) if "\n" not in key]
    (tmp_path / "list").write_bytes(b"".join(os.fsencode(corpus.root / key) + b"\n" for key in keys))
    extract(tmp_path, "@list")
    assert not misfits(tmp_path / "f.h5", keys, corpus.odd, truth)


@pytest.mark.slow
def test_standard_input_names_them_all_between_nuls(corpus, truth, tmp_path):
    keys = corpus.rows[::-1]
    extract(tmp_path, "-", stdin=b"\0".join(os.fsencode(corpus.root / key) for key in keys))
    assert not misfits(tmp_path / "f.h5", keys, corpus.odd, truth)


@pytest.mark.slow
def test_without_exif_everything_is_as_it_is_stored(corpus, truth, tmp_path):
    extract(tmp_path, corpus.root, "--exif", "ignore")
    stored = Truth.of(corpus, exif=False)
    turned = [key for key in truth.maps if not same(stored.maps[key], truth.maps[key])]
    # Seven that are not upright, three formats each, and the ways to write it otherwise.
    assert len(turned) >= 7 * 3 + 4
    assert not misfits(tmp_path / "f.h5", corpus.rows, corpus.odd, stored)


# Names, told again


@pytest.mark.slow
def test_info_and_show_print_odd_names_as_they_are_written(tmp_path):
    names = build(tmp_path / "names", NAMES)
    command = toy_command("extract", "--model", "toy", "--stages", "stem", names.root)
    talk = run(command, tmp_path)
    told = run(toy_command("info", "features.h5"), tmp_path)
    facts = run(toy_command("info", "--json", "features.h5"), tmp_path)
    assert (talk.code, told.code, facts.code) == (4, 0, 0)
    bad = [key for key, kind in names.odd.items() if isinstance(kind.expect, Fails)]
    assert sorted(facts.facts["failures"]) == sorted(bad)
    for text in (talk.err, told.out):
        assert text.decode().count("failed: ") == len(bad) + sum("failed: " in key for key in bad)
        assert "[red]x.png: not an image" in text.decode()
        assert r"\x1b[31mred.png: not an image" in text.decode()
        assert r"a\nb.png: not an image" in text.decode()
    for ran in (talk, told, facts):
        assert is_clean(ran.out)
        assert is_clean(ran.err)
    groups = ("Rich markup", "terminal", "TeX", "lines", "UTF-8", "shell", "%", "bytes")
    drawn = [key for group in groups for key in [key for key in names.odd if key.split("/")[0].endswith(group)][:2]]
    images = [word for key in drawn for word in (b"--image", os.fsencode(key))]
    shown = run([*toy_command("show", "features.h5", "--root", names.root, "-o", "drawn"), *images], tmp_path)
    files = shown.out.decode().split()
    assert shown.code == 0
    assert len(files) == len(set(files)) == len(drawn)
    assert all(re.fullmatch(r"drawn/[\w.-]+\.stem\.png", name, re.ASCII) for name in files), files
    assert is_clean(shown.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "features.h5", "names", "stdin"]


# What is never opened, what changes, what is too large


class Opens:
    """Sees who opens files, by the kernel's account (inotify)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        self._paths: dict[int, str] = {}

    def watch(self, path: Path) -> None:
        number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), 0x20)  # IN_OPEN
        assert number >= 0, os.strerror(ctypes.get_errno())
        self._paths[number] = path.name

    def opened(self) -> set[str]:
        found = set()
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return found
        while data:
            found.add(self._paths[int.from_bytes(data[:4], sys.byteorder)])
            data = data[16 + int.from_bytes(data[12:16], sys.byteorder) :]
        return found


@pytest.mark.slow
def test_fifos_sockets_and_devices_are_never_opened(tmp_path):
    folder = tmp_path / "special"
    folder.mkdir()
    for number in range(4):
        sentinel(folder / f"{number}.png", number)
    os.mkfifo(folder / "1fifo.png")
    os.mkfifo(folder / "1fifo")
    # A terminal of our own, since others may open /dev/zero meanwhile; reading from it would wait for ever.
    ours, theirs = os.openpty()
    for name in ("2device.png", "2device"):
        (folder / name).symlink_to(os.ttyname(theirs))
    seen = Opens()
    for name in ("0.png", "1fifo.png", "1fifo", "2device.png", "2device"):
        seen.watch(folder / name)
    ran = extract(tmp_path, folder)
    assert ran.facts["failures"] == {
        "1fifo.png": "a FIFO, not a regular file",
        "2device.png": "a device, not a regular file",
    }
    assert ran.facts["skipped"] == 2
    assert seen.opened() == {"0.png"}
    os.close(ours)
    os.close(theirs)


def _other(path: Path) -> None:
    sentinel(path, 900)


def _made(put):  # type: ignore[no-untyped-def]  # any maker of a path
    def change(path: Path) -> None:
        path.unlink()
        put(path)

    return change


MIDWAY = {
    "vanished.png": (Path.unlink, Fails("^no such file$")),
    "halved.png": (lambda path: os.truncate(path, path.stat().st_size // 2), Fails("^truncated")),
    "emptied.png": (lambda path: os.truncate(path, 0), Fails("^zero bytes$")),
    "text.png": (lambda path: path.write_text("no more"), Fails("not an image")),
    "fifo.png": (_made(os.mkfifo), Fails("^a FIFO")),
    "folder.png": (_made(Path.mkdir), Fails("^a folder")),
    "loop.png": (_made(lambda path: path.symlink_to(path.name)), Fails("leads to itself")),
    "device.png": (_made(lambda path: path.symlink_to("/dev/zero")), Fails("^a device")),
    "shut.png": (lambda path: path.chmod(0), Fails("^permission denied$")),
    "bomb.png": (lambda path: path.write_bytes(odd.bilevel(20_000)), Fails("^too large")),
    "other.png": (_other, Decoded()),
    "linked.png": (_made(lambda path: path.symlink_to("zlinked.png")), Decoded()),
    "gone/away.png": (lambda path: path.parent.rename(path.parent.with_name("elsewhere")), Fails("^no such file$")),
}


def change_midway() -> None:
    """The victim of the next test: everything in MIDWAY changes when the files are listed and none is read."""
    import bbx
    import bbx.providers

    bbx.providers.PROVIDERS["toy"] = ("tests.toy",)

    def change(_plan: object) -> None:
        for name, (apply, _) in MIDWAY.items():
            apply(Path("pictures", name))

    bbx.extract("pictures", model="toy", stages="all", output="f.h5", batch_size=3, on_plan=change)


@pytest.mark.slow
def test_files_that_change_between_the_list_and_the_reading_cost_their_own_row_only(tmp_path):
    folder = tmp_path / "pictures"
    kinds = {}
    for number, (name, (_, expect)) in enumerate(MIDWAY.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sentinel(folder / name, 500 + number)
        sentinel(folder / f"z{name.replace('/', '')}", 600 + number)
        kinds[name] = Kind(name, dict, expect)
    keys = sorted(
        (path.relative_to(folder).as_posix() for path in folder.rglob("*.png")), key=lambda key: key.split("/")
    )
    code = "from tests.faults.test_input import change_midway; change_midway()"
    run([sys.executable, "-c", code], tmp_path)
    decoded = [key for key in keys if key not in kinds or isinstance(kinds[key].expect, Decoded)]
    truth = Truth(dict(zip(decoded, features([pixels(folder / key) for key in decoded]), strict=True)))
    assert not misfits(tmp_path / "f.h5", keys, kinds, truth)


FLICKERING = 24


def flicker() -> None:
    """The victim of the next test: while it runs, pictures are cut, put back, and exchanged, over and over."""
    import bbx
    import bbx.providers

    bbx.providers.PROVIDERS["toy"] = ("tests.toy",)
    over = threading.Event()
    sources = sorted(Path("sources").iterdir())

    def disturb() -> None:
        while not over.is_set():
            for source in sources:
                place = Path("pictures", source.name[1:])
                # In place, so that whoever is reading it sees it shrink.
                os.truncate(place, place.stat().st_size // 2)
                spare = Path("spare")
                spare.write_bytes(source.read_bytes())
                spare.replace(place)

    thread = threading.Thread(target=disturb)

    def begin(_plan: object) -> None:
        thread.start()

    try:
        bbx.extract("pictures", model="toy", stages="all", output="f.h5", batch_size=2, on_plan=begin)
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_files_that_change_while_they_are_read_are_one_of_their_pictures_or_fail(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "sources").mkdir()
    formats = (("png", {}), ("jpg", {}), ("tif", {"compression": "tiff_lzw"}), ("bmp", {}), ("tiff", {}), ("webp", {}))
    versions: dict[str, list[np.ndarray]] = {}
    for number in range(FLICKERING):
        suffix, options = formats[number % len(formats)]
        name = f"{number:02}.{suffix}"
        versions[name] = []
        for version in "ab":
            path = tmp_path / "sources" / f"{version}{name}"
            image = odd.noise(number * 2 + (version == "b"), (6, 8)).resize((900, 700), Image.Resampling.BICUBIC)
            image.save(path, **options)
            versions[name].append(pixels(path))
        (tmp_path / "pictures" / name).write_bytes(path.read_bytes())
        sentinel(tmp_path / "pictures" / f"{number:02}s.png", number)
    run([sys.executable, "-c", "from tests.faults.test_input import flicker; flicker()"], tmp_path)
    with FeatureFile(tmp_path / "f.h5") as file:
        failed = file.failed
        for key in file.keys:
            if key in failed:
                assert key in versions, failed[key]
                assert re.search("truncated|damaged|changed while it was read|no such file", failed[key])
                continue
            known = versions.get(key) or [pixels(tmp_path / "pictures" / key)]
            got = {name: file[name, key] for name in STAGES}
            assert any(same(got, maps) for maps in features(known)), key
        assert len(file) == 2 * FLICKERING


# Beyond the limit nothing is unpacked; below it the dearest of the corpus is 121 million pixels of one byte.
BOMB_NBYTES = 250 * MIB
# With a limit of a megapixel: what the texts of a PNG may take, 64 MiB, and some room.
SMALL_BOMB_NBYTES = 120 * MIB


@pytest.mark.slow
def test_bombs_take_no_memory_to_speak_of(tmp_path):
    bombs = build(tmp_path / "bombs", BOMBS)
    plain = build(tmp_path / "plain", [KINDS[0]])
    without = extract(tmp_path, plain.root, "--mode", "overwrite", watch=True)
    amid = extract(tmp_path, bombs.root, "--mode", "overwrite", watch=True)
    assert not misfits(tmp_path / "f.h5", bombs.rows, bombs.odd, Truth.of(bombs))
    frugal = extract(tmp_path, bombs.root, "--mode", "overwrite", "--max-pixels", 10**6, watch=True)
    assert 0 < without.worker_peak < without.own_peak
    for ran, limit in ((amid, BOMB_NBYTES), (frugal, SMALL_BOMB_NBYTES)):
        assert ran.own_peak - without.own_peak < limit
        assert ran.worker_peak - without.worker_peak < limit


@pytest.mark.slow
def test_a_picture_may_have_as_many_pixels_as_the_user_says(tmp_path):
    folder = tmp_path / "sizes"
    folder.mkdir()
    sentinel(folder / "small.png", 1)  # 48 x 40
    odd.smooth().save(folder / "large.png")  # 60 x 40
    (folder / "icon.ico").write_bytes(odd.ico_around(odd.encoded(odd.smooth(), "PNG")))
    (folder / "says.gif").write_bytes(odd.gif_frame_at(1000, 1000))
    (folder / "lies.webp").write_bytes(odd.webp_canvas(13_000, 13_000))
    failures = extract(tmp_path, folder, "--max-pixels", 1920).facts["failures"]
    too_large = {"icon.ico": 2400, "large.png": 2400, "lies.webp": 169_000_000, "says.gif": 1060 * 1040}
    assert failures == {key: f"too large ({pixels} pixels, limit 1920)" for key, pixels in too_large.items()}
    (folder / "lies.webp").unlink()
    ran = extract(tmp_path, folder, "--max-pixels", 1060 * 1040, "--mode", "overwrite")
    keys = sorted(path.name for path in folder.iterdir())
    truth = Truth(dict(zip(keys, features([pixels(folder / key) for key in keys]), strict=True)))
    assert ran.code == 0
    assert not misfits(tmp_path / "f.h5", keys, {}, truth)


@pytest.mark.slow
def test_a_picture_may_have_more_pixels_than_pillow_allows_of_itself(tmp_path):
    folder = tmp_path / "sizes"
    folder.mkdir()
    (folder / "black.png").write_bytes(odd.bilevel(13_400))
    sentinel(folder / "small.png", 1)
    failures = extract(tmp_path, folder).facts["failures"]
    assert list(failures) == ["black.png"]
    assert re.fullmatch(r"too large \(179560000 pixels, limit \d+\)", failures["black.png"])
    assert extract(tmp_path, folder, "--max-pixels", 180_000_000, "--workers", 1, "--mode", "overwrite").code == 0
    black = np.zeros((32, 32, 3), np.uint8)
    truth = Truth(dict(zip(("black.png", "small.png"), features([black, pixels(folder / "small.png")]), strict=True)))
    assert not misfits(tmp_path / "f.h5", ["black.png", "small.png"], {}, truth)


@pytest.mark.slow
def test_a_picture_that_never_ends_costs_its_own_row_only(tmp_path):
    folder = tmp_path / "slow"
    folder.mkdir()
    for number in range(12):
        sentinel(folder / f"{number:02}.png", number)
    # 25 million pixels, each by itself, in Python.
    (folder / "05.fits").write_bytes(odd.fits_table(5000, 4 * 5000 * 5000))
    failures = extract(tmp_path, folder, "--image-timeout", 2).facts["failures"]
    assert failures == {"05.fits": "took longer than 2 s to decode (--image-timeout)"}
    keys = sorted(path.name for path in folder.iterdir())
    good = [key for key in keys if key != "05.fits"]
    truth = Truth(dict(zip(good, features([pixels(folder / key) for key in good]), strict=True)))
    slow = {"05.fits": Kind("slow", dict, Fails("took longer"))}
    assert not misfits(tmp_path / "f.h5", keys, slow, truth)
