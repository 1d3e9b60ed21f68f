"""Stages by name and by index: `select_stages` and `align_stages` are the only place where the two meet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from bbx.errors import UsageError, nearest

# Holds index 0 in a network without a stem, so that index N is stageN everywhere; no name that a user can type.
_NO_STEM = ""
_STAGE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_TAKEN_NAMES = frozenset({"image", "path", "status", "checksum", "provenance", "plot", ".", ".."})


def storable_name(name: str) -> str:
    """`name` as a feature file can hold it: names that would clash with the file's own datasets get `.out` appended.

    Raises `UsageError` where a character can be in no dataset name. Source of the rule: the file format's "Layout".
    """
    if not _STAGE_NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a stage", "letters, digits, '_', '.' and '-' only")
    clashes = name in _TAKEN_NAMES or name.endswith(("_channel", "_y", "_x", "_token", "_feature"))
    return f"{name}.out" if clashes else name


def select_stages(available: Sequence[str], wanted: str | Iterable[str | int] | None = None) -> tuple[str, ...]:
    """The stages `wanted` of `available`, in network order: the one place where names and indices meet.

    `wanted` is a comma-separated text or a sequence of names, indices, negative indices and ranges (`stem..stage2`,
    `0-2`, `1..-1`), or `all`; None means the last stage. Any order, repeats allowed.

    Index N is stageN: where a network has no stem, index 0 is nobody's. Raises `UsageError` naming the valid stages
    and the nearest match.
    """
    if wanted is None:
        return (available[-1],)
    if available[0] == "stage1":
        available = (_NO_STEM, *available)
    words = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    words = [word.strip() if isinstance(word, str) else word for word in words]
    chosen: set[int] = set()
    for word in words:
        chosen.update(_positions(available, word))
    if not chosen:
        raise UsageError("no stage was asked for", f"valid stages: {_numbered(available)}")
    return tuple(available[position] for position in sorted(chosen))


def align_stages(
    available: Sequence[str], out_features: Sequence[str] | None = None, out_indices: Sequence[int] | None = None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The stages asked for by name, by index, or by both at once, as `(names, indices)`, indices not negative.

    transformers' rules (`BackboneConfigMixin`), made strict: both given must be the same stages; no duplicates, in
    network order, at least one; names are a list or tuple of str, indices one of int. Neither means the last stage.
    Raises `UsageError`, a `ValueError`, with the valid stages.
    """
    slots = (_NO_STEM, *available) if available[0] == "stage1" else tuple(available)
    valid = f"valid stages: {_numbered(slots)}"
    if out_features is None and out_indices is None:
        return (slots[-1],), (len(slots) - 1,)
    named = None if out_features is None else _checked_list("out_features", out_features, str, "['stage1']", valid)
    numbered = None if out_indices is None else _checked_list("out_indices", out_indices, int, "[1]", valid)
    places = None if named is None else [_position_of_name(slots, name) for name in named]
    indices = None if numbered is None else [_position(slots, index) for index in numbered]
    for option, given, found in (("out_features", named, places), ("out_indices", numbered, indices)):
        if found is None:
            continue
        if len(set(found)) < len(found):
            raise UsageError(f"{option} {given} asks for a stage twice", valid)
        if found != sorted(found):
            ordered = [word for _, word in sorted(zip(found, given or (), strict=True))]
            raise UsageError(f"{option} {given} is not in the network's order", f"type {ordered}; {valid}")
    if places is not None and indices is not None and places != indices:
        raise UsageError(f"out_features {named} and out_indices {numbered} are not the same stages", valid)
    chosen = places if places is not None else indices or []
    return tuple(slots[place] for place in chosen), tuple(chosen)


def _checked_list(option: str, given: object, kind: type, example: str, valid: str) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        raise UsageError(f"{option} is {given!r}, not a list", f"type {option}={example}; {valid}")
    for word in given:
        if not isinstance(word, kind) or isinstance(word, bool):
            raise UsageError(f"{option} holds {word!r}, which is no {kind.__name__}", valid)
    if not given:
        raise UsageError(f"{option} is empty: no stage was asked for", valid)
    return list(given)


def _position_of_name(slots: Sequence[str], name: str) -> int:
    if name in slots and name != _NO_STEM:
        return slots.index(name)
    if name == "stem":
        raise UsageError("this network has no stem", f"valid stages: {_numbered(slots)}")
    close = nearest(name, slots, 1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"out_features has no stage {name!r}", f"{meant}valid stages: {_numbered(slots)}")


def _positions(available: Sequence[str], word: str | int) -> Iterable[int]:
    if word == "":
        return ()
    if word == "all":
        return range(available[0] == _NO_STEM, len(available))
    if isinstance(word, int) or word in available:
        return (_position(available, word),)
    if match := re.fullmatch(r"(.+?)\.\.(.+)|(\d+)-(\d+)", word):
        first, last = (_position(available, end) for end in match.groups() if end is not None)
        if first > last:
            raise UsageError(f"the range {word!r} runs backwards", f"type {match.expand(_swapped(match))}")
        return range(first, last + 1)
    return (_position(available, word),)


def _swapped(match: re.Match[str]) -> str:
    return r"\2..\1" if match[1] is not None else r"\4-\3"


def _position(available: Sequence[str], word: str | int) -> int:
    if isinstance(word, str) and word.lower() == "stem" and available[0] == _NO_STEM:
        raise UsageError("this network has no stem", f"valid stages: {_numbered(available)}")
    if isinstance(word, str):
        folded = [name.lower() for name in available]
        if word.lower() in folded:
            return folded.index(word.lower())
        if not re.fullmatch(r"-?\d+", word):
            close = nearest(word, available, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"no stage {word!r}", f"{meant}valid stages: {_numbered(available)}")
    index = int(word)
    if isinstance(word, bool) or not -len(available) <= index < len(available):
        raise UsageError(f"no stage with index {word}", f"valid stages: {_numbered(available)}")
    if available[index] == _NO_STEM:
        raise UsageError("this network has no stem (index 0)", f"valid stages: {_numbered(available)}")
    return index % len(available)


def _numbered(available: Sequence[str]) -> str:
    return ", ".join(f"{name} ({index})" for index, name in enumerate(available) if name != _NO_STEM)
