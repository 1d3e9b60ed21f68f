"""Several batches at once: each stream is a thread with modules of its own around the same weights.

On a CPU, as many batches as there are threads keep every core at its own work; one batch on all threads would have
them wait for each other after every layer, and for the decoders that need a core now and then.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bbx.backbone import Backbone
from bbx.engine.compute import Allowance, Compute, Computed, Work
from bbx.engine.prepare import prepared
from bbx.engine.replica import replica
from bbx.engine.settings import EngineSettings
from bbx.engine.switches import own_threads


class Streams:
    """Computes batches in the order given, as a context manager; `depth` of them keep all streams busy."""

    def __init__(self, backbone: Backbone, device: torch.device, work: Work, settings: EngineSettings) -> None:
        self.depth = settings.streams + 1
        self._settings = settings
        self._allowance = Allowance(work.batch_size)
        self._numbers = own_threads()
        ready = prepared(backbone, settings)
        copies = [ready, *(replica(ready) for _ in range(settings.streams - 1))]
        self._idle = [Compute(one, device, work, self._allowance, settings) for one in copies]
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(settings.streams, "bbx-compute", initializer=self._start)

    def _start(self) -> None:
        torch.set_num_threads(self._settings.threads)
        self._own.compute = self._idle.pop()

    def submit(self, pixels: NDArray[Any], kept: NDArray[np.int64]) -> Future[Computed]:
        """The maps of the rows `kept` of `pixels` `(b, h, w, 3)`. The result raises as `Compute.maps` does."""
        return self._pool.submit(self._maps, pixels, kept)

    def _maps(self, pixels: NDArray[Any], kept: NDArray[np.int64]) -> Computed:
        compute: Compute = self._own.compute
        return compute.maps(pixels, kept)

    def __enter__(self) -> Self:
        self._numbers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._numbers.__exit__(kind, error, trace)
