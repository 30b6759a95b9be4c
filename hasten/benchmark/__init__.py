"""The benchmark: a plan beside the original, on this machine."""

from hasten.benchmark.driver import BenchResult, bench

__all__ = ["BenchResult", "bench"]
