"""The node tier: root, a real libvirt with LXC, real mounts; a leak check after every test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nothing_left(clean: None) -> None:
    """Every test of this tier is compared with what was on the host before it."""
