"""Measurements, as ratios within one run; never tests. `python -m tests.benchmarks`."""
