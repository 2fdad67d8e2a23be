"""Templates of both generations become a Vm; what is wrong is one line that names the VM and the place."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onelxc import template
from onelxc.config import Defaults, HostConfig, Privileged
from onelxc.errors import NotSupportedError, OneLxcError, TemplateError
from onelxc.model import Bandwidth, Graphics, IoLimits, Nic, Vm
from onelxc.template import Policy
from tests.support import captures
from tests.support.templates import pull_template, vm_xml

DISK = {"DISK_ID": 0, "SOURCE": "/images/rootfs.tar"}
NIC = {"BRIDGE": "br0", "IP": "10.0.0.5", "MAC": "02:00:0a:00:00:05"}


def vm(policy: Policy | None = None, **attributes: Any) -> Vm:
    text = pull_template(24, {"NAME": "x", "MEMORY": 64, "DISK": DISK, **attributes})
    return template.parse(text.encode(), 24, "/one/24/images", policy or Policy())


def wrong(**attributes: Any) -> str:
    with pytest.raises(OneLxcError) as error:
        vm(**attributes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pull_generation() -> None:
    capture = captures.named("3.2.1/deploy_nic_context")
    got = template.parse(capture.read(), 24, "/var/lib/one/24/images", Policy())
    assert (got.name, got.cpu, got.vcpu, got.memory_kib) == ("lxc /var/lib/one oneadmin \\x", 1.0, 2, 1024 * 1024)
    assert [disk.path for disk in got.disks] == ["/var/lib/one/24/images/disk.0"]
    assert got.context is not None
    assert got.context.path == "/var/lib/one/24/images/disk.1"
    assert got.nics == (
        Nic(
            nic_id=0,
            device="one-24-0",
            bridge="br0",
            mac="02:00:c0:a8:84:01",
            ip="192.168.132.1",
            prefix=24,
            guest_name="eth0",
        ),
    )
    assert got.graphics == Graphics(port=5924, listen="127.0.0.1")
    assert got.arch == "i686"
    assert not got.privileged
    assert template.parse(captures.named("3.2.1/deploy").read(), 2, "/d", Policy()).context is None


def test_monitord_generation() -> None:
    got = template.parse(captures.named("7.4.0/deploy/deploy").read(), 4, "/ds/100/4", Policy())
    assert (got.name, got.cpu, got.vcpu, got.memory_kib) == ("web2", 0.5, 2, 128 * 1024)
    assert [(disk.kind, disk.path, disk.fs) for disk in got.disks] == [
        ("image", "/ds/100/4/disk.0", ""),
        ("fs", "/ds/100/4/disk.1", "ext4"),
        ("swap", "/ds/100/4/disk.2", ""),
    ]
    assert got.context is not None
    assert got.context.path == "/ds/100/4/disk.3"
    nic = got.nics[0]
    assert (nic.ip, nic.prefix, nic.gateway, nic.mtu) == ("192.168.150.106", 24, "192.168.150.1", 1500)
    assert nic.inbound == Bandwidth(average_kib=1000)
    assert got.uuid == "4b3565c2-761e-43cc-a8a2-53144ad63bab"
    assert [note.split(":")[0] for note in got.notes] == [
        "DISK 2",
        "RAW of TYPE 'onelxc' is not for this driver ('libvirt-lxc' is)",
        "LXC_UNPRIVILEGED=no",
    ]


def test_base64_is_the_same() -> None:
    plain = captures.named("7.4.0/deploy/deploy").read()
    assert template.parse(base64.b64encode(plain), 4, "/x", Policy()) == template.parse(plain, 4, "/x", Policy())
    assert template.parse(base64.encodebytes(plain).replace(b"\n", b""), 4, "/x", Policy()).vm_id == 4


@pytest.mark.parametrize(
    ("attributes", "line"),
    [
        ({"MEMORY": "x"}, "VM 24: MEMORY is not a number of MB: 'x'"),
        ({"MEMORY": "1.5"}, "VM 24: MEMORY is not a number of MB: '1.5'"),
        ({"MEMORY": 0}, "VM 24: MEMORY is 0 MB: a container needs 32 MB at least"),
        ({"MEMORY": -1}, "VM 24: MEMORY is below 0: '-1'"),
        ({"CPU": "a lot"}, "VM 24: CPU is not a number: 'a lot'"),
        ({"CPU": "0"}, "VM 24: CPU is out of range: '0'"),
        ({"CPU": "nan"}, "VM 24: CPU is out of range: 'nan'"),
        ({"VCPU": "0"}, "VM 24: VCPU is below 1: '0'"),
        ({"VCPU": "1.5"}, "VM 24: VCPU is not a whole number: '1.5'"),
        ({"DISK": None}, "VM 24: no DISK with an image: a container needs one for its root file system"),
        (
            {"DISK": {"TYPE": "fs", "SIZE": 10, "DISK_ID": 0}},
            "VM 24: no DISK with an image: a container needs one for its root file system",
        ),
        ({"DISK": [DISK, {"DISK_ID": 2, "SIZE": "x"}]}, "VM 24: DISK 2: SIZE is not a number: 'x'"),
        ({"DISK": [DISK, DISK]}, "VM 24: DISK 0 is there twice"),
        ({"DISK": {"DISK_ID": "../../1"}}, "VM 24: DISK ../../1: DISK_ID is not a whole number: '../../1'"),
        (
            {"DISK": [DISK, {"DISK_ID": 1, "TARGET": "/mnt/../etc"}]},
            "VM 24: DISK 1: TARGET is no place for a data disk: '/mnt/../etc'",
        ),
        (
            {"DISK": [DISK, {"DISK_ID": 1, "TARGET": "/"}]},
            "VM 24: DISK 1: TARGET is no place for a data disk: '/'",
        ),
        (
            {"DISK": [DISK, {"DISK_ID": 1, "TARGET": "/d"}, {"DISK_ID": 2, "TARGET": "/d/"}]},
            "VM 24: DISK 1: another DISK has the same TARGET: '/d'",
        ),
        ({"OS": {"INIT": "init"}}, "VM 24: OS/INIT is not an absolute path: 'init'"),
        (
            {"OS": {"INIT": "/bin/sh -c 'x"}},
            'VM 24: OS/INIT cannot be split into words: No closing quotation: "/bin/sh -c \'x"',
        ),
        ({"OS": {"INIT_ENV": "A"}}, "VM 24: OS/INIT_ENV is not NAME=value: 'A'"),
        ({"NIC": {"IP": "10.0.0.5"}}, "VM 24: NIC 0: no BRIDGE: which bridge of the host does it belong to?"),
        ({"NIC": {**NIC, "BRIDGE": "a b"}}, "VM 24: NIC 0: BRIDGE is not a name of an interface: 'a b'"),
        ({"NIC": {**NIC, "MAC": "02:00"}}, "VM 24: NIC 0: MAC is not a MAC address: '02:00'"),
        ({"NIC": {**NIC, "IP": "10.0.0.256"}}, "VM 24: NIC 0: IP is not an IP address: '10.0.0.256'"),
        ({"NIC": {**NIC, "IP": "fe80::1"}}, "VM 24: NIC 0: IP is not an IPv4 address: 'fe80::1'"),
        ({"NIC": {**NIC, "NETWORK_MASK": "x"}}, "VM 24: NIC 0: NETWORK_MASK is not a network mask: 'x'"),
        ({"NIC": [NIC, {**NIC, "NIC_ID": 0}]}, "VM 24: NIC 0 is there twice"),
        (
            {"NIC": {**NIC, "NIC_ID": 123456789}},
            "VM 24: NIC 123456789: NIC_ID is above 1000000: '123456789'",
        ),
        (
            {"NIC": {**NIC, "BRIDGE_TYPE": "openvswitch_dpdk"}},
            "VM 24: NIC 0: BRIDGE_TYPE openvswitch_dpdk: containers have linux and openvswitch only",
        ),
        (
            {"NIC": {**NIC, "INBOUND_PEAK_BW": 5}},
            "VM 24: NIC 0: INBOUND_PEAK_BW and INBOUND_PEAK_KB need INBOUND_AVG_BW",
        ),
        ({"NIC": {**NIC, "VLAN_ID": 4096}}, "VM 24: NIC 0: VLAN_ID is above 4095: '4096'"),
        ({"NIC": {**NIC, "VLAN_TAGGED_ID": "1,x"}}, "VM 24: NIC 0: VLAN_TAGGED_ID is not a list of VLANs: '1,x'"),
        ({"NIC": {**NIC, "QINQ_TYPE": "x"}}, "VM 24: NIC 0: QINQ_TYPE is neither 802.1q nor 802.1ad: 'x'"),
        ({"NIC": {**NIC, "FILTER": "<x/>"}}, "VM 24: NIC 0: FILTER is not a name: '<x/>'"),
        (
            {"PCI": {"PCI_ID": 0, "TYPE": "GPU"}},
            "VM 24: PCI 0: of PCI devices a container can have network interfaces only",
        ),
        (
            {"PCI": {"PCI_ID": 0, "TYPE": "NIC", "ADDRESS": "../x"}},
            "VM 24: PCI 0: ADDRESS is not one of a PCI device: '../x'",
        ),
        (
            {"TOPOLOGY": {"HUGEPAGE_SIZE": 2}},
            "VM 24: TOPOLOGY/HUGEPAGE_SIZE: a container's memory cannot be made of huge pages: remove it",
        ),
        ({"NUMA_NODE": {"CPUS": "all"}}, "VM 24: NUMA_NODE: CPUS is not a list of numbers: 'all'"),
        ({"GRAPHICS": {"TYPE": "vnc", "PORT": "x"}}, "VM 24: GRAPHICS: PORT is not a port: 'x'"),
        (
            {"RAW": {"TYPE": "libvirt-lxc", "DATA": "<devices/>"}},
            "VM 24: RAW: TYPE='libvirt-lxc' in a template is not allowed on this host (RAW in host.conf)",
        ),
        ({"LXC_UNPRIVILEGED": "maybe"}, "VM 24: LXC_UNPRIVILEGED is neither yes nor no: 'maybe'"),
        ({"LXC_PROFILES": "../x"}, "VM 24: LXC_PROFILES has a name that no profile can have: '../x'"),
    ],
)
def test_bad_input(attributes: dict[str, Any], line: str) -> None:
    assert wrong(**attributes) == line


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "VM 24: the template is empty"),
        (b"not xml", "VM 24: the template is neither XML nor base64: 'not xml'"),
        (b"<TEMPLATE><X></TEMPLATE>", "VM 24: the template is no XML: Opening and ending tag mismatch"),
        (b"<HOST/>", "VM 24: the template begins with <HOST>, not <TEMPLATE> or <VM>"),
        (b"<VM><ID>24</ID></VM>", "VM 24: no TEMPLATE in the XML"),
        (b"<VM><ID>25</ID><TEMPLATE/></VM>", "VM 24: the template is that of VM 25"),
        (b"<TEMPLATE><VMID>25</VMID></TEMPLATE>", "VM 24: the template is that of VM 25"),
        (
            b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><TEMPLATE><NAME>&e;</NAME></TEMPLATE>',
            "VM 24: the template has a DOCTYPE, which none of OpenNebula's has",
        ),
    ],
)
def test_what_is_no_template(data: bytes, line: str) -> None:
    with pytest.raises(TemplateError) as error:
        template.parse(data, 24, "/x", Policy())
    assert str(error.value).startswith(line)


def test_what_is_not_said_comes_from_the_operator() -> None:
    operators = Defaults(
        cpu=0.25,
        vcpu=3,
        memory_mb=99,
        swap_mb=7,
        init="/init --x",
        arch="i686",
        nic_bridge="br9",
        nic_filter="clean-traffic",
        nic_guest="lan",
        profiles=("base",),
        raw=("<a/>",),
        capabilities=(("mknod", True),),
    )
    got = vm(Policy(operators), MEMORY=None, NIC={"IP": "10.0.0.5"}, LXC_PROFILES="extra, base")
    assert (got.cpu, got.vcpu, got.memory_kib, got.swap_kib) == (0.25, 3, 99 * 1024, 7 * 1024)
    assert (got.init, got.init_arguments, got.arch) == ("/init", ("--x",), "i686")
    assert (got.nics[0].bridge, got.nics[0].filter, got.nics[0].guest_name) == ("br9", "clean-traffic", "lan0")
    assert (got.profiles, got.raw, got.capabilities) == (("base", "extra"), ("<a/>",), (("mknod", True),))


@pytest.mark.parametrize(("cpu", "vcpu"), [("0.5", 1), ("1", 1), ("1.01", 2), ("4", 4)])
def test_vcpu_is_enough_for_cpu(cpu: str, vcpu: int) -> None:
    assert vm(CPU=cpu).vcpu == vcpu


@pytest.mark.parametrize(
    ("os_", "init"),
    [
        ({}, "/sbin/init"),
        ({"BOOT": "disk0,nic0"}, "/sbin/init"),
        ({"BOOT": "hd"}, "/sbin/init"),
        ({"BOOT": "/init"}, "/init"),
        ({"BOOT": "/init", "INIT": "/lib/systemd/systemd"}, "/lib/systemd/systemd"),
    ],
)
def test_init(os_: dict[str, str], init: str) -> None:
    assert vm(OS=os_).init == init


@pytest.mark.parametrize(
    ("said", "operator", "host", "privileged"),
    [
        (None, Privileged.ASKED, True, False),
        ("no", Privileged.ASKED, True, True),
        ("NO", Privileged.ASKED, False, False),
        ("no", Privileged.NEVER, True, False),
        (None, Privileged.ALWAYS, True, True),
        (None, Privileged.ALWAYS, False, False),
        ("yes", Privileged.ALWAYS, True, False),
    ],
)
def test_privileged(said: str | None, operator: Privileged, host: bool, privileged: bool) -> None:
    policy = Policy(Defaults(privileged=operator), HostConfig(privileged=host))
    got = vm(policy, LXC_UNPRIVILEGED=said)
    assert got.privileged is privileged
    refused = not privileged and (said in ("no", "NO") or (said is None and operator is Privileged.ALWAYS))
    assert bool(got.notes) is refused


def test_root_file_system_is_that_of_boot() -> None:
    disks = [{"DISK_ID": 0}, {"DISK_ID": 1}, {"DISK_ID": 2, "TYPE": "swap"}]
    assert vm(DISK=disks).root_disk.disk_id == 0
    assert vm(DISK=disks, OS={"BOOT": "disk1,disk0"}).root_disk.disk_id == 1
    assert [disk.disk_id for disk in vm(DISK=disks, OS={"BOOT": "disk1"}).data_disks] == [0]


def test_disks() -> None:
    data = {
        "DISK_ID": 3,
        "TARGET": "/srv//data/",
        "READONLY": "YES",
        "PERSISTENT": "YES",
        "SIZE": 100,
        "FORMAT": "qcow2",
        "TOTAL_BYTES_SEC": 5,
        "READ_IOPS_SEC": 6,
        "WRITE_IOPS_SEC": 0,
    }
    disk = vm(DISK=[DISK, data]).disks[1]
    assert (disk.mount_point, disk.read_only, disk.persistent, disk.size_mb) == ("/srv/data", True, True, 100)
    assert (disk.format, disk.path) == ("qcow2", "/one/24/images/disk.3")
    assert disk.limits == IoLimits(total_bytes_sec=5, read_iops_sec=6)
    assert vm(DISK=[DISK, {"DISK_ID": 1, "TYPE": "CDROM"}]).disks[1].read_only
    volatile = vm(DISK=[DISK, {"DISK_ID": 1, "TYPE": "fs", "FORMAT": "raw", "FS": "xfs"}]).disks[1]
    assert (volatile.kind, volatile.fs, volatile.mount_point) == ("fs", "xfs", "/media/one-disk.1")


@pytest.mark.parametrize(("clone", "path"), [("YES", "rbd:one/one-3-24-0"), ("NO", "rbd:one/one-3")])
def test_ceph(clone: str, path: str) -> None:
    ceph = {"DISK_ID": 0, "TYPE": "RBD", "IMAGE_ID": 3, "SOURCE": "one/one-3", "CLONE": clone, "CEPH_USER": "libvirt"}
    disk = vm(DISK=ceph).root_disk
    assert (disk.path, disk.ceph_user) == (path, "libvirt")


@pytest.mark.parametrize(("said", "pool"), [({"POOL_NAME": "fast"}, "fast"), ({}, "one")])
def test_a_volatile_disk_on_ceph(said: dict[str, object], pool: str) -> None:
    root = {"DISK_ID": 0, "SOURCE": "x"}
    volatile = {"DISK_ID": 1, "TYPE": "fs", "FORMAT": "raw", "FS": "ext4", "DISK_TYPE": "RBD", **said}
    assert vm(DISK=[root, volatile]).data_disks[0].path == f"rbd:{pool}/one-sys-24-1"


OTHERS = {
    "SOURCE": "one/one-7",
    "CLONE": "NO",
    "IMAGE_ID": 7,
    "CEPH_USER": "admin",
    "CEPH_CONF": "/etc/ceph/b.conf",
}


@pytest.mark.parametrize("kind", ["fs", "FS", "swap"])
@pytest.mark.parametrize("clone", ["YES", "NO"])
def test_a_volatile_disk_is_its_own_whatever_its_user_writes(kind: str, clone: str) -> None:
    volatile = {"DISK_ID": 1, "TYPE": kind, "SIZE": 10, "FORMAT": "raw", "DISK_TYPE": "RBD", **OTHERS, "CLONE": clone}
    disk = next(one for one in vm(DISK=[DISK, volatile]).disks if one.disk_id == 1)
    assert disk.path == "rbd:one/one-sys-24-1"
    assert not disk.source
    assert not disk.registered


@pytest.mark.parametrize(("tm_mad", "path"), [("ceph", "rbd:one/one-sys-24-1"), ("ssh", "/one/24/images/disk.1")])
@pytest.mark.parametrize("claimed", ["RBD", "FILE", ""])
def test_the_system_datastore_says_where_a_volatile_disk_is(tm_mad: str, path: str, claimed: str) -> None:
    volatile = {"DISK_ID": 1, "TYPE": "fs", "SIZE": 10, "FORMAT": "raw", "DISK_TYPE": claimed, **OTHERS}
    xml = vm_xml(
        24, {"MEMORY": 64, "DISK": [DISK, volatile]}, name="x", deploy_id="", host="h", user_template={}, state=3,
        lcm_state=2, ds_id=0, tm_mad=tm_mad,
    )  # fmt: skip
    disk = template.parse(xml.encode(), 24, "/one/24/images", Policy()).data_disks[0]
    assert (disk.path, disk.source) == (path, "")
    assert (disk.ceph_user, disk.ceph_conf) == (("admin", "/etc/ceph/b.conf") if tm_mad == "ceph" else ("", ""))


@pytest.mark.parametrize("number", ["", "x", "5x", "-1", "99999999999"])
@pytest.mark.parametrize("kind", ["RBD", "rbd", "RBD_CDROM"])
def test_a_ceph_image_that_is_no_image_of_opennebulas_is_refused(kind: str, number: str) -> None:
    said = {"DISK_ID": 0, "TYPE": kind, "SOURCE": "one/one-7", "CLONE": "NO", "IMAGE_ID": number}
    assert "this disk is made from none" in wrong(DISK=said)


@pytest.mark.parametrize("said", [{"DISK_TYPE": "RBD"}, {"DISK_TYPE": "RBD", "CLONE": "NO", "TYPE": "FILE"}])
def test_only_opennebulas_own_word_makes_an_image_one_of_ceph(said: dict[str, object]) -> None:
    disk = vm(DISK={"DISK_ID": 0, "IMAGE_ID": 7, "SOURCE": "one/one-7", **said}).root_disk
    assert disk.path == "/one/24/images/disk.0"


def test_a_ceph_cdrom_is_read_only() -> None:
    said = {"DISK_ID": 1, "TYPE": "RBD_CDROM", "IMAGE_ID": 7, "SOURCE": "one/one-7", "CLONE": "NO"}
    assert vm(DISK=[DISK, said]).data_disks[0].read_only


@pytest.mark.parametrize("port", ["22", "1023", "-1", "0"])
def test_a_viewer_that_cannot_listen_is_left_out(port: str) -> None:
    got = vm(GRAPHICS={"TYPE": "vnc", "PORT": port})
    assert got.graphics is None
    assert any(note.startswith("GRAPHICS") for note in got.notes)


def test_context_is_the_disk_after_the_last_one() -> None:
    got = vm(DISK=[DISK, {"DISK_ID": 4}], CONTEXT={"X": "y"})
    assert got.context is not None
    assert (got.context.disk_id, got.context.read_only) == (5, True)


def test_addresses() -> None:
    context = {
        "ETH1_MASK": "255.255.0.0",
        "ETH1_GATEWAY": "10.0.9.9",
        "ETH1_IP6_PREFIX_LENGTH": 48,
        "ETH1_IP6_GATEWAY": "fe80::1",
        "ETH1_MTU": 9000,
    }
    nics = vm(NIC=[NIC, {**NIC, "IP6": "2001:db8::5"}, {**NIC, "IP": None}], CONTEXT=context).nics
    assert [(nic.ip, nic.prefix, nic.gateway) for nic in nics] == [
        ("10.0.0.5", 24, ""),
        ("10.0.0.5", 16, "10.0.9.9"),
        ("", None, ""),
    ]
    assert (nics[1].ip6, nics[1].prefix6, nics[1].gateway6, nics[1].mtu) == ("2001:db8::5", 48, "fe80::1", 9000)


def test_one_default_route_only() -> None:
    nics = [{**NIC, "GATEWAY": "10.0.0.1"}, {**NIC, "GATEWAY": "10.0.0.2"}]
    assert [nic.gateway for nic in vm(NIC=nics).nics] == ["10.0.0.1", ""]


def test_gateway_outside_of_the_network_is_left_to_the_guest() -> None:
    got = vm(NIC={**NIC, "GATEWAY": "192.168.0.1"})
    assert got.nics[0].gateway == ""
    assert got.notes == ("NIC 0: the gateway 192.168.0.1 is not in 10.0.0.0/24: left to the guest",)


@pytest.mark.parametrize("method", ["dhcp", "skip"])
def test_method(method: str) -> None:
    assert vm(NIC={**NIC, "METHOD": method}).nics[0].ip == ""
    assert vm(NIC=NIC, CONTEXT={"ETH0_METHOD": method}).nics[0].ip == ""


def test_bandwidth_and_bridges() -> None:
    nic = vm(NIC={**NIC, "OUTBOUND_AVG_BW": 10, "OUTBOUND_PEAK_BW": 20, "OUTBOUND_PEAK_KB": 30, "VN_MAD": "ovswitch"})
    assert nic.nics[0].outbound == Bandwidth(10, 20, 30)
    assert nic.nics[0].bridge_type == "openvswitch"
    assert vm(NIC={**NIC, "INBOUND_AVG_BW": 0}).nics[0].inbound is None


def test_vlans() -> None:
    trunk = vm(NIC={**NIC, "VLAN_ID": 10, "VLAN_TAGGED_ID": "20, 30-32", "VN_MAD": "ovswitch"}).nics[0]
    assert (trunk.vlan_id, trunk.trunk) == (10, (20, 30, 31, 32))
    assert vm(NIC={**NIC, "VLAN": "NO", "VLAN_ID": 10}).nics[0].vlan_id is None
    assert vm(NIC={**NIC, "VN_MAD": "vxlan", "VLAN_ID": 70000}).nics[0].vlan_id is None
    assert vm(NIC={**NIC, "CVLANS": "7", "VLAN_ID": 10, "QINQ_TYPE": "802.1ad"}).nics[0].inner_vlans == (7,)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({}, ""),
        ({"VN_MAD": "bridge"}, "linux"),
        ({"VN_MAD": "ovswitch"}, "openvswitch"),
        ({"VN_MAD": "ovswitch_vxlan"}, "openvswitch"),
        ({"BRIDGE_TYPE": "linux", "VN_MAD": "ovswitch"}, "linux"),
    ],
)
def test_kind_of_bridge(said: dict[str, str], kind: str) -> None:
    assert vm(NIC={**NIC, **said}).nics[0].bridge_type == kind


def test_pci_nic() -> None:
    pci = {"PCI_ID": 0, "NIC_ID": 2, "TYPE": "NIC", "ADDRESS": "0000:81:0a:4", "MAC": "02:00:00:00:00:09"}
    got = vm(PCI={**pci, "IP": "10.1.1.1"}).nics[0]
    assert (got.nic_id, got.pci_address, got.guest_name, got.ip) == (2, "0000:81:0a.4", "eth2", "10.1.1.1")
    assert vm(PCI={**pci, "ADDRESS": "81:0a.4"}).nics[0].pci_address == "0000:81:0a.4"


def test_pinning() -> None:
    nodes = [{"CPUS": "0,1", "MEMORY_NODE_ID": 0}, {"CPUS": "8-9", "MEMORY_NODE_ID": 1}]
    assert (vm(NUMA_NODE=nodes).cpuset, vm(NUMA_NODE=nodes).nodeset) == ("0,1,8-9", "0,1")
    assert vm(NUMA_NODE={"TOTAL_CPUS": 2}).cpuset == ""


@pytest.mark.parametrize("kind", ["lxc", "onelxc", "kvm", ""])
def test_foreign_raw_is_tolerated(kind: str) -> None:
    got = vm(RAW={"TYPE": kind, "DATA": "lxc.cap.drop = sys_time"})
    assert got.raw == ()
    assert len(got.notes) == 1


def test_raw_where_the_host_allows_it() -> None:
    policy = Policy(host=HostConfig(raw=True))
    assert vm(policy, RAW={"TYPE": "libvirt-lxc", "DATA": "<devices/>"}).raw == ("<devices/>",)


def test_graphics_that_are_not_for_containers() -> None:
    got = vm(GRAPHICS={"TYPE": "SPICE", "PORT": 5900})
    assert got.graphics is None
    assert "GRAPHICS of TYPE 'spice'" in got.notes[0]


def test_swap() -> None:
    assert vm(LXC_SWAP=10).swap_kib == 10 * 1024
    assert vm(SWAP=20).swap_kib == 20 * 1024


def test_refusals_are_of_their_own_kind() -> None:
    with pytest.raises(NotSupportedError):
        vm(TOPOLOGY={"HUGEPAGE_SIZE": 2})


@settings(max_examples=200, deadline=None)
@given(
    attribute=st.sampled_from(["MEMORY", "CPU", "VCPU", "SWAP", "NAME", "LXC_PROFILES", "LXC_UNPRIVILEGED"]),
    vector=st.sampled_from(["DISK", "NIC", "OS", "GRAPHICS", "CONTEXT", "PCI", "NUMA_NODE", "RAW"]),
    key=st.sampled_from(
        [
            "DISK_ID",
            "NIC_ID",
            "SIZE",
            "TYPE",
            "TARGET",
            "IP",
            "MAC",
            "BRIDGE",
            "INIT",
            "PORT",
            "ADDRESS",
            "CPUS",
            "GATEWAY",
        ]
    ),
    text=st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufffe\uffff"), max_size=30),
)
def test_any_text_gives_a_vm_or_one_line(attribute: str, vector: str, key: str, text: str) -> None:
    """Whatever a user writes: a Vm, or an error of ours of one line that names the VM. Never anything else."""
    try:
        got = vm(**{attribute: text, vector: {key: text}})
    except OneLxcError as error:
        assert str(error).startswith("VM 24: ")
        assert "\n" not in str(error)
    else:
        assert dataclasses.is_dataclass(got)


@pytest.mark.parametrize("first", ["", "<![CDATA[]]>", "<A>b</A>"])
def test_a_second_attribute_of_a_name_that_may_be_restricted_is_not_read(first: str) -> None:
    """oned 7.4 compares the first of a name with what was there before, and an empty one is like none: a user's second
    one passes `onevm update` behind it.
    """
    names = {"LXC_UNPRIVILEGED": "no", "LXC_PROFILES": "gpu"}
    user = "".join(f"<{name}>{first}</{name}><{name}>{value}</{name}>" for name, value in names.items())
    disk = "<DISK><DISK_ID>0</DISK_ID><SOURCE>/images/rootfs.tar</SOURCE></DISK>"
    xml = f"<VM><ID>7</ID><TEMPLATE>{disk}</TEMPLATE><USER_TEMPLATE>{user}</USER_TEMPLATE></VM>"
    got = template.parse(xml.encode(), 7, "/var/lib/one/datastores/0/7", Policy(host=HostConfig(privileged=True)))
    assert (got.privileged, got.profiles) == (False, ())
