"""What a benchmark found, as plain facts."""

from __future__ import annotations

from dataclasses import dataclass

from bbx.engine import EngineSettings, Tried
from bbx.plan import Rates
from bbx.spec import Dtype, Engine, Precision


@dataclass(frozen=True, slots=True)
class Bench:
    """What `bench` measured; rates in images/s.

    `rates` are the limits of an extraction: decoding, the forward as it would run, bbx's own store. `plain` is the
    forward of the library's network in one stream, `whole` that of all stages up to the last, `compiled` that of
    compiled code, where it was asked for. `batches` is the forward by batch size, and `batches_why` why there are no
    more of them. `store_nbytes` and `raw_nbytes` are bytes/s of bbx's store and of plain writing. `decode_gpu` is None
    where no device could. `end_to_end` is the steady rate of a real extraction of `end_rows` images. `command` runs
    what is best.
    """

    model: str
    weights: str
    stages: tuple[str, ...]
    device: str
    precision: Precision
    dtype: Dtype
    images: int
    made: bool
    batch_size: int
    workers: int
    engine: EngineSettings
    rates: Rates
    decode_fast: float
    decode_gpu: float | None
    plain: float
    compiled: float | None
    whole: float
    batches: tuple[Tried, ...]
    batches_why: str
    store_nbytes: float
    raw_nbytes: float
    end_to_end: float
    end_rows: int
    best_engine: Engine
    best_batch_size: int
    command: str
    notes: tuple[str, ...] = ()

    @property
    def early_exit(self) -> float:
        """The time of the stages asked for ÷ that of the whole network."""
        return self.whole / self.rates.compute

    @property
    def store_share(self) -> float:
        """The speed of bbx's store ÷ that of plain writing."""
        return self.store_nbytes / self.raw_nbytes

    @property
    def share(self) -> float:
        """What comes out in the end ÷ the least of the limits."""
        return self.end_to_end / self.rates.least

    @property
    def expected_share(self) -> float:
        """As `share`, of what the limits allow together where they share cores."""
        return self.end_to_end / self.rates.expected
