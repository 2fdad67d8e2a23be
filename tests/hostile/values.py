"""What a user can write into a template, and what can stand in argv, that nobody should believe.

`WORDS` are values for any attribute; `TEMPLATES` are whole templates that aim at one thing; `DOCUMENTS` change the XML
itself; `ARGUMENTS` are argument lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.hostile.witness import CANARY, SECRET_FILE, SECRET_IMAGE

WORDS: tuple[str, ...] = (
    "",
    " ",
    "0",
    "-1",
    "1e308",
    "nan",
    "inf",
    "0x10",
    "1" * 400,
    "9223372036854775808",
    "1.5",
    "٣",
    "½",
    "²",
    "../../../../etc",
    "/proc",
    "/sys/fs/cgroup",
    "/dev",
    "/.oldroot",
    "/",
    ".",
    "..",
    "//",
    "/context",
    "/../..",
    "/media/..",
    CANARY,
    SECRET_FILE,
    SECRET_IMAGE,
    "/dev/vda",
    "/dev/loop0",
    "rbd:one/one-7",
    "nbd://127.0.0.1/",
    "json:{}",
    "a\nb",
    "a\tb",
    "\x1b[2J",
    "\x9b31m",
    "\u202egnp",
    "\u2028",
    "x\x7f",
    "\ud800".encode("utf-8", "replace").decode(),
    "]]>",
    "<x/>",
    "&amp;",
    "'; touch /srv/canary/evil; '",
    "$(touch /srv/canary/evil)",
    "`id`",
    "%s%n",
    "{0}",
    "${HOME}",
    "yes",
    "no",
    "YES\n",
    "a" * 5000,
    "one-1",
    "lo",
    "br0",
    "eth0/../x",
    "02:00:00:00:00:00:00",
    "ff:ff:ff:ff:ff:ff",
    "::",
    "/24",
    "255.0.255.0",
    "none",
    "1,2,3",
    "[",
    "[[[[[[",
    "{" * 200,
    "qcow2",
    "raw",
    "iso",
    "swap",
    "fs",
    "BLOCK",
    "RBD",
    "CDROM",
)

DISK_ATTRIBUTES = (
    "TARGET",
    "SIZE",
    "FORMAT",
    "DRIVER",
    "TYPE",
    "DISK_TYPE",
    "SOURCE",
    "READONLY",
    "CLONE",
    "FS",
    "DISK_ID",
    "TOTAL_BYTES_SEC",
    "READ_IOPS_SEC",
    "TM_MAD",
    "IMAGE",
    "CACHE",
    "IO",
    "DEV_PREFIX",
    "POOL_NAME",
    "CEPH_USER",
    "ORIGINAL_SIZE",
    "PERSISTENT",
    "SAVE",
    "LUKS",
    "DISK_SNAPSHOT_TOTAL_SIZE",
)
NIC_ATTRIBUTES = (
    "BRIDGE",
    "MAC",
    "IP",
    "IP6",
    "NETWORK_MASK",
    "GATEWAY",
    "MTU",
    "TARGET",
    "NIC_ID",
    "BRIDGE_TYPE",
    "VN_MAD",
    "VLAN_ID",
    "PHYDEV",
    "INBOUND_AVG_BW",
    "OUTBOUND_PEAK_BW",
    "MODEL",
    "NAME",
    "NETWORK_ADDRESS",
    "DNS",
    "OVS_QOS",
    "TYPE",
    "SCRIPT",
    "FILTER",
    "METRIC",
    "GUEST_MTU",
    "VCENTER_NET_REF",
)
VM_ATTRIBUTES = (
    "CPU",
    "VCPU",
    "MEMORY",
    "MEMORY_MAX",
    "VCPU_MAX",
    "NAME",
    "SWAP",
    "CPU_COST",
    "MEMORY_SLOTS",
    "EMULATOR",
)
USER_ATTRIBUTES = (
    "LXC_UNPRIVILEGED",
    "LXC_PROFILES",
    "LXC_SECURITY_NESTING",
    "DESCRIPTION",
    "LXC_BASE",
    "READY",
    "LXC_INIT",
)


def disk(**attributes: Any) -> dict[str, Any]:
    return {"second disk": attributes}


TEMPLATES: dict[str, dict[str, Any]] = {
    "a volatile disk that names an image of Ceph": disk(
        TYPE="fs", SIZE="10", DISK_TYPE="RBD", SOURCE="one/one-7", CLONE="NO"
    ),
    "an image of Ceph on a host that has none": disk(DISK_TYPE="RBD", SOURCE="one/one-7", CLONE="NO"),
    "a volatile disk that names the host's image": disk(TYPE="fs", SIZE="10", SOURCE=SECRET_IMAGE, CLONE="NO"),
    "a swap disk that names the host's device": disk(TYPE="swap", SIZE="10", DISK_TYPE="BLOCK", SOURCE="/dev/vda"),
    "a disk of the host's": disk(DISK_TYPE="BLOCK", SOURCE="/dev/vda", TYPE="BLOCK"),
    "a file of the host's": disk(SOURCE=SECRET_IMAGE, CLONE="NO"),
    "a disk at /proc": disk(TARGET="/proc"),
    "a disk at /proc by dots": disk(TARGET="/media/../proc"),
    "a disk below /proc": disk(TARGET="/proc/sys"),
    "a disk at /sys": disk(TARGET="/sys/fs/cgroup"),
    "a disk at /dev": disk(TARGET="/dev/pts"),
    "a disk at /.oldroot": disk(TARGET="/.oldroot"),
    "a disk at /": disk(TARGET="/"),
    "a disk at the context's place": disk(TARGET="/context"),
    "a disk at libvirt's place": disk(TARGET="/.oldroot/var/lib"),
    "a disk at a name of control characters": disk(TARGET="/mnt/\x9b31mRED"),
    "a disk at a name of 5000 characters": disk(TARGET="/" + "x" * 5000),
    "a disk at 3000 levels": disk(TARGET="/d" * 3000),
    "a disk with XML in its target": disk(TARGET="/mnt'/><filesystem type='mount'><source dir='/'/>"),
    "a number for a disk that is a path": disk(DISK_ID="../../../srv/canary/disk.0"),
    "two disks of one number": disk(DISK_ID="0"),
    "a disk of number 2^31": disk(DISK_ID=str(1 << 31)),
    "an init that is a path out": {"template": {"OS": {"INIT": "../../../../bin/sh"}}},
    "an init of the host's": {"template": {"OS": {"INIT": SECRET_FILE}}},
    "an init of a pseudo file": {"template": {"OS": {"INIT": "/proc/self/exe"}}},
    "an init with arguments and XML": {"template": {"OS": {"INIT": "/bin/sh -c 'id'</init><init>"}}},
    "RAW": {
        "template": {
            "RAW": {
                "TYPE": "onelxc",
                "DATA": f"<devices><filesystem type='mount'><source dir='{CANARY}'/>"
                "<target dir='/mnt'/></filesystem></devices>",
            }
        }
    },
    "RAW that is no XML": {"template": {"RAW": {"TYPE": "onelxc", "DATA": "<a" * 5000}}},
    "profiles of dots": {"user": {"LXC_PROFILES": f"../../../..{CANARY}/secret, ../host, {SECRET_FILE}"}},
    "profiles without number": {"user": {"LXC_PROFILES": ",".join(["x"] * 5000)}},
    "privileged": {"user": {"LXC_UNPRIVILEGED": "no"}},
    "a viewer's port of root's": {
        "template": {"GRAPHICS": {"TYPE": "VNC", "PORT": "22", "LISTEN": "0.0.0.0", "PASSWD": "x'; id"}}
    },
    "memory of nothing": {"template": {"MEMORY": "0"}},
    "memory of all hosts": {"template": {"MEMORY": "99999999999999"}},
    "a CPU of not a number": {"template": {"CPU": "nan"}},
    "a CPU beyond all": {"template": {"CPU": "1e308", "VCPU": "4294967296"}},
    "a name of a terminal": {"template": {"NAME": "\x1b[2J\x9b31m]]>&lt;"}},
    "a NIC on the host's lo": {"nic": {"BRIDGE": "lo"}},
    "a NIC on no bridge": {"nic": {"BRIDGE": "../../proc"}},
    "a NIC called as the host's": {"nic": {"TARGET": "br0"}},
    "a NIC called by a path": {"nic": {"TARGET": "../../x"}},
    "a NIC called by an escape": {"nic": {"TARGET": "e\x1b[2J"}},
    "a NIC with a MAC of all": {"nic": {"MAC": "ff:ff:ff:ff:ff:ff"}},
    "a NIC with addresses of words": {
        "nic": {"IP": "1.1.1.1; id", "NETWORK_MASK": "/24", "GATEWAY": "none", "MTU": "0"}
    },
    "a NIC with an MTU beyond all": {"nic": {"MTU": "4294967297"}},
    "a NIC with bandwidth beyond all": {"nic": {"INBOUND_AVG_BW": "99999999999999999999", "OUTBOUND_PEAK_BW": "-5"}},
    "a NIC that is a number of 400 digits": {"nic": {"NIC_ID": "1" * 400}},
    "5000 NICs": {
        "template": {"NIC": [{"NIC_ID": n, "BRIDGE": "br0", "MAC": "02:00:00:00:00:01"} for n in range(5000)]}
    },
    "PCI of the host's": {"template": {"PCI": {"ADDRESS": "0000:00:00:0", "TYPE": "PCI", "SHORT_ADDRESS": "../../x"}}},
    "pins of a host that is not": {
        "template": {
            "TOPOLOGY": {"PIN_POLICY": "CORE", "CORES": "9999"},
            "NUMA_NODE": [{"CPUS": "0-99999999", "MEMORY": "1", "NODE_ID": "-7"}],
        }
    },
    "a context at the host's file": {"template": {"CONTEXT": {"DISK_ID": "../canary", "TARGET": "hda"}}},
    "a context of number 2^63": {"template": {"CONTEXT": {"DISK_ID": str(1 << 63), "TARGET": "hda"}}},
    "an encryption and a shared file system": {"template": {"FILESYSTEM": {"SOURCE": CANARY, "TARGET": "/mnt"}}},
}


def nested(depth: int) -> Callable[[str], str]:
    return lambda text: text.replace("<TEMPLATE>", "<TEMPLATE>" + "<A>" * depth + "</A>" * depth, 1)


def entities(text: str) -> str:
    definitions = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10 if n else "lol" * 100}">' for n in range(9))
    return f"<!DOCTYPE VM [{definitions}]>" + text.replace("<TEMPLATE>", "<TEMPLATE><A>&a8;</A>", 1)


def external(text: str) -> str:
    head = f'<!DOCTYPE VM [<!ENTITY x SYSTEM "file://{SECRET_FILE}"><!ENTITY % p SYSTEM "file://{SECRET_FILE}"> %p;]>'
    return head + text.replace("<NAME>", "<NAME>&x;", 1)


DOCUMENTS: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: "",
    "no XML": lambda text: "this is no XML\n",
    "half of it": lambda text: text[: len(text) // 2],
    "deep": nested(20000),
    "entities that grow": entities,
    "entities of the host's files": external,
    "an inclusion": lambda text: text.replace(
        "<TEMPLATE>",
        f'<TEMPLATE xmlns:xi="http://www.w3.org/2001/XInclude"><xi:include href="{SECRET_FILE}" parse="text"/>',
        1,
    ),
    "another encoding": lambda text: '<?xml version="1.0" encoding="UTF-7"?>' + text,
    "bytes of zero": lambda text: text.replace("<TEMPLATE>", "<TEMPLATE>\x01\x02", 1),
    "another root": lambda text: f"<VM_POOL>{text}</VM_POOL>",
    "two templates": lambda text: text.replace("<TEMPLATE>", "<TEMPLATE><NAME>x</NAME></TEMPLATE><TEMPLATE>", 1),
    "no disks": lambda text: text.replace("<DISK>", "<DISC>").replace("</DISK>", "</DISC>"),
    "8 MiB in one attribute": lambda text: text.replace("<TEMPLATE>", "<TEMPLATE><A>" + "a" * (8 << 20) + "</A>", 1),
    "20000 attributes": lambda text: text.replace("<TEMPLATE>", "<TEMPLATE>" + "<A>1</A>" * 20000, 1),
    "another VM's number": lambda text: text.replace("<ID>", "<ID>7", 1),
    "attributes with attributes": lambda text: text.replace("<TEMPLATE>", '<TEMPLATE a="&#x9b;">', 1),
}

ARGUMENTS: tuple[tuple[str, ...], ...] = (
    (),
    ("x",),
    ("x", "node1"),
    ("-1", "node1"),
    ("99999999999999999999", "node1"),
    ("1e3", "node1"),
    ("٣", "node1"),
    ("/etc/passwd", "node1", "one-1", "node1"),
    ("../../x", "node1", "7", "node1"),
    (f"{CANARY}/deployment.0", "node1", "7", "node1"),
    ("--help", "node1", "7", "node1"),
    ("'\x1b[2J'", "node1", "7", "node1"),
    ("one-8", "node1", "7", "node1"),
    ("'one-7 '", "node1", "7", "node1"),
    ("one-07", "node1", "07", "node1"),
    ("''", "''", "7", "''"),
    ("x" * 9000, "node1", "7", "node1"),
)
