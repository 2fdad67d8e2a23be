"""What OpenNebula's network drivers write on a port, in their own words."""

from __future__ import annotations

import pytest

from onelxc.model import Nic
from onelxc.root import ports


def nic(**attributes: object) -> Nic:
    return Nic(1, "one-5-1", "br0", **attributes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attributes", "settings"),
    [
        ({}, ()),
        ({"vlan_id": 7}, ("tag=7", "trunks=[]", "vlan_mode=native-untagged")),
        ({"vlan_tagged": "1,3-5"}, ("tag=[]", "trunks=1,3,4,5", "vlan_mode=trunk")),
        ({"vlan_id": 0, "vlan_tagged": "9"}, ("tag=0", "trunks=9", "vlan_mode=native-untagged")),
        (
            {"vlan_id": 7, "cvlans": "8,9", "qinq_type": "802.1ad"},
            ("vlan_mode=dot1q-tunnel", "tag=7", "cvlans=8,9", "other_config:qinq-ethtype=802.1ad"),
        ),
    ],
)
def test_open_vswitch(attributes: dict[str, object], settings: tuple[str, ...]) -> None:
    assert ports.port_settings(nic(**attributes)) == settings


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"vlan_id": 7, "vn_mad": "802.1q"}, ()),
        ({"vlan_tagged": "8-9", "vn_mad": "bridge"}, (("vid", "8"), ("vid", "9"))),
        ({"vlan_tagged": "8-9", "vn_mad": "802.1q"}, ()),
        ({"vlan_id": 7, "cvlans": "8", "vn_mad": "802.1q"}, (("vid", "7", "pvid", "untagged"), ("vid", "8"))),
    ],
)
def test_linux_bridge(attributes: dict[str, object], words: tuple[tuple[str, ...], ...]) -> None:
    assert ports.bridge_vlans(nic(**attributes)) == words


def test_note_of_the_flows() -> None:
    assert ports.port_note(1, 1) == "00.00.00.01.00.01"
    assert ports.port_note(0x12345, 300) == "00.01.23.45.01.2c"
