"""The text that OpenNebula gets, letter by letter."""

from __future__ import annotations

import base64

from onelxc import monitoring
from onelxc.containers import Container
from onelxc.host import Cpu, Memory, Traffic
from onelxc.usage import Io, Net, Usage

USAGE = Usage(Container("one-5", 4242), 12.345, 65536, Net(1, 2), Io(3, 4, 5, 6), ("10.0.0.7", "2001:db8::7"), 1, 12)


def test_host() -> None:
    values = monitoring.host_facts(Cpu(4, 1000, 850), Memory(1000, 700), 2400)
    values.update(monitoring.host_usage(Cpu(4, 1000, 850), 0.15, Memory(1000, 700), Traffic(11, 22)))
    values["MODELNAME"] = 'Intel(R) "Fast", 8*2 $x `y` \x1b[1m'
    values["HOSTNAME"] = "node-1.example.org"
    assert monitoring.lines(values) == (
        "HYPERVISOR=lxc\nTOTALCPU=400\nCPUSPEED=2400\nTOTALMEMORY=1000\nUSEDMEMORY=300\nFREEMEMORY=700\n"
        'FREECPU=340\nUSEDCPU=60\nNETRX=11\nNETTX=22\nMODELNAME="Intel(R) Fast 8 2 x y 1m"\n'
        "HOSTNAME=node-1.example.org\n"
    )


def test_a_share_out_of_range_is_none() -> None:
    assert monitoring.host_usage(Cpu(2, 1, 1), 1.5, Memory(1, 1), Traffic(0, 0))["FREECPU"] == 0
    assert monitoring.host_usage(Cpu(2, 1, 1), -0.5, Memory(1, 1), Traffic(0, 0))["USEDCPU"] == 0


def test_poll() -> None:
    assert monitoring.poll("a", USAGE) == "STATE=a USEDCPU=12.3 USEDMEMORY=65536 NETRX=1 NETTX=2\n"
    assert monitoring.poll("a", None) == "STATE=a USEDCPU=0.0 USEDMEMORY=0 NETRX=0 NETTX=0\n"
    assert monitoring.poll("d", None) == "STATE=d\n"


def test_vm_state() -> None:
    assert monitoring.vm_state(5, "one-5", "RUNNING") == 'VM = [ ID="5", DEPLOY_ID="one-5", STATE="RUNNING" ]\n'


def test_vm_monitor() -> None:
    values = monitoring.vm_usage(USAGE)
    values += monitoring.guest_os({"OS_ID": "debian", "OS_VERSION": '12"\nX="', "OTHER": "no"})
    values += monitoring.disk_sizes([(0, 812), (2, 1)])
    text = monitoring.vm_monitor(5, "one-5", values)
    head, _, rest = text.partition('MONITOR="')
    assert head == 'VM = [ ID="5", DEPLOY_ID="one-5", '
    encoded, _, tail = rest.partition('"')
    assert tail == " ]\n"
    assert base64.b64decode(encoded).decode() == (
        'CPU="12.35"\nMEMORY=65536\nNETRX=1\nNETTX=2\nDISKRDBYTES=3\nDISKWRBYTES=4\nDISKRDIOPS=5\nDISKWRIOPS=6\n'
        'OOM_KILLS=1\nTASKS=12\nGUEST_IP="10.0.0.7"\nGUEST_IP_ADDRESSES="10.0.0.7,2001:db8::7"\n'
        'OS_ID=debian\nOS_VERSION="12 X="\nDISK_SIZE = [ ID=0, SIZE=812 ]\nDISK_SIZE = [ ID=2, SIZE=1 ]\n'
    )


def test_snapshots() -> None:
    assert monitoring.snapshot_sizes([(0, 3, 812)]) == "SNAPSHOT_SIZE = [ ID=3, DISK_ID=0, SIZE=812 ]\n"


def test_wild() -> None:
    text = monitoring.wild("web one", 1.5, 512, "x86_64")
    head, _, rest = text.partition('IMPORT_TEMPLATE="')
    assert head == 'VM = [ ID="-1", VM_NAME="web one", DEPLOY_ID="web one", '
    assert base64.b64decode(rest.partition('"')[0]).decode() == (
        'NAME="web one"\nVCPU=2\nMEMORY=512\nHYPERVISOR=lxc\nCPU="1.5"\nDEPLOY_ID="web one"\nOS=[ARCH="x86_64"]\n'
    )
