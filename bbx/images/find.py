# ruff: noqa: PTH100, PTH110, PTH112, PTH114, PTH116, PTH118, PTH122, PTH123, PTH207
# A million rows are built from strings; as Path objects they would take minutes.
"""Which files are rows, in which order and under which keys: folders, files, globs, lists and stdin → `ImageList`.

The rules. A folder is walked, sorted by name folder by folder, hidden names left out, symbolic links followed. A known
suffix is taken on trust, even on a dangling link or a FIFO: that row fails later, with its reason. Anything else is
believed by its content alone. Folders are roots; all single files of one call, from wherever they were named, share
one root, their deepest common folder.
"""

from __future__ import annotations

import glob
import itertools
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bbx.errors import StartError, nearest
from bbx.images.formats import HEADER_NBYTES, claiming_formats, is_image, trusted_suffixes
from bbx.images.rows import ImageList, Run, lay_out

_MAX_WARNINGS = 20
# Enough names to find a typing error among; comparing with a million would take minutes.
_MAX_COMPARED_NAMES = 2000
_NOT_A_FILE = {
    "special": "is no regular file",
    "broken": "is a link that leads nowhere",
    "unreachable": "cannot be reached (permission denied)",
    "missing": "is gone again",
}


def find_images(inputs: Sequence[str | os.PathLike[str]], *, stdin: Iterable[bytes | str] | None = None) -> ImageList:
    """Every image that `inputs` name, in their order.

    An input is a folder, a file, a glob (where no such file exists; `**` gives files only), `@list.txt`, or `-` for
    `stdin`, which defaults to the process's own. Lists hold one path per line, or NUL-separated ones, relative to the
    current folder, nothing in them being a glob or a list; what they name without it being there is a row that fails.
    A file named "@x" is given as "./@x".

    Raises `StartError` where an input names nothing, or where there is no image at all.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    texts = [os.fsdecode(item) for item in given]
    finder = _Finder()
    for text in texts:
        if text == "-":
            finder.add_list(_all_bytes(stdin))
        elif text.startswith("@"):
            finder.add_list(_list_bytes(text[1:]))
        else:
            finder.add_input(text)
    found = finder.result()
    if not found.keys:
        raise _nothing_found(texts, finder.skipped, found.warnings)
    return found


@dataclass(slots=True)
class _Folder:
    """A folder in the middle of its walk."""

    prefix: str
    names: Iterator[str]
    folders: set[str]
    identity: tuple[int, int]


class _Finder:
    """Collects the runs of one call."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.skipped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._warned = 0
        self._seen_folders: set[str] = set()
        self._seen_files: set[str] = set()
        self._suffixes = trusted_suffixes()

    def add_input(self, text: str) -> None:
        """A path or glob from the command line."""
        if text and _kind(text) != "missing":
            self._add_path(text, named=True)
            return
        matches = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
        if not matches:
            raise _names_nothing(text)
        for path in matches:
            # With "**" the pattern lists the insides itself, once more for each folder above them.
            if "**" not in text or not os.path.isdir(path):
                self._add_path(path, named=False)

    def add_list(self, data: bytes) -> None:
        """The paths that a list holds; one with a known suffix is not even looked at."""
        for line in _split(data):
            path = os.fsdecode(line)
            if _suffix(path) in self._suffixes:
                self._add_file(path)
            else:
                self._add_path(path, named=True)

    def result(self) -> ImageList:
        """The list; the finder is used up."""
        if self._warned > _MAX_WARNINGS:
            self.warnings.append(f"and {self._warned - _MAX_WARNINGS} more warnings")
        return lay_out(self.runs, skipped=self.skipped.total(), warnings=self.warnings)

    def _add_path(self, path: str, *, named: bool) -> None:
        kind = _kind(path)
        if kind == "folder":
            self._add_folder(path)
        elif kind != "file" or _suffix(path) in self._suffixes or self._is_image(path):
            self._add_file(path)
        else:
            self._skip(path)
            if named:
                self._warn(f"{_shown(path)} is no image: skipped")

    def _add_file(self, path: str) -> None:
        absolute = _absolute(path)
        if absolute in self._seen_files:
            self._warn(f"{_shown(path)} was named more than once: it is one row")
            return
        self._seen_files.add(absolute)
        if not self.runs or self.runs[-1].root:
            self.runs.append(Run("", "", []))
        self.runs[-1].names.append(absolute)

    def _add_folder(self, path: str) -> None:
        absolute = _absolute(path)
        if absolute in self._seen_folders:
            self._warn(f"the folder {_shown(path)} was named more than once: its files are one row each")
            return
        self._seen_folders.add(absolute)
        self.runs.append(Run(path, absolute, self._walk(path)))

    def _walk(self, root: str) -> list[str]:
        """The images in `root`, relative to it. A stack, not recursion: folders nest deeper than Python calls do."""
        found: list[str] = []
        stack = [folder for folder in [self._enter(root, "", [])] if folder]
        while stack:
            here = stack[-1]
            for name in here.names:
                if name in here.folders:
                    inner = self._enter(root, f"{here.prefix}{name}/", stack)
                    if inner:
                        stack.append(inner)
                        break
                else:
                    found.append(here.prefix + name)
            else:
                stack.pop()
        return found

    def _enter(self, root: str, prefix: str, above: Sequence[_Folder]) -> _Folder | None:
        path = os.path.join(root, prefix)
        try:
            facts = os.stat(path)
            identity = (facts.st_dev, facts.st_ino)
            if any(folder.identity == identity for folder in above):
                self._warn(f"the folder {_shown(path)} leads back into itself: skipped")
                return None
            images, folders, others = self._scan(path)
        except OSError as error:
            self._warn(f"the folder {_shown(path)} cannot be read ({error.strerror}): skipped")
            return None
        for name in sorted(others):
            if self._is_unnamed_image(os.path.join(path, name), others[name]):
                images.append(name)
        return _Folder(prefix, iter(sorted([*images, *folders])), folders, identity)

    def _scan(self, path: str) -> tuple[list[str], set[str], dict[str, str]]:
        """(images by their suffix, folders, kinds of everything else) in one folder, none of its files opened."""
        images: list[str] = []
        folders: set[str] = set()
        others: dict[str, str] = {}
        suffixes = self._suffixes
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                # No stat where the folder itself says what its entries are.
                if entry.is_dir(follow_symlinks=False):
                    folders.add(name)
                elif not entry.is_symlink():
                    if name[name.rfind(".") :].lower() in suffixes:
                        images.append(name)
                    else:
                        others[name] = "file" if entry.is_file() else "special"
                elif (kind := _kind(entry.path)) == "folder":
                    folders.add(name)
                elif _suffix(name) in suffixes:
                    images.append(name)
                else:
                    others[name] = kind
        return images, folders, others

    def _is_unnamed_image(self, path: str, kind: str) -> bool:
        """Whether a file in a folder whose suffix says nothing is an image; counts it where it is not."""
        if kind == "file" and self._is_image(path):
            return True
        if kind != "file":
            self._warn(f"{_shown(path)} {_NOT_A_FILE[kind]}: skipped")
        self._skip(path)
        return False

    def _is_image(self, path: str) -> bool:
        try:
            # Should it have become a FIFO by now, O_NONBLOCK keeps the open from waiting.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            try:
                start = os.read(descriptor, 16)
                return bool(claiming_formats(start)) and is_image(start + os.read(descriptor, HEADER_NBYTES))
            finally:
                os.close(descriptor)
        except OSError as error:
            self._warn(f"{_shown(path)} cannot be read ({error.strerror})")
            return False

    def _skip(self, path: str) -> None:
        self.skipped[_suffix(path)] += 1

    def _warn(self, text: str) -> None:
        self._warned += 1
        if self._warned <= _MAX_WARNINGS:
            self.warnings.append(text)


def _kind(path: str) -> str:
    """`folder`, `file`, `special` (FIFO, socket, device), `broken` (a link to nothing), `unreachable`, `missing`."""
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        return "unreachable"
    except (OSError, ValueError):
        return "broken" if os.path.islink(path) else "missing"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "special"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _absolute(path: str) -> str:
    """An identity of `path`. Only where ".." might cross a link are links resolved; the name itself never is."""
    if ".." not in path.lstrip("./"):
        return os.path.abspath(path)
    folder, name = os.path.split(path.rstrip("/") or "/")
    if name in ("..", "."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(folder), name)


def _shown(path: str) -> str:
    """`path` as a terminal can show it: what is not UTF-8, and what would break the line, escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _all_bytes(stdin: Iterable[bytes | str] | None) -> bytes:
    if stdin is None:
        if sys.stdin is None:
            raise StartError("there is no standard input to read paths from", "name a folder, files or @list.txt")
        return sys.stdin.buffer.read()
    items = [os.fsencode(item) for item in stdin]
    # Items without their line end, as in a plain list of names, still are a line each.
    ended = [item if item.endswith((b"\n", b"\0")) else item + b"\n" for item in items[:-1]]
    return b"".join([*ended, *items[-1:]])


def _list_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        hint = f'a file of that very name is given as "./@{_shown(path)}"'
        raise StartError(f"the list {_shown(path)} cannot be read ({why})", _nearest_hint(path) or hint) from None


def _split(data: bytes) -> Iterator[bytes]:
    if b"\0" in data:
        return (name for name in data.split(b"\0") if name)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return (name for line in lines if (name := line.removesuffix(b"\r")).strip())


def _names_nothing(text: str) -> StartError:
    if not text:
        return StartError("an input is empty", "name a folder, files, a glob, @list.txt or -")
    if glob.has_magic(text):
        return StartError(f"no file matches the glob {_shown(text)}", _nearest_hint(text))
    return StartError(f"no such file or folder: {_shown(text)}", _nearest_hint(text))


def _nearest_hint(path: str) -> str:
    """What there is instead of `path`: the deepest folder of it that exists, and the names there that look alike."""
    try:
        parent, name = os.path.split(path.rstrip("/"))
        while parent and not os.path.exists(parent):
            parent, name = os.path.split(parent)
        if parent and not os.path.isdir(parent):
            return f"{_shown(parent)} is a file, not a folder"
        with os.scandir(parent or ".") as entries:
            names = [entry.name for entry in itertools.islice(entries, _MAX_COMPARED_NAMES)]
    except (OSError, ValueError):
        return ""
    close = [_shown(os.path.join(parent, other)) for other in nearest(name, names)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"nothing in {_shown(parent) if parent else 'the current folder'} has a name like {_shown(name)}"


def _nothing_found(texts: list[str], skipped: Counter[str], warnings: list[str]) -> StartError:
    shown = ", ".join(_shown(text) for text in texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")
    kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in skipped.most_common(5))
    what = f"skipped {skipped.total()} files that are no image ({kinds})" if skipped else "there are no files"
    hint = "; ".join([what, *warnings[:1]])
    return StartError(f"no image in {shown or 'no input at all'}", hint)
