"""The node tier: root, a real libvirt with LXC, real mounts; a leak check after every test."""

from __future__ import annotations

import os

import pytest

# a host of cgroup version 2 has no such hierarchy
collect_ignore = ["test_cgroups_named.py"] if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else []


@pytest.fixture(autouse=True)
def nothing_left(clean: None) -> None:
    """Every test of this tier is compared with what was on the host before it."""
