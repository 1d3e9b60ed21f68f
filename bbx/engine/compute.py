"""Pixels to maps in the disk's dtype, on the host: one batch, on whatever device, within the memory that there is."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbx.backbone import Backbone, is_out_of_memory, normalise
from bbx.engine.settings import EngineSettings
from bbx.errors import StartError, UsageError
from bbx.spec import Dtype, Pool

_CUDA: Any = torch.cuda  # its streams and events have no types


@dataclass(frozen=True, slots=True)
class Work:
    """What is to become of every batch of `batch_size` images or fewer: pooled as `pool` says, in `dtype`."""

    dtype: Dtype
    pool: Pool
    batch_size: int


@dataclass
class Computed:
    """The maps of one batch, `(b, *stage.shape)` each, contiguous; on CUDA still on their way to the host.

    `counts`: per part of the batch and stage, how many values are not finite, and beyond float16, int64 `(2,)`.
    `seconds` are those of the device.
    """

    maps: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    counts: list[dict[str, Tensor]] = field(default_factory=list)
    _events: tuple[Any, Any] | None = None
    _alive: list[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        """Returns once the maps are there."""
        if self._events is not None:
            start, end = self._events
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1000
            self._events = None
            self._alive.clear()

    def add_counts(self, nonfinite: dict[str, int], overflow: dict[str, int]) -> None:
        """Adds, per stage, the values that were NaN or infinite as the network gave them, or too large for float16."""
        for part in self.counts:
            for name, two in part.items():
                for total, count in zip((nonfinite, overflow), two.tolist(), strict=True):
                    if count:
                        total[name] = total.get(name, 0) + count


class Allowance:
    """How many images at once the device's memory takes: halved by whichever stream finds it full, for all."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()

    def halve(self, count: int) -> bool:
        """`count` images were too many; whether this is news."""
        with self._lock:
            if count > self.most:
                return False  # another stream has halved it meanwhile
            self.most = -(-count // 2)
            return True


class Compute:
    """Runs batches through `backbone`; one object per thread."""

    def __init__(
        self, backbone: Backbone, device: torch.device, work: Work, allowance: Allowance, settings: EngineSettings
    ) -> None:
        self._backbone = backbone
        self._device = device
        self._work = work
        self._allowance = allowance
        self._settings = settings
        self._transfer = _Transfer(device) if device.type == "cuda" else None

    def maps(self, pixels: NDArray[Any], kept: NDArray[np.int64]) -> Computed:
        """The maps of the rows `kept` of `pixels` `(b, h, w, 3)`; where memory runs out, by fewer images at a time."""
        computed = Computed()
        started = time.perf_counter()
        parts: list[dict[str, Tensor]] = []
        done = 0
        while done < len(pixels):
            some = pixels[done : done + self._allowance.most]
            here = kept[(kept >= done) & (kept < done + len(some))] - done
            part = self._attempt(some, torch.from_numpy(here), computed)
            if part is None:
                self._halve(len(some), computed)
            else:
                parts.append(part)
                done += len(some)
        if parts[1:]:
            computed.wait()
        computed.maps = {n: torch.cat([part[n] for part in parts]) for n in parts[0]} if parts[1:] else parts[0]
        if computed._events is None:
            computed.seconds = time.perf_counter() - started
        return computed

    def _attempt(self, pixels: NDArray[Any], kept: Tensor, computed: Computed) -> dict[str, Tensor] | None:
        """None where the memory does not suffice; the error is gone by then, and with it what it kept alive."""
        counted = len(computed.counts)
        try:
            with self._without_gradients():
                return self._forward(pixels, kept, computed)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                if "deterministic" in str(error):
                    raise UsageError(f"{self._backbone.ref}: {error}", "leave --deterministic out") from None
                raise
        del computed.counts[counted:]  # the same images come again
        return None

    def _without_gradients(self) -> AbstractContextManager[Any]:
        # Tensors of inference mode cannot enter compiled code.
        return torch.no_grad() if self._settings.engine == "compile" else torch.inference_mode()

    def _halve(self, count: int, computed: Computed) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if count == 1:
            raise StartError(
                f"{self._device} has too little memory for one image of {self._backbone.ref}",
                "choose another --device, a smaller --size, or end what else uses its memory",
            )
        if torch.are_deterministic_algorithms_enabled():  # fewer images at once are other sums
            raise StartError(
                f"{self._device} is out of memory with {count} images at once, and fewer would give other last bits",
                f"--batch-size {-(-count // 2)}, with --mode overwrite where rows are there already; "
                "or leave --deterministic out",
            )
        if self._allowance.halve(count):
            now = self._allowance.most
            computed.notes.append(
                f"{self._device} is out of memory with {count} images at once: on with {now} (--batch-size)"
            )

    def _forward(self, pixels: NDArray[Any], kept: Tensor, computed: Computed) -> dict[str, Tensor]:
        host = torch.from_numpy(pixels)
        with self._transfer.computing() if self._transfer else nullcontext():
            given = self._transfer.taken(host, computed) if self._transfer else host.to(self._device)
            batch = normalise(given, self._backbone.preprocess)
            if self._settings.channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            computed.counts.append({})
            maps = {name: self._stored(name, one, kept, computed) for name, one in self._backbone(batch).items()}
            if self._transfer:
                return self._transfer.given(maps, computed)
        return {name: one.contiguous().cpu() for name, one in maps.items()} if self._device.type != "cpu" else maps

    def _stored(self, name: str, tensor: Tensor, kept: Tensor, computed: Computed) -> Tensor:
        """The kept rows as they go to disk, and their count of values that are not finite, or beyond float16."""
        made = tensor if len(kept) == len(tensor) else tensor[kept.to(tensor.device)]
        values = pooled(made.float(), self._work.pool)
        stored = values.half() if self._work.dtype == "float16" else values
        # One pass; a NaN or infinity anywhere reaches the sum. On a GPU asking would be waiting.
        if values.is_cuda or not values.sum().isfinite() or stored is not values:
            odd = values.numel() - values.isfinite().sum()
            lost = (stored.isinf() & ~values.isinf()).sum() if stored is not values else torch.zeros_like(odd)
            computed.counts[-1][name] = torch.stack((odd, lost))
        # On a CPU laid out here and now: what the network made would else live until it is written, amid the memory of
        # the next batch, which then needs new memory (2 % more of it after some hundred images).
        return stored if stored.is_cuda else stored.contiguous()


class _Transfer:
    """To a CUDA device and back on streams of their own, so that copies go on while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._compute, self._in, self._out = (_CUDA.Stream(device) for _ in range(3))
        # The weights may still be on their way there, or being laid out.
        self._compute.wait_stream(_CUDA.current_stream(device))
        self._device = device

    def computing(self) -> AbstractContextManager[Any]:
        """What runs inside is queued for the device's computing stream."""
        return torch.cuda.stream(self._compute)

    def taken(self, host: Tensor, computed: Computed) -> Tensor:
        """`host`, in pinned memory, on the device; the copy does not wait for the batch before to be computed."""
        start = _CUDA.Event(enable_timing=True)
        with torch.cuda.stream(self._in):
            given = host.to(self._device, non_blocking=True)
        self._compute.wait_stream(self._in)
        given.record_stream(self._compute)
        start.record(self._compute)
        computed._events = (computed._events[0] if computed._events else start, start)
        computed._alive.append(host)
        return given

    def given(self, maps: Mapping[str, Tensor], computed: Computed) -> dict[str, Tensor]:
        """`maps` on their way into pinned memory; `computed.wait` says when they are there."""
        assert computed._events is not None
        made = {name: one.contiguous() for name, one in maps.items()}
        computed_end = _CUDA.Event()
        computed_end.record(self._compute)
        end = _CUDA.Event(enable_timing=True)
        with torch.cuda.stream(self._out):
            self._out.wait_event(computed_end)
            found = {name: _to_pinned(one, self._out) for name, one in made.items()}
            computed.counts[-1] = {name: _to_pinned(one, self._out) for name, one in computed.counts[-1].items()}
            end.record(self._out)
        computed._events = (computed._events[0], end)
        return found


def _to_pinned(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    return host


def pooled(maps: Tensor, pool: Pool) -> Tensor:
    """`(b, c, h, w)` or tokens → `(b, c)` where `pool` says so."""
    if pool == "none" or maps.ndim == 2:
        return maps
    axes = (-2, -1) if maps.ndim == 4 else (1,)
    return maps.mean(axes) if pool == "avg" else maps.amax(axes)
