"""When is a result of a command told?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onelxc import executions, samples


def test_the_time_of_a_result_is_that_of_a_clock_that_nobody_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set back by a day, the wall clock kept results a day from being told."""
    monkeypatch.setattr(executions, "DIRECTORY", str(tmp_path))
    for vm_id, at in ((5, samples.now_s() - 1), (6, samples.now_s() + 1000)):
        path = tmp_path / f"{vm_id}.done"
        path.write_text("{}")
        os.utime(path, (at, at))
    assert executions.pending() == [(5, str(tmp_path / "5.done"))]
