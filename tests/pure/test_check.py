"""onelxc.root.check: what it makes of a host that is described to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from onelxc.root import check

V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"
BESIDE = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"


# Idmapped mounts came with Linux 5.12, those of btrfs with 5.15.
@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("5.10.0-28-amd64", "cannot: kernel 5.10.0-28-amd64 has no idmapped mounts"),
        ("4.19.0", "cannot: kernel 4.19.0 has no idmapped mounts"),
        ("5.12", "limited: kernel 5.12 cannot map ids on btrfs"),
        ("5.15.0-91-generic", ""),
        ("6.1.0-18-amd64", ""),
        ("10.0", ""),
    ],
)
def test_kernel(release: str, said: str) -> None:
    found = [str(problem) for problem in check.kernel(release)]
    assert [text[: len(said)] for text in found] == ([said] if said else [])


# libvirt starts containers on pure v2 under systemd, and on v1 without it when no v2 mount holds a controller.
@pytest.mark.parametrize(
    ("mounts", "owned", "systemd", "said"),
    [
        (V2, {"/sys/fs/cgroup": "cpu memory"}, True, ""),
        (V2, {"/sys/fs/cgroup": "cpu memory"}, False, ""),
        (V1, {}, False, ""),
        (V1 + BESIDE, {"/sys/fs/cgroup/unified": ""}, False, ""),
        (
            V1 + BESIDE,
            {"/sys/fs/cgroup/unified": "hugetlb\n"},
            False,
            "/sys/fs/cgroup/unified holds v2 controllers (hugetlb)",
        ),
        (V1, {}, True, "control groups v1 (or hybrid) under systemd"),
        (V1 + BESIDE, {"/sys/fs/cgroup/unified": ""}, True, "control groups v1 (or hybrid) under systemd"),
        ("proc /proc proc rw 0 0\n", {}, True, "no control groups are mounted"),
    ],
)
def test_cgroups(mounts: str, owned: dict[str, str], systemd: bool, said: str) -> None:
    found = list(check.cgroups(mounts, owned, systemd))
    assert all(problem.fatal for problem in found)
    assert [problem.text[: len(said)] for problem in found] == ([said] if said else [])


# No helper on the host: told with what to run.
def test_helper_missing(tmp_path: Path) -> None:
    (found,) = check.helper(str(tmp_path / "onelxc-root"))
    assert str(found) == f"cannot: the root helper {tmp_path}/onelxc-root is missing: run `install.sh node` as root"


# A helper that somebody else could change is worse than none.
def test_helper_in_other_hands(tmp_path: Path) -> None:
    helper = tmp_path / "onelxc-root"
    helper.write_text("")
    helper.chmod(0o777)
    texts = [problem.text for problem in check.helper(str(helper))]
    assert f"{helper} can be changed by others than root: chown root:root and chmod go-w" in texts
    assert any(text.startswith("the root helper is of another version") for text in texts)
