"""Run a backbone as fast as this machine can: what the loop needs of it, and nothing of files or images."""

from bbx.engine.compute import Computed, Work, pooled
from bbx.engine.memory import kept_memory
from bbx.engine.probe import Growth, Tried, forward_rate, grow, noise
from bbx.engine.settings import EngineSettings, choose, usual_batch
from bbx.engine.streams import Streams
from bbx.engine.switches import deterministic, usual_threads

__all__ = [
    "Computed",
    "EngineSettings",
    "Growth",
    "Streams",
    "Tried",
    "Work",
    "choose",
    "deterministic",
    "forward_rate",
    "grow",
    "kept_memory",
    "noise",
    "pooled",
    "usual_batch",
    "usual_threads",
]
