"""The domain's XML: golden files to review, and libvirt's own schema.

`ONELXC_REWRITE_GOLDEN=1` writes the golden files anew, so that a change of behaviour is read as a change of XML.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
from lxml import etree

from onelxc import domainxml, template
from onelxc.config import Defaults
from onelxc.errors import ConfigurationError
from onelxc.model import Bandwidth, Disk, Graphics, Init, IoLimits, Mount, Nic, Prepared, Vm
from onelxc.template import Policy
from tests.support import captures

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
SCHEMA = "/usr/share/libvirt/schemas/domain.rng"

ROOT = Disk(disk_id=0, path="/ds/0/7/disk.0")
PLAIN = Vm(vm_id=7, disks=(ROOT,))
PREPARED = Prepared(root="/var/lib/onelxc/mnt/7/root", id_base=1879506944, cgroup=2)
NIC = Nic(nic_id=0, device="one-7-0", bridge="br0", mac="02:00:0a:00:00:05", guest_name="eth0")

FULL = Vm(
    vm_id=7,
    name="web & <more>",
    cpu=1.5,
    vcpu=3,
    memory_kib=256 * 1024,
    swap_kib=64 * 1024,
    init="/bin/sh",
    init_arguments=("-c", "exec /sbin/init && 'x'"),
    init_environment=(("A", "1 2"), ("B", "")),
    arch="i686",
    uuid="4b3565c2-761e-43cc-a8a2-53144ad63bab",
    disks=(
        dataclasses.replace(ROOT, read_only=True, limits=IoLimits(total_bytes_sec=1000, write_iops_sec=50)),
        Disk(disk_id=1, path="/ds/0/7/disk.1", kind="fs"),
    ),
    nics=(
        dataclasses.replace(
            NIC,
            ip="10.0.0.5",
            prefix=24,
            gateway="10.0.0.1",
            ip6="2001:db8::5",
            prefix6=64,
            gateway6="fe80::1",
            filter="clean-traffic",
            mtu=9000,
            inbound=Bandwidth(100),
        ),
        Nic(
            nic_id=1,
            device="one-7-1",
            bridge="ovs0",
            bridge_type="openvswitch",
            guest_name="eth1",
            vlan_id=42,
            vlan_tagged="100-102",
        ),
        Nic(nic_id=2, device="one-7-2", bridge="", guest_name="eth2", pci_address="0000:81:00.1"),
    ),
    cpuset="0,2-3",
    nodeset="0",
    capabilities=(("mknod", True), ("net_raw", False)),
    graphics=Graphics(port=5907),
)
FULL_PREPARED = dataclasses.replace(
    PREPARED,
    mounts=(
        Mount("/var/lib/onelxc/mnt/7/disk.1", "/srv/data"),
        Mount("/var/lib/onelxc/mnt/7/context", "/context", read_only=True),
    ),
    devices=((0, "/dev/loop4"),),
    interfaces=((2, "enp129s0f1"),),
)
SWITCHED = (
    dataclasses.replace(NIC, bridge_type="openvswitch", vlan_id=42),
    dataclasses.replace(NIC, nic_id=1, bridge_type="openvswitch", vlan_tagged="7,9-10"),
    dataclasses.replace(NIC, nic_id=2, bridge_type="openvswitch", vlan_id=42, cvlans="7", vlan_tagged="8"),
    dataclasses.replace(NIC, nic_id=3, vlan_id=42),
    dataclasses.replace(NIC, nic_id=4, bridge_type="linux", vlan_id=42),
)
FRAGMENTS = (
    "<?xml version='1.0'?><features><capabilities policy='deny'><mknod state='on'/></capabilities></features>",
    "<memory unit='KiB'>99999</memory><devices><filesystem type='ram'><source usage='1024' units='KiB'/>"
    "<target dir='/scratch'/></filesystem></devices>",
    "<domain><on_reboot>restart</on_reboot></domain>",
    "<lxc:namespace><lxc:sharenet type='netns' value='red'/></lxc:namespace>",
)


def captured(case: str, vm_id: int, prepared: Prepared) -> tuple[Vm, Prepared]:
    return template.parse(captures.named(case).read(), vm_id, f"/var/lib/one/{vm_id}", Policy()), prepared


CASES: dict[str, tuple[Vm, Prepared]] = {
    "plain": (PLAIN, PREPARED),
    "plain_v1": (PLAIN, dataclasses.replace(PREPARED, cgroup=1)),
    "privileged": (PLAIN, dataclasses.replace(PREPARED, id_base=None)),
    "full": (FULL, FULL_PREPARED),
    "vlans": (dataclasses.replace(PLAIN, nics=SWITCHED), dataclasses.replace(PREPARED, switches=(3,))),
    "full_v1_no_swap_accounting": (FULL, dataclasses.replace(FULL_PREPARED, cgroup=1, swap_accounting=False)),
    "fragments": (dataclasses.replace(PLAIN, raw=FRAGMENTS[2:]), dataclasses.replace(PREPARED, profiles=FRAGMENTS[:2])),
    "capture_3.2.1": captured("3.2.1/deploy_nic_context", 24, PREPARED),
    "capture_7.4.0": captured("7.4.0/deploy/deploy", 4, PREPARED),
}


@pytest.fixture(scope="module")
def schema() -> Any:
    return etree.RelaxNG(etree.parse(SCHEMA))


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    path = os.path.join(GOLDEN, f"{name}.xml")
    text = domainxml.render(*CASES[name])
    if os.environ.get("ONELXC_REWRITE_GOLDEN") == "1":
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    with open(path, encoding="utf-8") as file:
        assert text == file.read()


def test_no_golden_without_a_case() -> None:
    assert sorted(os.listdir(GOLDEN)) == sorted(f"{name}.xml" for name in CASES)


@pytest.mark.parametrize("name", CASES)
def test_schema(name: str, schema: Any) -> None:
    """Domains are created with VIR_DOMAIN_START_VALIDATE."""
    document = etree.fromstring(domainxml.render(*CASES[name]))
    assert schema.validate(document), schema.error_log


def test_the_schema_knows_what_is_wrong(schema: Any) -> None:
    """A schema that took anything would prove nothing."""
    vm = dataclasses.replace(PLAIN, raw=("<nonsense/>",))
    assert not schema.validate(etree.fromstring(domainxml.render(vm, PREPARED)))


NOT_WRITTEN = {
    Vm: {"context", "privileged", "graphics", "profiles", "notes"},
    Nic: {"nic_id", "vn_mad", "mtu", "inbound", "outbound", "attach", "pci_address", "cvlans", "qinq_type"},
    Prepared: {"init", "notes"},
}
"""What the XML has no place for: it is in Prepared (context, privileged, profiles), or for others than libvirt."""

OTHER: dict[type, dict[str, Any]] = {
    Vm: {
        "vm_id": 8,
        "name": "other",
        "cpu": 9.0,
        "vcpu": 9,
        "memory_kib": 9,
        "swap_kib": 9,
        "init": "/9",
        "init_arguments": (),
        "init_environment": (),
        "arch": "",
        "uuid": "",
        "disks": (ROOT,),
        "nics": (),
        "cpuset": "",
        "nodeset": "",
        "capabilities": (),
        "raw": ("<on_reboot>restart</on_reboot>",),
    },
    Nic: {
        "device": "one-7-9",
        "bridge": "br9",
        "mac": "02:00:00:00:00:09",
        "bridge_type": "openvswitch",
        "ip": "10.0.0.9",
        "prefix": 9,
        "gateway": "10.0.0.9",
        "ip6": "2001:db8::9",
        "prefix6": 9,
        "gateway6": "fe80::9",
        "guest_name": "eth9",
        "filter": "other",
        "vlan_id": 9,
        "vlan_tagged": "9",
    },
    Prepared: {
        "root": "/other",
        "id_base": 65536,
        "mounts": (),
        "cgroup": 2,
        "profiles": ("<on_reboot>restart</on_reboot>",),
        "devices": (),
        "interfaces": (),
        "switches": (0,),
        "swap_accounting": False,
        "controller": "/usr/sbin/other",
    },
}


@pytest.mark.parametrize("kind", [Vm, Nic, Prepared])
def test_every_field_of_the_model_is_written_or_meant_not_to_be(kind: type) -> None:
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields == NOT_WRITTEN[kind] | set(OTHER[kind]), "a new field has to be rendered, or listed as not rendered"
    full_prepared = dataclasses.replace(FULL_PREPARED, cgroup=1)  # where swap is libvirt's, too
    before = domainxml.render(FULL, full_prepared)
    for name, value in OTHER[kind].items():
        vm, prepared = FULL, full_prepared
        if kind is Vm:
            vm = dataclasses.replace(vm, **{name: value})
        elif kind is Prepared:
            prepared = dataclasses.replace(prepared, **{name: value})
        else:
            place = 1 if name.startswith("vlan") else 0
            nics = [dataclasses.replace(nic, **{name: value}) if n == place else nic for n, nic in enumerate(vm.nics)]
            vm = dataclasses.replace(vm, nics=tuple(nics))
        assert domainxml.render(vm, prepared) != before, f"{kind.__name__}.{name} changes nothing"


@pytest.mark.parametrize(
    ("cpu", "cgroup", "shares"),
    [(1, 1, 1024), (0.5, 1, 512), (0.001, 1, 2), (1000, 1, 262144), (1, 2, 100), (0.001, 2, 1), (101, 2, 10000)],
)
def test_cpu_shares(cpu: float, cgroup: int, shares: int) -> None:
    assert domainxml.cpu_shares(cpu, cgroup) == shares


@pytest.mark.parametrize(("cgroup", "limit"), [(1, 130), (2, None)])
def test_swap_is_on_top_of_memory_and_not_libvirts_on_version_2(cgroup: int, limit: int | None) -> None:
    vm = dataclasses.replace(PLAIN, memory_kib=100, swap_kib=30)
    assert domainxml.swap_hard_limit(vm, dataclasses.replace(PREPARED, cgroup=cgroup)) == limit


def test_a_container_without_nics_is_not_in_the_hosts_network() -> None:
    assert "<privnet />" in domainxml.render(PLAIN, PREPARED)


@pytest.mark.parametrize(
    ("fragment", "words"),
    [
        ("<features>", "a fragment is no XML"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><title>&a;</title>", "a fragment has a DOCTYPE"),
        ("<name>other</name>", "a fragment cannot change <name>"),
        ("<uuid>1</uuid>", "a fragment cannot change <uuid>"),
        ("<domain><idmap/></domain>", "a fragment cannot change <idmap>"),
    ],
)
def test_fragments_that_cannot_be(fragment: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match="VM 7: ") as error:
        domainxml.render(dataclasses.replace(PLAIN, raw=(fragment,)), PREPARED)
    assert words in str(error.value)


def test_fragment_of_the_operator(tmp_path: Any) -> None:
    operators = Policy(Defaults(raw=("<title>from the operator</title>",)))
    vm = template.parse(captures.named("3.2.1/deploy").read(), 2, "/d", operators)
    assert "<title>from the operator</title>" in domainxml.render(vm, PREPARED)


def test_interface_alone_is_what_is_attached() -> None:
    element = etree.fromstring(domainxml.render_interface(FULL.nics[0]))
    assert element.tag == "interface"
    assert element.find("target").get("dev") == "one-7-0"


def test_init_says_nothing_to_libvirt() -> None:
    """Init is for those who ask it to stop; the XML is the same whatever it is."""
    systemd = dataclasses.replace(PREPARED, init=Init.SYSTEMD)
    assert domainxml.render(PLAIN, systemd) == domainxml.render(PLAIN, PREPARED)
