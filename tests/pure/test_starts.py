"""The mark that the guard leaves at each start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onelxc.root import starts


def test_two_who_find_a_start_guarded_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An action, and the status probe, which takes no lock: neither is in the other's way."""
    monkeypatch.setattr(starts, "DIRECTORY", str(tmp_path))
    (tmp_path / "7").write_text("0.0")  # just after the boot, before this process
    controller, rename = os.getpid(), os.rename

    def another_comes_first(source: str, target: str) -> None:
        with monkeypatch.context() as other:
            other.setattr(os, "rename", rename)
            other.setattr(os, "getpid", lambda: controller + 1)
            assert starts.is_guarded(7, controller)
        rename(source, target)

    monkeypatch.setattr(os, "rename", another_comes_first)
    assert starts.is_guarded(7, controller)
    assert starts.is_guarded(7, controller)
    starts.forget(7)
    assert not list(tmp_path.iterdir())
