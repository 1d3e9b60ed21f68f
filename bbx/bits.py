"""Whether a resumed `--deterministic` run gives the bits that the starts before it would have given.

What decides them: device, versions, layout, what is folded, fused and packed, the size of a batch, and on a CPU the
threads that a sum is cut up for. How many batches are computed at once does not: each is computed alone, on its
stream's threads.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bbx.errors import RunMismatchError
from bbx.plan import Plan, attempt
from bbx.store import FeatureFile

_OTHERWISE = "--mode overwrite begins anew; without --deterministic it goes on with other last bits"
# Of the recorded versions, those that have no part in a value.
_NO_PART = {"bbx", "python", "h5py"}


def same_bits(plan: Plan) -> tuple[str, ...]:
    """What a user should know of the rows that are there. Raises `RunMismatchError` where bits would be mixed."""
    target = plan.target
    if not plan.deterministic or target.state != "resume" or not target.done:
        return ()
    with FeatureFile(target.path, partial=not target.reopen) as file:
        starts = list(_that_did_rows(file.attempts))
    here = _deciding(attempt(plan))
    for start in starts:
        there = _deciding(start)
        for name in here:
            if start.get("deterministic") and there.get(name, here[name]) != here[name]:
                raise RunMismatchError(
                    f"{target.path} was begun with {name} {there[name]}, and {here[name]} here gives other last bits",
                    f"{_as_before(name, start)}; {_OTHERWISE}",
                )
    return tuple(_notes(starts))


def _that_did_rows(starts: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of a file's starts, those that did rows, or were killed before they could say."""
    before: int | None = 0
    for start in starts:
        after = start.get("done")
        if after is None or after != before:
            yield start
        before = after


def _deciding(start: Mapping[str, Any]) -> dict[str, object]:
    """What decides the bits, as far as the start recorded it, by the words for it."""
    found: dict[str, object] = {}
    if "device" in start:
        found["device"] = re.sub(r":\d+ ", " ", str(start["device"]))  # the second GPU computes as the first
    if "batch_size" in start:
        found["batch size"] = start["batch_size"]
    if "stream_threads" in start and str(start.get("device")).startswith("cpu"):
        found["threads per batch"] = start["stream_threads"]
    if "engine" in start:  # after the threads, by which what is folded and packed is chosen, too
        found["engine"] = str(start["engine"]).rpartition(", ")[0]  # without streams × threads
    versions = start.get("versions")
    if isinstance(versions, Mapping):
        found |= {str(name): version for name, version in versions.items() if name not in _NO_PART}
    return found


def _as_before(name: str, start: Mapping[str, Any]) -> str:
    """What to type so that it is as it was."""
    words = {
        "device": "--device names the one it had",
        "batch size": f"--batch-size {start.get('batch_size')}",
        "engine": f"--engine and --channels-last as at the start ({start.get('engine')})",
        "threads per batch": f"OMP_NUM_THREADS={start.get('threads')} before the same command",
    }
    return words.get(name) or f"pip install {name}=={start['versions'][name]}"


def _notes(starts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if any(not start.get("deterministic") for start in starts):
        yield "some of the rows that are there were made without --deterministic: their last bits may not come again"
    hosts = {str(start.get("host") or "") for start in starts} - {"", socket.gethostname()}
    if hosts:
        yield f"rows from {', '.join(sorted(hosts))} are there: bits are the same only on a processor of the same kind"
