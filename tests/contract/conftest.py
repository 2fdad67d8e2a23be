"""The contract tier: the installed executables answer what OpenNebula was seen to send, byte for byte."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nothing_left(clean: None) -> None:
    """Here too the host is as before after every test."""
