"""Readings that outlive their process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onelxc import samples
from onelxc.samples import Counters


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(samples, "DIRECTORY", str(tmp_path))
    return tmp_path


def read(at_s: float, value: int, key: str = "one-5/77") -> tuple[int, float] | None:
    counters = Counters("test", at_s)
    found = counters.add(key, value)
    counters.keep()
    return found


def test_the_difference_to_the_last_time() -> None:
    assert read(100.0, 1000) is None
    assert read(110.0, 1500) == (500, 10.0)
    assert read(120.0, 1500) == (0, 10.0)


def test_a_reading_just_taken_stays() -> None:
    read(100.0, 1000)
    assert read(100.5, 1100) == (100, 0.5)
    assert read(102.0, 1200) == (200, 2.0)


def test_nothing_to_compare() -> None:
    read(100.0, 1000)
    assert read(110.0, 500) is None, "a counter that began anew"
    assert read(120.0, 600, key="one-5/88") is None, "another run of the container"
    assert read(100.0, 700, key="one-5/88") is None, "a clock that went back"


def test_a_reading_from_before_the_last_boot_is_none(directory: Path) -> None:
    read(100.0, 1000)
    kept = (directory / "test").read_text()
    (directory / "test").write_text(kept.replace('"boot": "', '"boot": "x'))
    assert read(110.0, 1500) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"values": 3}', "\xff"])
def test_a_spoiled_file_is_as_none(directory: Path, text: str) -> None:
    (directory / "test").write_text(text, encoding="latin-1")
    assert read(100.0, 1000) is None
    assert read(110.0, 1500) == (500, 10.0)


def test_no_link_is_followed(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "precious"
    other.write_text("precious")
    (directory / "test").symlink_to(other)
    read(100.0, 1000)
    assert other.read_text() == "precious"
    assert read(110.0, 1500) == (500, 10.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_not_used(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(directory, 65534, 65534)
    assert samples.directory() == "/var/tmp/onelxc-0"
    os.rmdir("/var/tmp/onelxc-0")
