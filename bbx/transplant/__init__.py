"""One network's weights under the names of another library: what makes two libraries' feature maps comparable.

It works on state dicts alone, by the tables beside it; a way between two libraries leads over the family's hub. Axes of
length 1 carry nothing: a 1×1 convolution fits a linear layer, `(c, 1, 1)` fits `(c,)`. No name is passed over: what is
not left out by the table must find its place, on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bbx.errors import UsageError, WeightsError, nearest
from bbx.transplant.tables import FAMILIES, Family, Rows

__all__ = ["FAMILIES", "transplant"]

# A transformers model behind its head, or inside a backbone class.
_PREFIX = re.compile(r"(swin|swinv2|resnet|convnext|vit|dinov2)\.")
_SLOT = re.compile(r"(\{[^}]*\}|#|\*)")
_THIRDS = re.compile(r"<(.*?)\|(.*?)\|(.*?)>")


def transplant(
    state: Mapping[str, Tensor], family: str, source: str, target: str, *, into: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights `state` of a `source` network as those of a `target` network, whose own state dict is `into`.

    Complete, so that it loads with `strict=True`: what the family's table leaves out (heads, derived buffers) is
    `into`'s. The libraries are `torchvision`, `timm`, `transformers`, and for Swin `maskformer`: MaskFormer's own one,
    which exchanges with transformers' backbone class alone, the norms of all four stages included.

    Raises `WeightsError` listing every name without a place, in `state` for want of a rule, in `into` for want of
    weights; `UsageError` for a family or a library that there is no table for.
    """
    table = _table(family, source, target)
    hub, lost = _to_hub(_backbone(state, table, source), table, source)
    named, astray = _from_hub(hub, table, target)
    own = {_bare(name, target): name for name in into}
    room = _backbone(into, table, target)
    for name in _final_norm(table, target):
        if name not in named or name not in room:
            named.pop(name, None)
            room.pop(name, None)
    faults = {
        f"of {source} without a place": [*lost, *astray, *(name for name in named if name not in room)],
        f"of {target} left unfilled": [own[name] for name in room if name not in named],
        "of another shape": [
            f"{own[name]} {tuple(room[name].shape)} from {tuple(value.shape)}"
            for name, value in named.items()
            if name in room and _wide(value) != _wide(room[name])
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise WeightsError(
            f"weights of {source} do not fit {target} by the table of {family}: {text}",
            "are both the same architecture, of the same size?",
        )
    return dict(into) | {own[name]: value.reshape(room[name].shape) for name, value in named.items()}


def _table(family: str, source: str, target: str) -> Family:
    if family == "swin" and "maskformer" in (source, target):
        family = "maskformer-swin"
    if family not in FAMILIES:
        close = nearest(family, FAMILIES) or FAMILIES
        raise UsageError(f"no transplant for the family {family!r}", f"nearest: {', '.join(close)}")
    table = FAMILIES[family]
    for library in (source, target):
        if library not in table.left_out:
            raise UsageError(f"no transplant of {family} for {library!r}", f"there are: {', '.join(table.left_out)}")
    return table


def _backbone(state: Mapping[str, Tensor], table: Family, library: str) -> dict[str, Tensor]:
    """`state` without what the table leaves out, nor the prefix of a transformers model inside another."""
    bare = {_bare(name, library): value for name, value in state.items()}
    left_out = [_Name(pattern) for pattern in table.left_out[library]]
    return {name: value for name, value in bare.items() if not any(pattern.fits(name) for pattern in left_out)}


def _final_norm(table: Family, library: str) -> list[str]:
    names = [f"{table.final_norm}.weight", f"{table.final_norm}.bias"] if table.final_norm else []
    return list(_from_hub(dict.fromkeys(names, torch.empty(0)), table, library)[0])


def _bare(name: str, library: str) -> str:
    return _PREFIX.sub("", name, count=1) if library == "transformers" else name


def _wide(value: Tensor) -> list[int]:
    return [length for length in value.shape if length != 1]


class _Name:
    """One side of a row: a name's prefix with slots."""

    def __init__(self, pattern: str) -> None:
        words = _SLOT.split(pattern)
        self.literals = words[::2]
        self.slots = [_choices(slot) for slot in words[1::2]]
        text = [re.escape(word) if place % 2 == 0 else _expression(word) for place, word in enumerate(words)]
        self._expression = re.compile("".join(text) + r"((?:\..*)?)")

    def fits(self, name: str) -> bool:
        return self._expression.fullmatch(name) is not None

    def renamed(self, name: str, other: _Name) -> str | None:
        """`name` with its slots and its rest in the `other` pattern, None when it does not fit this one."""
        match = self._expression.fullmatch(name)
        if match is None:
            return None
        *values, rest = match.groups()
        text = other.literals[0]
        for value, mine, theirs, literal in zip(values, self.slots, other.slots, other.literals[1:], strict=True):
            text += (theirs[mine.index(value)] if mine else value) + literal
        return text + str(rest)


def _choices(slot: str) -> list[str]:
    """`{a,b,0..2}` → a, b, 0, 1, 2; nothing for a slot that carries any value over."""
    found: list[str] = []
    for word in slot[1:-1].split(",") if slot.startswith("{") else []:
        first, dots, last = word.partition("..")
        found += [str(number) for number in range(int(first), int(last) + 1)] if dots else [word]
    return found


def _expression(slot: str) -> str:
    anything = {"#": r"(\d+)", "*": r"([^.]+)"}
    return anything.get(slot) or "(" + "|".join(map(re.escape, _choices(slot))) + ")"


@dataclass(frozen=True, slots=True)
class _Row:
    """A hub's pattern and the other library's: one, or three for its thirds, None where that third is zeros."""

    hub: _Name
    parts: tuple[_Name | None, ...]


@cache
def _rows(table: Rows) -> tuple[_Row, ...]:
    rows = []
    for hub, other in table:
        thirds = _THIRDS.search(other)
        words = thirds.groups() if thirds else ()
        parts = [_Name(_THIRDS.sub(word, other)) if word else None for word in words] or [_Name(other)]
        rows.append(_Row(_Name(hub), tuple(parts)))
    return tuple(rows)


def _to_hub(state: Mapping[str, Tensor], table: Family, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """`state` under the hub's names, and the names that no row fits."""
    if source == table.hub:
        return dict(state), []
    found: dict[str, tuple[_Row, dict[int, Tensor]]] = {}
    lost = []
    for name, value in state.items():
        fit = _in_hub(name, _rows(table.rows[source]))
        if fit is None:
            lost.append(name)
        else:
            row, third, hub_name = fit
            found.setdefault(hub_name, (row, {}))[1][third] = value
    # Where one of the thirds is missing, the whole is: the target then shows as unfilled.
    whole = {name: _joined(row, values) for name, (row, values) in found.items()}
    return {name: value for name, value in whole.items() if value is not None}, lost


def _in_hub(name: str, rows: Iterable[_Row]) -> tuple[_Row, int, str] | None:
    for row in rows:
        for third, part in enumerate(row.parts):
            if part and (hub_name := part.renamed(name, row.hub)) is not None:
                return row, third, hub_name
    return None


def _joined(row: _Row, values: Mapping[int, Tensor]) -> Tensor | None:
    if any(part and third not in values for third, part in enumerate(row.parts)):
        return None
    like = next(iter(values.values()))
    parts = [values.get(third, torch.zeros_like(like)) for third in range(len(row.parts))]
    return torch.cat(parts) if len(parts) > 1 else like


def _from_hub(hub: Mapping[str, Tensor], table: Family, target: str) -> tuple[dict[str, Tensor], list[str]]:
    """`hub`'s tensors under the names of `target`, and the names that no row fits."""
    if target == table.hub:
        return dict(hub), []
    named: dict[str, Tensor] = {}
    astray = []
    for name, value in hub.items():
        row = next((row for row in _rows(table.rows[target]) if row.hub.fits(name)), None)
        if row is None:
            astray.append(name)
            continue
        for part, third in zip(row.parts, value.chunk(len(row.parts)) if len(row.parts) > 1 else [value], strict=True):
            if part and (other := row.hub.renamed(name, part)) is not None:
                named[other] = third
    return named, astray
