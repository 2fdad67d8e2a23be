"""How is one thing compared with another? In turns, so that the machine's mood hits both, and by their medians."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

Work = Callable[[], object]


def timed(work: Work) -> float:
    """Seconds that `work` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class Table:
    """Rows as they are measured: what, ours, the other, and the ratio."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        load = os.getloadavg()[0]
        print(f"{os.cpu_count()} processors, load {load:.1f}, kernel {os.uname().release}; medians in milliseconds")
        print(f"\n{'':44}{'ours':>10}{'bare':>10}{'ratio':>8}   bare is")

    def heading(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def compare(
        self, what: str, ours: Work, other_name: str, other: Work, *, rounds: int = 7, between: Work | None = None
    ) -> tuple[float, float]:
        """`between` is done, unmeasured, after each; both are done once before anything counts if there are rounds
        enough.
        """
        results: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + (rounds >= 5)):
            for work, result in zip((ours, other), results):
                taken = timed(work)
                if between:
                    between()
                if number or rounds < 5:
                    result.append(taken)
        first, second = (statistics.median(result) for result in results)
        self.row(what, first, other_name, second)
        return first, second

    def row(self, what: str, ours_s: float, other_name: str, other_s: float) -> None:
        ratio = ours_s / other_s
        print(f"  {what:42}{ours_s * 1000:10.1f}{other_s * 1000:10.1f}{ratio:8.2f}   {other_name}", flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def end(self) -> None:
        print(f"\nmeasured in {time.monotonic() - self.begun:.0f} s")
