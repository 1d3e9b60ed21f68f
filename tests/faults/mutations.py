"""Feature files of every kind, and what chance or malice makes of them: a table of mutations, each by a seed.

A mutation of `KINDS` changes either the file's bytes or, by h5py, its objects. `forged` ones make the file's own
checksums right again: no check can know that from another honest file, so only its manners are judged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from PIL import Image

from bbx.spec import InputFile, Preprocess, RunSpec, Stage
from bbx.store import FeatureWriter, format
from bbx.store.compress import pack
from bbx.store.merge import merge

Spans = list[tuple[int, int]]

PREPROCESS = Preprocess((32, 32), 36, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
STEM, STAGE1 = Stage("stem", (4, 8, 8), 4, "conv1", 0), Stage("stage1", (6, 4, 2), 8, "layer1", 1)
RUN = RunSpec("toy:net", "sha256:1234", (STEM, STAGE1), PREPROCESS, weights="demo", source='{"model": "toy:net"}')
POOLED = replace(RUN, stages=(replace(STEM, shape=(4,)), replace(STAGE1, shape=(6,))), pool="avg")
TOKENS = replace(RUN, stages=(Stage("blocks.0", (5, 6), 0, "blocks.0", 0), Stage("blocks.1", (5, 6), 0, "b", 1)))
MARKUP = "[red]x[/red][link=http://x]"
ESCAPES = "\x1b[31m\x1b]0;owned\x07\x1b[2J\r\n\t\x7f\x9b31m\u202etxt\u2066\x00"
CANARY = "outside/canary.h5"
"""Relative to the folder that holds the folders of all files: something that nothing leads to rightly."""
KEYS = [f"cats/{row:03}.png" for row in range(6)]
ODD_KEYS = [
    "../../outside/canary.png", "/etc/passwd", MARKUP, ESCAPES.replace("\0", ""), "a\udcff\ud800b", "\\udcff \\u005c",
]  # fmt: skip
FAILED, PENDING = 4, 5
FACTS = {"time": "2026-01-02T03:04:05+00:00", "end": "2026-01-02T03:05:05+00:00", "host": "host", "id": "0123456789"}


@dataclass(frozen=True)
class Original:
    """An honest file, in a folder of its own: `target` is what is mutated there, `f.h5` what the commands are given.

    `regions`: spans of bytes by what they hold.
    """

    name: str
    target: str
    data: bytes
    sealed: bool
    finished: bool
    regions: dict[str, Spans]


# The originals


def row_maps(rows: Sequence[int], run: RunSpec) -> dict[str, np.ndarray]:
    """Maps that depend on row and stage alone."""
    seeds = {stage.name: sum(stage.name.encode()) for stage in run.stages}
    return {
        stage.name: np.stack([np.random.default_rng([row, seeds[stage.name]]).normal(size=stage.shape) for row in rows])
        for stage in run.stages
    }


def fill(
    path: Path, run: RunSpec = RUN, keys: Sequence[str] = KEYS, *, reason: str = "truncated", pending: int = -1
) -> None:
    """A file at `path` of `keys` with one failed row, and perhaps a pending one, in every detail the same each time."""
    attempt = {**FACTS, "device": "cpu", "command": "bbx extract", "roots": ["pictures", "../outside"], "versions": {}}
    with FeatureWriter.open(path, run, keys, attempt=attempt) as writer:
        for row in range(len(keys)):
            facts = InputFile(100 + row, 10**18 + row, hashlib.blake2b(b"%d" % row, digest_size=16).digest())
            if row == FAILED:
                writer.fail(row, reason, facts)
            elif row != pending:
                writer.write([row], row_maps([row], run), [facts])


def plain(folder: Path) -> None:
    fill(folder / "f.h5")


def half(folder: Path) -> None:
    fill(folder / "f.h5", replace(RUN, dtype="float16"))


def partial(folder: Path) -> None:
    fill(folder / "f.h5", pending=PENDING)


def pooled(folder: Path) -> None:
    fill(folder / "f.h5", POOLED)


def tokens(folder: Path) -> None:
    fill(folder / "f.h5", TOKENS)


def packed(folder: Path) -> None:
    fill(folder / "f.h5")
    pack((folder / "f.h5").rename(folder / "f.h5.partial"), folder / "f.h5")


def merged(folder: Path, *, virtual: bool = False) -> None:
    fill(folder / "one.h5", keys=KEYS[:5])
    fill(folder / "two.h5", keys=["dogs/1.png", "dogs/2.png"])
    merge([folder / "one.h5", folder / "two.h5"], folder / "f.h5", virtual=virtual, attempt=FACTS)


def virtual(folder: Path) -> None:
    merged(folder, virtual=True)


def old(folder: Path) -> None:
    """A file of format 1.0, which has neither seals nor the inputs' facts."""
    fill(folder / "f.h5")
    with h5py.File(folder / "f.h5", "r+") as file:
        file.attrs["bbx_format_version"] = "1.0"
        del file.attrs["bbx_label_crc32"]
        for name in ("input_nbytes", "input_mtime", "input_digest", "seal"):
            del file["provenance"][name]


def odd(folder: Path) -> None:
    """Honest, but all its words are such as a terminal or a careless path would choke on."""
    stages = (replace(STEM, module=MARKUP + ESCAPES[:-1]), STAGE1)
    words = {"model": MARKUP + ESCAPES, "weights": ESCAPES, "source": MARKUP, "config": ESCAPES}
    fill(folder / "f.h5", replace(RUN, stages=stages, **words), ODD_KEYS, reason=MARKUP + ESCAPES)


ORIGINALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "plain": (plain, "f.h5"),
    "half": (half, "f.h5"),
    "partial": (partial, "f.h5.partial"),
    "pooled": (pooled, "f.h5"),
    "tokens": (tokens, "f.h5"),
    "packed": (packed, "f.h5"),
    "merged": (merged, "f.h5"),
    "virtual": (virtual, "f.h5"),
    "source": (virtual, "one.h5"),
    "old": (old, "f.h5"),
    "odd": (odd, "f.h5"),
}
"""What makes each, and the file of it that is mutated."""


def build(name: str, home: Path) -> Original:
    """Make the original `name` in `home/<name>`, with pictures beside it, and the canary outside."""
    format.now = lambda: FACTS["time"]  # type: ignore[assignment]  # the same bytes each time
    outside = home / CANARY
    if not outside.exists():
        outside.parent.mkdir(parents=True)
        fill(outside, keys=[f"canary/{row}" for row in range(6)])
        Image.new("RGB", (40, 36), (255, 0, 0)).save(outside.with_suffix(".png"))
    folder = home / name
    make, target = ORIGINALS[name]
    for key in (KEYS[0], KEYS[1]):
        place = folder / "pictures" / key
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (0, 90, 30)).save(place)
    make(folder)
    (folder / "f.h5.lock").unlink(missing_ok=True)
    data = (folder / target).read_bytes()
    return Original(name, target, data, name != "old", name != "partial", regions(folder / target))


def regions(path: Path) -> dict[str, Spans]:
    """Where what lies in a file. Every file has `metadata` and `anywhere`."""
    data = path.read_bytes()
    found: dict[str, Spans] = {"anywhere": [(0, len(data))]}
    raw: Spans = []

    def put(what: str, start: int, nbytes: int) -> None:
        if nbytes:
            found.setdefault(what, []).append((start, min(start + nbytes, len(data))))

    with h5py.File(path) as file:
        for name in every_name(file):
            item = file[name]
            put("headers", h5py.h5o.get_info(item.id).addr, 300)
            if not isinstance(item, h5py.Dataset):
                continue
            for start, nbytes in _storage(item):
                raw.append((start, start + nbytes))
                put(_what(name), start, nbytes)
        put("root", h5py.h5o.get_info(file.id).addr, 600)
        texts = [("run", [file[format.RUN][()]]), ("keys", file[format.PATH][()].tolist())]
    for what, words in texts:
        for word in words:
            put(what, data.find(word), len(word))
    for signature, what, nbytes in ((b"GCOL", "heap", 4096), (b"TREE", "index", 300), (b"SNOD", "index", 300),
                                    (b"HEAP", "index", 200), (b"FAHD", "index", 64), (b"BTHD", "index", 64),
                                    (b"FADB", "index", 64), (b"OHDR", "headers", 300)):  # fmt: skip
        at = data.find(signature)
        while at >= 0:
            put(what, at, nbytes)
            at = data.find(signature, at + 1)
    found["attempts"] = [(start, start + len(data[start:stop].rstrip(b"\0"))) for start, stop in found["attempts"]]
    found["metadata"] = _between(sorted(raw), len(data))
    return found


def every_name(file: h5py.File) -> list[str]:
    """Groups and datasets, by the names that plain links give them."""
    names: list[str] = []
    file.visit(names.append)
    return sorted(names)


def _storage(data: h5py.Dataset) -> Iterator[tuple[int, int]]:
    layout = data.id.get_create_plist().get_layout()
    if layout == h5py.h5d.CONTIGUOUS and data.id.get_offset() is not None:
        yield data.id.get_offset(), data.id.get_storage_size()
    elif layout == h5py.h5d.CHUNKED:
        for index in range(data.id.get_num_chunks()):
            info = data.id.get_chunk_info(index)
            yield info.byte_offset, info.size


def _what(name: str) -> str:
    first, _, last = name.partition("/")
    usual = {"status": "status", "checksum": "checksum", "path": "references", "provenance": last}
    return usual.get(first, "scales" if name.endswith(("_channel", "_x", "_y", "_token", "_feature", "image")) else
                     "features")  # fmt: skip


def _between(spans: Spans, end: int) -> Spans:
    found, at = [], 0
    for start, stop in [*spans, (end, end)]:
        if start > at:
            found.append((at, start))
        at = max(at, stop)
    return found


# Mutations of bytes

Bytes = bytearray
ByteChange = Callable[[Bytes, Original, random.Random], None]
ObjectChange = Callable[[h5py.File, random.Random], None]

FLIPPED = ("anywhere", "metadata", "heap", "headers", "root", "index", "status", "checksum", "seal", "features",
           "failure", "input_nbytes", "input_digest", "attempts", "run", "keys", "references", "scales")  # fmt: skip
WIDTHS = (1, 2, 4, 8)
NUMBERS = (0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 2)  # fmt: skip


def somewhere(original: Original, what: str, chance: random.Random) -> int:
    """An offset in a region; where the file has none of it, in its metadata."""
    spans = original.regions.get(what) or original.regions["metadata"]
    start, stop = chance.choices(spans, [stop - start for start, stop in spans])[0]
    return chance.randrange(start, stop)


def flip(what: str) -> ByteChange:
    def change(data: Bytes, original: Original, chance: random.Random) -> None:
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            data[somewhere(original, what, chance)] ^= 1 << chance.randrange(8)

    return change


def fill_with(what: str, byte: int | None) -> ByteChange:
    def change(data: Bytes, original: Original, chance: random.Random) -> None:
        at, count = somewhere(original, what, chance), chance.choice((2, 4, 8, 32, 200, 4096))
        count = min(count, len(data) - at)
        data[at : at + count] = chance.randbytes(count) if byte is None else bytes([byte]) * count

    return change


def number(what: str) -> ByteChange:
    """An aligned integer, a size, an offset or a count, becomes another one."""

    def change(data: Bytes, original: Original, chance: random.Random) -> None:
        for _ in range(chance.choice((1, 1, 2))):
            width = chance.choice(WIDTHS)
            at = min(somewhere(original, what, chance) // width * width, len(data) - width)
            value = int.from_bytes(data[at : at + width], "little")
            other = chance.choice((*NUMBERS, value + 1, value - 1, value * 2, value << 16, -value, len(data)))
            data[at : at + width] = (other % (1 << 8 * width)).to_bytes(width, "little")

    return change


def redirect(data: Bytes, original: Original, chance: random.Random) -> None:
    """An address leads to where another one does: objects become each other, or their own parents."""
    places = [
        at
        for start, stop in original.regions["metadata"]
        for at in range(start - start % -8, stop - 7, 8)
        if 0 < int.from_bytes(data[at : at + 8], "little") < len(data)
    ]
    at, other = chance.choice(places), chance.choice(places)
    data[at : at + 8] = data[other : other + 8]


def swap_pages(data: Bytes, original: Original, chance: random.Random) -> None:
    one, other = (chance.randrange(len(data) // 4096) * 4096 for _ in range(2))
    data[one : one + 4096], data[other : other + 4096] = data[other : other + 4096], data[one : one + 4096]


def move_block(data: Bytes, original: Original, chance: random.Random) -> None:
    """A block is there twice, is gone, or something else stands between."""
    at, count = somewhere(original, "anywhere", chance), chance.choice((1, 8, 100, 512, 4096))
    block, place = data[at : at + count], somewhere(original, chance.choice(("anywhere", "metadata")), chance)
    how = chance.choice(("twice", "over", "gone", "new"))
    if how == "twice":
        data[place:place] = block
    elif how == "over":
        data[place : place + count] = block
    elif how == "gone":
        del data[at : at + count]
    else:
        data[place:place] = chance.randbytes(count)


def truncate(data: Bytes, original: Original, chance: random.Random) -> None:
    del data[chance.choice((chance.randrange(len(data)), len(data) - 1, len(data) - 4096, 8, 0, 96, 2048)) :]


def extend(data: Bytes, original: Original, chance: random.Random) -> None:
    data += chance.choice((b"\0", b"\0" * 5000, chance.randbytes(3000), bytes(data[:4096]), bytes(data)))
    if chance.random() < 0.3:
        data[:0] = chance.choice((b"\0" * 512, chance.randbytes(512), bytes(1024)))  # a user block, for HDF5


def splice(data: Bytes, original: Original, chance: random.Random) -> None:
    """The head of one file and the tail of another, which differs in a part of its metadata."""
    at = somewhere(original, chance.choice(("anywhere", "metadata")), chance)
    data[at:] = TAILS[chance.randrange(len(TAILS))][at:]


TAILS: list[bytes] = []
"""Whole files to splice with; `prepare` fills it."""


def swap_rows(data: Bytes, original: Original, chance: random.Random) -> None:
    """Two rows change places in some of the columns: all is well with each by itself, but they are not their keys'."""
    rows = 7 if original.name in ("merged", "virtual") else 6
    columns = ("features", "checksum", "seal", "status", "failure", "input_nbytes", "input_mtime", "input_digest",
               "references")  # fmt: skip
    one, other = chance.sample(range(rows), 2)
    for what in chance.choice((columns[:2], columns[:3], columns[:-1], columns[-1:], columns[2:3], columns[3:5])):
        for start, stop in original.regions.get(what, []):
            size = (stop - start) // rows
            first, second = (slice(start + row * size, start + (row + 1) * size) for row in (one, other))
            data[first], data[second] = data[second], data[first]


def lying_text(data: Bytes, original: Original, chance: random.Random) -> None:
    """A text of 2³¹ bytes, or of none, or that of another row."""
    start, stop = chance.choice(original.regions.get("references") or [(0, 32)])
    at = start + chance.randrange((stop - start) // 16) * 16
    where, width = chance.choice(((0, 4), (4, 8), (12, 4)))
    value = chance.choice((1 << 31, (1 << 32) - 1, 0, 1, 2, 65_536, 300))
    data[at + where : at + where + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def _bump(names: Sequence[str]) -> ByteChange:
    """Row counts as the file's own attributes have them, changed in place, to a neighbour."""

    def change(data: Bytes, original: Original, chance: random.Random) -> None:
        at = data.find(chance.choice(names).encode() + b"\0")
        start = at + chance.randrange(8, 64)
        data[start] = (data[start] + chance.choice((1, -1, 5, 128))) % 256

    return change


# Mutations of objects

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 31, 1 << 63, 1 << 70, 1e308, float("nan"), float("-inf"), 0.5, "", "x" * 100_000, MARKUP,
    ESCAPES, "\ud800", "../../etc/passwd", "/etc/passwd", "a\0b", "con", [], {}, [[[[]]]], ["stem"], {"a": {"b": [1]}},
)  # fmt: skip


def a_dataset(file: h5py.File, chance: random.Random) -> str:
    names = [name for name in every_name(file) if isinstance(file[name], h5py.Dataset)]
    return chance.choice(names)


def an_object(file: h5py.File, chance: random.Random) -> h5py.Group | h5py.Dataset:
    return file[chance.choice(["/", *every_name(file)])]


def replaced(file: h5py.File, name: str, **options: Any) -> h5py.Dataset:
    """A dataset of other options in the place of `name`, with as much of its data as goes."""
    data = file[name]
    options = {"shape": data.shape, "dtype": data.dtype, **options}
    values = data[()] if options["shape"] == data.shape else None
    del file[name]
    made = file.create_dataset(name, **options)
    if values is not None and "external" not in options:
        # Where the types do not go together, zeros do as well.
        with contextlib.suppress(TypeError, ValueError, OSError):
            made[()] = values
    return made


def other_dtype(file: h5py.File, chance: random.Random) -> None:
    kinds = (">f4", "<f8", "<f2", "<f4", "<i4", "<u8", "u1", "S7", "S256", "V9", h5py.string_dtype(), h5py.ref_dtype,
             np.dtype([("a", "<f4"), ("b", "<i8")]), h5py.enum_dtype({"no": 0, "yes": 1}), h5py.vlen_dtype("<f4"),
             np.dtype(("<f4", (2,))), "<c8", "?")  # fmt: skip
    replaced(file, a_dataset(file, chance), dtype=chance.choice(kinds))


def other_shape(file: h5py.File, chance: random.Random) -> None:
    name = a_dataset(file, chance)
    shape = list(file[name].shape) or [1]
    shape[chance.randrange(len(shape))] = chance.choice((0, 1, 5, 7, 300))
    shapes = (tuple(shape), (*shape, 1), (1, *shape), tuple(shape[1:]), (), None, (0,) * 31)
    replaced(file, name, shape=chance.choice(shapes))


def huge_shape(file: h5py.File, chance: random.Random) -> None:
    """More than any machine has, and not one byte of it there."""
    name = a_dataset(file, chance)
    shape = [*file[name].shape] or [1]
    shape[chance.randrange(len(shape))] = chance.choice((1 << 20, 1 << 31, 1 << 34))
    packing = chance.choice(({}, {"chunks": True}, {"chunks": (1,) * len(shape), "compression": "gzip"}))
    del_and = {"shape": tuple(shape), "dtype": file[name].dtype, **packing}
    del file[name]
    file.create_dataset(name, **del_and)


def other_storage(file: h5py.File, chance: random.Random) -> None:
    name = a_dataset(file, chance)
    shape = file[name].shape or (1,)
    ways: tuple[dict[str, Any], ...] = (
        {"chunks": True, "compression": "gzip"}, {"chunks": True, "compression": "lzf"}, {"chunks": (1,) * len(shape)},
        {"chunks": True, "fletcher32": True, "shuffle": True}, {"chunks": True, "maxshape": (None,) * len(shape)},
        {"chunks": True, "scaleoffset": 2},
    )  # fmt: skip
    if file[name].shape and h5py.check_string_dtype(file[name].dtype) is None:
        replaced(file, name, **chance.choice(ways))


def external(file: h5py.File, chance: random.Random) -> None:
    """Storage in another file: the canary, and the system's."""
    name, place = a_dataset(file, chance), chance.choice(("../outside/canary.h5", "/etc/passwd", "/dev/zero", "f.h5"))
    options = {"shape": file[name].shape or (1,), "dtype": "u1" if file[name].dtype.kind == "O" else file[name].dtype}
    del file[name]
    file.create_dataset(name, external=[(place, chance.choice((0, 2048)), h5py.h5f.UNLIMITED)], **options)


def link_away(file: h5py.File, chance: random.Random) -> None:
    """A link to another file in the place of an object, or in a corner."""
    name = chance.choice(every_name(file))
    target = chance.choice(("../outside/canary.h5", str(Path("../outside/canary.h5").resolve()), "/dev/zero", "f.h5"))
    link = h5py.ExternalLink(target, chance.choice((name, "/", "/stem")))
    place = chance.choice((name, "notes/more/away", f"checksum/{chance.choice('ab')}"))
    if place in file:
        del file[place]
    file[place] = link


def link_soft(file: h5py.File, chance: random.Random) -> None:
    """Soft links: loops, to nowhere, to what was there, and the longest of paths."""
    name = chance.choice(every_name(file))
    how = chance.choice(("loop", "nowhere", "moved", "long", "pair"))
    if how == "moved":
        file.move(name, "elsewhere")
        file[name] = h5py.SoftLink("/elsewhere")
        return
    del file[name]
    paths = {"loop": f"/{name}", "nowhere": ESCAPES.replace("\0", ""), "long": "/a" * 20_000, "pair": "/second"}
    file[name] = h5py.SoftLink(paths[how])
    if how == "pair":
        file["second"] = h5py.SoftLink(f"/{name}")


def link_hard(file: h5py.File, chance: random.Random) -> None:
    """Cycles of groups, and one object under the name of another."""
    groups = ["/", *(name for name in every_name(file) if isinstance(file[name], h5py.Group))]
    if chance.random() < 0.4:
        file[chance.choice(groups)]["again"] = file[chance.choice(groups)]
        return
    one, other = a_dataset(file, chance), a_dataset(file, chance)
    if one != other:
        del file[one]
        file[one] = file[other]


def names_swapped(file: h5py.File, chance: random.Random) -> None:
    """Two datasets under each other's names: sums of one stage for the other's, nanoseconds for bytes."""
    alike = [("stem", "stage1"), ("checksum/stem", "checksum/stage1"), ("provenance/input_nbytes",
             "provenance/input_mtime"), ("provenance/seal", "checksum/stem"), ("stem_y", "stage1_y"),
             ("stem_x", "stem_y")]  # fmt: skip
    one, other = chance.choice([pair for pair in alike if all(name in file for name in pair)] or [("image", "status")])
    file.move(one, "between")
    file.move(other, one)
    file.move("between", other)


def renamed(file: h5py.File, chance: random.Random) -> None:
    name = chance.choice(every_name(file))
    other = (f"{name}x", "x", f"plot/{name.rpartition('/')[2]}2", "a" * 5000, MARKUP, "\x1b[31m", "..", "ü" * 100)
    file.move(name, chance.choice(other))


def removed(file: h5py.File, chance: random.Random) -> None:
    item = an_object(file, chance)
    if chance.random() < 0.5 and len(item.attrs):
        del item.attrs[chance.choice(list(item.attrs))]
    elif item.name != "/":
        del file[item.name]


def added(file: h5py.File, chance: random.Random) -> None:
    """What a user may add: it does no harm, whatever it is called."""
    name = chance.choice(("mine", "plot/mine", "checksum/mine", "provenance/mine", MARKUP, "\x1b[31mred", "a" * 3000))
    shape = chance.choice(((), (3,), (6, 4, 8, 8)))
    data = file.create_dataset(name, shape, chance.choice(("<f4", "S9", "u1", h5py.string_dtype())))
    data.attrs["\x1b[2J" + MARKUP] = ESCAPES.replace("\0", "")


def many_attributes(file: h5py.File, chance: random.Random) -> None:
    item = an_object(file, chance)
    for place in range(chance.choice((10, 300))):
        item.attrs[f"{MARKUP}\x1b{place}"] = np.zeros(chance.choice((1, 200)))
    item.attrs["large"] = np.zeros(64_000, np.uint8)


def deep_groups(file: h5py.File, chance: random.Random) -> None:
    group: h5py.Group = file
    for _ in range(chance.choice((50, 3000))):
        group = group.create_group("g")
    group["end"] = chance.choice((file["status"], h5py.SoftLink("/")))


def many_groups(file: h5py.File, chance: random.Random) -> None:
    """Every group holds every other: paths without end, though objects are few."""
    groups = [file.create_group(f"many/{place}") for place in range(30)]
    for group in groups:
        for place, other in enumerate(groups):
            group[f"to{place}"] = other


def odd_attribute(file: h5py.File, chance: random.Random) -> None:
    """An attribute that bbx made has another value, type or shape."""
    item = chance.choice([file, file, an_object(file, chance)])
    names = list(item.attrs) or ["x"]
    values: tuple[Any, ...] = (
        -5, 1 << 62, 3.5, float("nan"), "zero", b"bytes", ESCAPES.replace("\0", ""), MARKUP, np.arange(5),
        np.zeros((2, 2)), h5py.Empty("<f4"), h5py.Empty(h5py.string_dtype()), file.ref, file["status"].regionref[1:2],
        np.array([file.ref, file["status"].ref], h5py.ref_dtype), np.zeros(2, [("a", "<f4"), ("b", "S3")]), True,
        np.array(["a", "\x1b[31m"], h5py.string_dtype()), np.void(b"opaque"), np.array([1, 2], "<c16"), "2.0", "1.0",
        "1.99999999999999999999", "x" * 60_000, np.array(list(b"raw"), "u1"), np.array(0, h5py.enum_dtype({"a": 0})),
        h5py.Reference(),
    )  # fmt: skip
    item.attrs[chance.choice(names)] = chance.choice(values)


def dimension_lists(file: h5py.File, chance: random.Random) -> None:
    """References that lead to groups, to nowhere, to the dataset itself."""
    data = file[a_dataset(file, chance)]
    name = chance.choice(("DIMENSION_LIST", "REFERENCE_LIST", "CLASS"))
    rank = len(data.shape) or 1
    made = np.empty(rank, object)
    for axis in range(rank):
        made[axis] = np.array([chance.choice((file.ref, data.ref, file["plot"].ref, h5py.Reference()))], h5py.ref_dtype)
    data.attrs.create(name, made, (rank,), h5py.vlen_dtype(h5py.ref_dtype))


def virtual_stage(file: h5py.File, chance: random.Random) -> None:
    """Rows from the file itself, the canary, a relative way out, a pattern, a part, another stage."""
    name = chance.choice(("stem", "stage1", "blocks.0", "status", "checksum/stem", "provenance/seal", "image"))
    if name not in file or not file[name].shape:
        return
    data = file[name]
    absolute = str(Path("../outside/canary.h5").resolve())
    away = ("../outside/canary.h5", "pictures/../../outside/canary.h5", absolute)
    place = chance.choice((".", "f.h5", "./f.h5", *away, "%%b.h5", "f%%.h5", "gone.h5", "a\x1b[31m.h5"))
    shape, dtype = data.shape, data.dtype
    layout = h5py.VirtualLayout(shape, dtype)
    source = h5py.VirtualSource(place, chance.choice((name, "stem", "/nothing")), shape=shape)
    count = chance.choice((len(data), 1, 3))
    layout[:count] = source[:count]
    del file[name]
    file.create_virtual_dataset(name, layout, fillvalue=chance.choice((None, 0)))


BOMB = zlib.compress(bytes(1 << 26))


def bomb(file: h5py.File, chance: random.Random) -> None:
    """A chunk that inflates to far more than a chunk, is no deflate at all, or says that it was not packed."""
    name = next(name for name in ("stem", "blocks.0") if name in file)
    data = file[name]
    shape, dtype = data.shape, data.dtype
    del file[name]
    made = file.create_dataset(name, shape, dtype, chunks=(1, *shape[1:]), compression="gzip", shuffle=True)
    chunk = chance.choice((BOMB, b"\0", b"junk", zlib.compress(b"x"), bytes(1000)))
    for row in range(shape[0]):
        made.id.write_direct_chunk((row,) + (0,) * (len(shape) - 1), chunk, chance.choice((0, 0, 1, 3, 0xFFFFFFFF)))


def named_type(file: h5py.File, chance: random.Random) -> None:
    """The type of a dataset is an object of its own, shared by its name."""
    name = a_dataset(file, chance)
    if file[name].shape and file[name].dtype.kind != "O":
        file["type"] = file[name].dtype
        replaced(file, name, dtype=file["type"])


def changed_value(file: h5py.File, chance: random.Random) -> None:
    """One value is written over in the orderly way."""
    data = file[a_dataset(file, chance)]
    if not data.shape or data.is_virtual:
        return
    place = tuple(chance.randrange(size) for size in data.shape)
    if data.dtype.kind == "O":
        data[place] = chance.choice((KEYS[0], "", ESCAPES.replace("\0", ""), MARKUP, "../../etc/passwd", "a" * 70_000))
    elif data.dtype.kind == "S":
        data[place] = (MARKUP + ESCAPES).encode()
    else:
        data[place] = chance.choice((0, 1, 2, 3, 77, 255))


def run_edited(*, forged: bool) -> ObjectChange:
    """A field of the recorded run has another value; `forged`: and its digest and checksum are made to match."""

    def change(file: h5py.File, chance: random.Random) -> None:
        text = file[format.RUN][()].decode()
        data = json.loads(text)
        owner, name = chance.choice(list(_places(data)))
        owner[name] = chance.choice(ODD_VALUES)
        if chance.random() < 0.2:
            data["added"] = chance.choice(ODD_VALUES)
        _put_run(file, json.dumps(data), data if forged else None)

    return change


def run_text(file: h5py.File, chance: random.Random) -> None:
    """The run is no JSON, or such as parsers choke on."""
    text = file[format.RUN][()].decode()
    texts = ("", "null", "[]", "[" * 100_000, '{"a":' * 50_000, "[" * (format.MAX_RUN_NBYTES + 1), text[:-1], text * 2,
             '{"stages": ' + "9" * 5000 + "}", text.replace('"dtype"', '"dtype": "float16", "dtype"'), ESCAPES[:9],
             text.replace("toy", "\\ud800"), "\ufeff" + text, text + "\n\n", text.replace("{", '{"__class__": 1, ', 1),
             text.replace("[", "[" * 900, 1))  # fmt: skip
    _put_run(file, chance.choice(texts), None)


def _put_run(file: h5py.File, text: str, data: dict[str, Any] | None) -> None:
    file[format.RUN][()] = text
    if data is None:
        return
    compared = {name: value for name, value in data.items() if name not in ("weights", "source")}
    file.attrs["bbx_run_sha256"] = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
    place = [int(file.attrs[name]) for name in ("row_start", "row_stop", "rows_total")]
    if "bbx_label_crc32" in file.attrs:
        file.attrs["bbx_label_crc32"] = np.uint32(format.label(text, *place))


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value, as (owner, name)."""
    for name, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield data, name
        if isinstance(value, dict | list):
            yield from _places(value)


def rows_forged(file: h5py.File, chance: random.Random) -> None:
    """Another range of rows, the checksum over it made to match."""
    count = len(file["status"])
    start = chance.choice((1, 5, -1, 1 << 40, (1 << 63) - count - 1))
    stop = start + chance.choice((count, count, count + 1, 0))
    total = chance.choice((stop, stop + 1, (1 << 63) - 1))
    for name, value in (("row_start", start), ("row_stop", stop), ("rows_total", total)):
        file.attrs[name] = np.int64(min(value, (1 << 63) - 1))
    _put_run(file, text := file[format.RUN][()].decode(), json.loads(text))


def attempt_edited(*, forged: bool) -> ObjectChange:
    """A start's record has odd values, keys or depth; `forged`: with its checksum right."""

    def change(file: h5py.File, chance: random.Random) -> None:
        slot = chance.choice((0, 0, 1, 3, 15))
        facts: dict[str, Any] = {**FACTS, "roots": ["pictures"], "versions": {}, "device": "cpu"}
        for _ in range(3):
            word = chance.choice((*facts, MARKUP, ESCAPES, "unreadable", "merged_from", "crc32"))
            facts[word] = chance.choice((*ODD_VALUES, ["../outside"], ["/"], ["."], ["a\0b", 3, None]))
        data = format.encode_attempt(facts)
        if not forged:
            texts = (data[:50], b"{" * 4096, b"[" * 4096, b"\xff" * 4096, b"\x1b[31m\x07", b'{"a": ' + b"9" * 4090,
                     b'"text"', data.replace(b"host", b"tsoh", 1), ESCAPES.encode(), MARKUP.encode())  # fmt: skip
            data = chance.choice(texts)
        file[format.ATTEMPTS][slot] = np.frombuffer(data.ljust(format.ATTEMPT_NBYTES, b"\0")[:4096], np.uint8)

    return change


def row_forged(file: h5py.File, chance: random.Random) -> None:
    """A key, a reason, a mark and an input's facts of another's choice, sealed as bbx would."""
    if format.SEAL not in file:
        return
    row = chance.randrange(len(file["status"]))
    word = chance.choice((*ODD_KEYS, "a\\ud800", "%s%n", "~", "-rf", "C:\\x", "a" * 65_000, "nul", "../outside/canary"))
    key = format.encode_key(word)
    file[format.PATH][row] = key.decode()
    file["status"][row] = chance.choice((0, 1, 2))
    file[format.FAILURE][row] = (MARKUP + ESCAPES).encode() if chance.random() < 0.5 else b"\xff\xfe\x1b[31m"
    file[format.INPUT_NBYTES][row] = chance.choice((-1, (1 << 63) - 1, 0))
    one = slice(row, row + 1)
    names = json.loads(file[format.RUN][()].decode())["stages"]
    facts = format.RowFacts(
        [key], file["status"][one], file[format.FAILURE][one], file[format.INPUT_NBYTES][one],
        file[format.INPUT_MTIME][one], file[format.INPUT_DIGEST][one],
        np.stack([file[format.checksum_name(stage["name"])][one] for stage in names], axis=1),
    )  # fmt: skip
    file[format.SEAL][row] = facts.seals()[0]


# The table


@dataclass(frozen=True)
class Kind:
    """One kind of mutation; of every round of the table it takes `weight` files."""

    how: Literal["bytes", "objects"]
    change: Callable[..., None]
    forged: bool = False
    weight: int = 1


KINDS: dict[str, Kind] = {
    **{f"flip {what}": Kind("bytes", flip(what)) for what in FLIPPED},
    "zeros": Kind("bytes", fill_with("metadata", 0)),
    "ones": Kind("bytes", fill_with("metadata", 0xFF)),
    "noise": Kind("bytes", fill_with("metadata", None)),
    "noise in headers": Kind("bytes", fill_with("headers", None)),
    "zeros anywhere": Kind("bytes", fill_with("anywhere", 0)),
    "noise anywhere": Kind("bytes", fill_with("anywhere", None)),
    "number": Kind("bytes", number("metadata"), weight=2),
    "number in headers": Kind("bytes", number("headers"), weight=2),
    "number in the heap": Kind("bytes", number("heap")),
    "number in an index": Kind("bytes", number("index")),
    "number in the superblock": Kind("bytes", lambda data, original, chance: number("s")(
        data, replace(original, regions={"s": [(0, 96)]}), chance)),
    "number of rows": Kind("bytes", _bump(("row_start", "row_stop", "rows_total", "bbx_label_crc32"))),
    "address redirected": Kind("bytes", redirect, weight=2),
    "pages swapped": Kind("bytes", swap_pages),
    "block moved": Kind("bytes", move_block, weight=2),
    "truncated": Kind("bytes", truncate),
    "extended": Kind("bytes", extend),
    "spliced": Kind("bytes", splice),
    "rows swapped": Kind("bytes", swap_rows, weight=2),
    "lying text": Kind("bytes", lying_text, weight=2),
    "other dtype": Kind("objects", other_dtype),
    "other shape": Kind("objects", other_shape),
    "huge shape": Kind("objects", huge_shape),
    "other storage": Kind("objects", other_storage),
    "external storage": Kind("objects", external),
    "external link": Kind("objects", link_away),
    "soft link": Kind("objects", link_soft),
    "hard link": Kind("objects", link_hard),
    "names swapped": Kind("objects", names_swapped),
    "renamed": Kind("objects", renamed),
    "removed": Kind("objects", removed),
    "added": Kind("objects", added),
    "many attributes": Kind("objects", many_attributes),
    "deep groups": Kind("objects", deep_groups),
    "many groups": Kind("objects", many_groups),
    "odd attribute": Kind("objects", odd_attribute, weight=2),
    "dimension lists": Kind("objects", dimension_lists),
    "virtual": Kind("objects", virtual_stage),
    "bomb": Kind("objects", bomb),
    "named type": Kind("objects", named_type),
    "changed value": Kind("objects", changed_value, weight=2),
    "run edited": Kind("objects", run_edited(forged=False)),
    "run text": Kind("objects", run_text),
    "attempt edited": Kind("objects", attempt_edited(forged=False)),
    "run forged": Kind("objects", run_edited(forged=True), forged=True, weight=2),
    "rows forged": Kind("objects", rows_forged, forged=True),
    "attempt forged": Kind("objects", attempt_edited(forged=True), forged=True),
    "row forged": Kind("objects", row_forged, forged=True, weight=2),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One mutated file: which mutation of which original, by which seed."""

    kind: str
    original: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.original}/{self.seed}"

    @classmethod
    def of(cls, text: str) -> Case:
        """The case of that name."""
        kind, original, seed = text.split("/")
        return cls(kind, original, int(seed))


def cases(start: int, stop: int) -> list[Case]:
    """Numbers `start` to `stop` of the endless list of cases: every kind in turn, each time on another original."""
    round_of = [name for name, kind in KINDS.items() for _ in range(kind.weight)]
    names = list(ORIGINALS)
    found = []
    for number in range(start, stop):
        lap, place = divmod(number, len(round_of))
        found.append(Case(round_of[place], names[(lap + place) % len(names)], number))
    return found


def prepare(home: Path) -> dict[str, Original]:
    """All originals, in their folders."""
    made = {name: build(name, home) for name in ORIGINALS}
    TAILS[:] = [original.data for original in made.values()]
    return made


def mutate(case: Case, original: Original, place: Path) -> None:
    """The mutated file at `place`, in whose folder the call is made."""
    kind, chance = KINDS[case.kind], random.Random(str(case))
    place.unlink(missing_ok=True)
    if kind.how == "bytes":
        data = bytearray(original.data)
        kind.change(data, original, chance)
        place.write_bytes(data)
        return
    place.write_bytes(original.data)
    with h5py.File(place, "r+") as file:
        kind.change(file, chance)


def copy_work(home: Path, work: Path) -> None:
    """The originals' folders once more, to be spoilt, and the canary beside them."""
    for folder in sorted(home.iterdir()):
        shutil.copytree(folder, work / folder.name)
