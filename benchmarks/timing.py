"""Seconds that some work takes, for the benchmarks."""

import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Seconds of one call, the mean of `times` calls."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def median_seconds(work: Callable[[], object]) -> float:
    """Median seconds of 7 calls, after one that warms up."""
    work()
    return statistics.median(seconds(work) for _ in range(7))
