"""The install tier: install.sh on front-ends and on a host. It runs in a machine of its own, as root."""

from __future__ import annotations
