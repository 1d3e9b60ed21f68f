"""Measure a model on the user's own machine: each part of an extraction alone, then all of it together."""

from bbx.bench.measure import bench
from bbx.bench.result import Bench

__all__ = ["Bench", "bench"]
