"""A picture that the device's decoder skipped, or left half done, is told by what lay in its memory before.

torchvision gives nvJPEG memory as it finds it, often an earlier picture's, and asks for one status per batch. So that
memory is marked before: torch's allocator gives the same blocks again to whoever asks for the same sizes next on the
same stream, and where it does not, that shows in their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEADY = ("cuda",)
"""Devices whose memory is marked, since the same blocks come again; the CPU's decoder tells what it cannot decode."""
# A row of it climbs in leaps that no decoded picture takes, and eight columns hold eight values.
_LEAP, _FIRST, _COLUMNS = 97, 31, 8
# Blocks that were free already are found again at the first try, new ones at the second, or after.
_TRIES = 5


class Moved(RuntimeError):
    """Memory was marked, and the decoder was given other memory."""


def mark(shapes: Sequence[tuple[int, int, int]], device: torch.device) -> list[int]:
    """Marks the memory that pictures of these shapes, `(3, h, w)`, are given next; its addresses."""
    if device.type not in STEADY:
        return []
    addresses: list[int] = []
    blocks: list[Tensor] = []
    for _ in range(_TRIES):
        blocks.clear()  # else the next ones would lie elsewhere
        # All of them before anything else, as the decoder does it: what is free is the same then.
        blocks += [torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes]
        before, addresses = addresses, [block.data_ptr() for block in blocks]
        if addresses == before:
            break
    row = marks(max(shape[2] for shape in shapes), device)
    for block in blocks:
        block.copy_(row[: block.shape[2]])
    if device.type == "cuda":  # The decoder works on a stream of its own, which waits for nobody.
        torch.cuda.current_stream(device).synchronize()
    return addresses


def check_marked(pictures: Sequence[Tensor], addresses: Sequence[int]) -> None:
    """Raises `Moved` unless `pictures` lie where `mark` was, so that `untouched` can tell."""
    if pictures[0].device.type in STEADY and [picture.data_ptr() for picture in pictures] != list(addresses):
        raise Moved


def untouched(pictures: Sequence[Tensor]) -> list[bool]:
    """Of each picture, `(3, h, w)`, whether eight pixels of a row, which begin at a multiple of eight, are as marked.

    A decoder writes blocks of 8 x 8 and more, so this finds the first one that is missing.
    """
    row = marks(max(picture.shape[2] for picture in pictures), pictures[0].device)
    found = []
    for picture in pictures:
        whole = picture.shape[2] // _COLUMNS * _COLUMNS
        same = (picture == row[: picture.shape[2]])[..., :whole]
        found.append(same.reshape(3, picture.shape[1], -1, _COLUMNS).all(3).any())
    return [bool(one) for one in torch.stack(found).tolist()]  # one copy, one wait


def marks(width: int, device: torch.device) -> Tensor:
    """A row of it, `(w,)`; each row is the same."""
    return ((torch.arange(width, device=device) * _LEAP + _FIRST) % 256).to(torch.uint8)
