"""Linters, run as tests, so that one command and one summary line tell all."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile

import pytest

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LINTERS = os.environ.get("ONELXC_LINTERS") or os.path.expanduser("~/.cache/onelxc/linters/bin")


def tracked() -> list[str]:
    """Every file of the repository as it lies here: committed, or new and not ignored."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    names = listed.stdout.decode().split("\0")
    return sorted(name for name in names if name and os.path.isfile(os.path.join(REPOSITORY, name)))


def first_line(name: str) -> str:
    with open(os.path.join(REPOSITORY, name), "rb") as file:
        return file.readline(200).decode(errors="replace")


def python_files() -> list[str]:
    return [name for name in tracked() if name.endswith(".py") or "python3" in _interpreter(name)]


def _interpreter(name: str) -> str:
    line = first_line(name)
    return line if line.startswith("#!") else ""


def shell_files() -> list[str]:
    return [name for name in tracked() if name.endswith(".sh") or _interpreter(name).rstrip().endswith(("bash", "/sh"))]


def check(*argv: str) -> None:
    if not shutil.which(argv[0]):
        pytest.fail(f"{argv[0]} is not there: tests/run installs it, and says why if it cannot", pytrace=False)
    done = subprocess.run(argv, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if done.returncode != 0:
        pytest.fail(f"{' '.join(argv[:3])}\n{done.stdout}", pytrace=False)


def test_ruff_check() -> None:
    check(f"{LINTERS}/ruff", "check", "--quiet", "--no-cache", *python_files())


def test_ruff_format() -> None:
    check(f"{LINTERS}/ruff", "format", "--check", "--quiet", "--no-cache", "--diff", *python_files())


def test_mypy_package() -> None:
    check(f"{LINTERS}/mypy", "--strict", "onelxc")


def test_mypy_executables() -> None:
    """Executables have no suffix, and names that come twice or are the package's: so checked under their paths."""
    names = [name for name in python_files() if name.startswith(("remotes/", "libexec/"))]
    assert names, "no executables found"
    with tempfile.TemporaryDirectory() as directory:
        copies = [os.path.join(directory, re.sub(r"\W", "_", name) + ".py") for name in names]
        for name, copy in zip(names, copies):
            shutil.copyfile(os.path.join(REPOSITORY, name), copy)
        check(f"{LINTERS}/mypy", "--strict", "--cache-dir=.mypy_cache/executables", *copies)


def test_shellcheck() -> None:
    assert shutil.which("shellcheck"), "shellcheck is not installed"
    check("shellcheck", "--external-sources", "--severity=warning", *shell_files())
