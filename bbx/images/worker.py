"""The other end of `decoders`: a process that decodes one image after the other, and may die of any of them.

It speaks over pipes: a line of JSON with the settings, then a path per line, as JSON; for each a line of JSON comes
back, followed by the pixels where there are some. It ends when its standard input does, however its parent ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from bbx.images.read import Decoded, decode
from bbx.spec import InputFile, Preprocess

_MOST_NBYTES_PER_PIXEL = 16
_ROOM_NBYTES = 1 << 29
# Of memory that images needed, kept for the next: to give pages back cost 15 of 70 ms where some are of 12 megapixels.
_KEPT_NBYTES = 1 << 27


def main() -> None:
    """Serves until standard input ends."""
    # A terminal's Ctrl-C and a batch system's SIGTERM go to every process of the job: the parent decides.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    _die_with_parent()
    _keep_memory()
    requests, answers = sys.stdin.buffer, _private_stdout()
    line = requests.readline()
    if not line:  # the parent is gone, or had nothing to decode
        return
    settings = json.loads(line)
    preprocess = Preprocess(**{name: _tuple(value) for name, value in settings["preprocess"].items()})
    max_pixels, digest = int(settings["max_pixels"]), bool(settings["digest"])
    Image.MAX_IMAGE_PIXELS = max(1, -(-max_pixels // 2))  # Pillow's error comes at twice this; `decode` is exact
    if not preprocess.processor:  # torch, which some processors need, takes address space as it likes
        _limit_memory(max_pixels)
    _send(answers, {"ready": True})
    _quiet_stderr()
    while line := requests.readline():
        started = time.perf_counter()
        decoded = _decoded(json.loads(line), preprocess, max_pixels, digest=digest)
        nbytes, mtime_ns, digested = decoded.file
        head = {"reason": decoded.reason, "file": [nbytes, mtime_ns, digested.hex()]}
        _send(answers, {**head, "seconds": time.perf_counter() - started}, decoded.pixels)


def _decoded(path: str, preprocess: Preprocess, max_pixels: int, *, digest: bool) -> Decoded:
    try:
        return decode(path, preprocess, max_pixels=max_pixels, digest=digest)
    except BaseException as error:  # A plugin that calls exit() costs its image, too.
        return Decoded(None, f"decoding raised {type(error).__name__}", InputFile())


def _send(answers: BinaryIO, head: dict[str, Any], pixels: np.ndarray[Any, Any] | None = None) -> None:
    answers.write(json.dumps(head).encode() + b"\n")
    if pixels is not None:
        answers.write(np.ascontiguousarray(pixels).data)
    answers.flush()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _private_stdout() -> BinaryIO:
    """The pipe to the parent, out of reach of whatever a library prints."""
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return private


def _quiet_stderr() -> None:
    """libtiff and others print what is wrong with a file; the row's reason says it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _limit_memory(max_pixels: int) -> None:
    """What the largest image may take, and no more: decoders of WebP were seen to need 15 bytes per pixel."""
    if sys.platform.startswith("linux"):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + _MOST_NBYTES_PER_PIXEL * max_pixels + _ROOM_NBYTES
        room = min(room, 1 << 62)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (room if hard < 0 else min(room, hard), hard))


def _die_with_parent() -> None:
    """On Linux: should the parent be killed while a decoder hangs, nobody else would end it."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _keep_memory() -> None:
    """On Linux: glibc gives a picture's pages back to the kernel, which clears them anew for the next one."""
    if sys.platform.startswith("linux"):
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(trim_threshold, _KEPT_NBYTES)
            libc.mallopt(mmap_threshold, 1 << 25)  # Pillow's blocks are of 1 << 24
