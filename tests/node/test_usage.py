"""Numbers of real containers, as the installed probes, run by oneadmin, see them."""

from __future__ import annotations

import base64
import os
import re
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support import machine
from tests.support.plain import Plain
from tests.support.vms import MONITORD, Driver
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
PROBES = "onelxc-probes.d"
STATE = "/var/tmp/one_db"
IDLE = "while true; do sleep 1000; done"


@pytest.fixture
def plain() -> Iterator[Callable[..., Plain]]:
    made: list[Plain] = []

    def make(name: str, script: str = IDLE, **options: object) -> Plain:
        made.append(Plain(name, script, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for container in made:
        container.end()


def probe(driver: Driver, name: str) -> str:
    return driver.probe(f"{PROBES}/{name}/onelxc", "lxc", 2, "node1", stdin="<MONITOR_CONFIGURATION/>").ok().out


def values(text: str) -> dict[str, str]:
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in text.splitlines())}


def monitored(driver: Driver) -> dict[int, dict[str, str]]:
    """vm/monitor's answer, by VM."""
    found = {}
    for line in probe(driver, "vm/monitor").splitlines():
        match = re.fullmatch(r'VM = \[ ID="(\d+)", DEPLOY_ID="one-\1", MONITOR="([^"]*)" \]', line)
        assert match, line
        found[int(match.group(1))] = values(base64.b64decode(match.group(2)).decode())
    return found


def test_cpu_of_a_busy_and_an_idle_container(driver: Driver, plain: Callable[..., Plain]) -> None:
    plain("one-901", "while true; do true; done")
    plain("one-902")
    pid = machine.init_pid("one-901")

    def used() -> tuple[float, float]:
        """(CPU seconds of its one process, when)."""
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), time.monotonic()

    # whatever share of the processor the machine has left for it: between these, the probe has looked
    before = used()
    monitored(driver)
    after = used()
    wait_until(lambda: used()[0] - after[0] > 0.5 and used()[1] - after[1] > 1.5, "it has worked for a while")
    before_2 = used()
    found = monitored(driver)
    after_2 = used()
    least = 100 * (before_2[0] - after[0]) / (after_2[1] - before[1])
    most = 100 * (after_2[0] - before[0]) / (before_2[1] - after[1])
    # ticks of 10 ms, and libvirt's controller, which is in the group, too
    assert 0.9 * least - 2 < float(found[901]["CPU"]) < 1.1 * most + 5
    assert float(found[902]["CPU"]) < 5


def test_memory_is_without_the_page_cache(driver: Driver, plain: Callable[..., Plain]) -> None:
    plain("one-903", "dd if=/dev/zero of=/file bs=1M count=30; " + IDLE, disk_mb=100)
    files = ("memory.usage_in_bytes", "libvirt/memory.current", "memory.current")
    groups = (path for path in machine.cgroups() if "one-903" in path or "one\\x2d903" in path)
    used = next(filter(os.path.exists, (os.path.join(group, name) for group in groups for name in files)))

    def usage_kib() -> int:
        with open(used) as file:
            return int(file.read()) // 1024

    wait_until(lambda: usage_kib() > 25 * 1024, "the file is in the cache")
    wait_until(lambda: int(monitored(driver)[903]["MEMORY"]) < 15 * 1024, "the cache does not count")


def test_network_as_the_guest_sees_it(driver: Driver, plain: Callable[..., Plain], bridge: str) -> None:
    plain("one-904", bridge=bridge, address="10.77.0.204")
    before = monitored(driver)[904]
    assert before["GUEST_IP"] == before["GUEST_IP_ADDRESSES"] == "10.77.0.204"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(300):
            try:
                sender.sendto(bytes(1000), ("10.77.0.204", 9))
            except ConnectionRefusedError:  # the guest's answer to the one before
                pass
            time.sleep(0.001)  # not faster than the neighbour's address is found out
    after = monitored(driver)[904]
    received, sent = (int(after[name]) - int(before[name]) for name in ("NETRX", "NETTX"))
    assert received > 100_000 and sent < received / 2


def test_oom_kills_and_tasks(driver: Driver, plain: Callable[..., Plain]) -> None:
    eater = "(x=0123456789; while true; do x=$x$x; done) & " + IDLE
    plain("one-905", eater, memory_kib=40960)
    wait_until(lambda: int(monitored(driver)[905]["OOM_KILLS"]) == 1, "the kernel has killed the eater")
    # the controller with its threads, the shell and its sleep
    assert int(monitored(driver)[905]["TASKS"]) >= 3


def test_a_container_of_others_is_offered_and_left_alone(driver: Driver, plain: Callable[..., Plain]) -> None:
    wild = plain("web.example", memory_kib=131072)
    before = machine.init_pid("web.example")
    probes = ("host/beacon", "host/monitor", "vm/status", "vm/monitor", "vm/execution", "vm/snapshot")
    assert not [name for name in probes if "web.example" in probe(driver, name)]
    text = probe(driver, "host/system")
    offered = next(line for line in text.splitlines() if line.startswith("VM = "))
    match = re.fullmatch(r'VM = \[ ID="-1", VM_NAME="(.*?)", DEPLOY_ID="(.*?)", IMPORT_TEMPLATE="(.*?)" \]', offered)
    assert match and match.group(1) == match.group(2) == "web.example"
    template = values(base64.b64decode(match.group(3)).decode())
    assert template["MEMORY"] == "128" and template["HYPERVISOR"] == "lxc"
    assert machine.init_pid("web.example") == before
    assert wild.inside("echo alive") == "alive\n"


def test_host(driver: Driver) -> None:
    facts, used = values(probe(driver, "host/system")), values(probe(driver, "host/monitor"))
    with open("/proc/meminfo") as file:
        total_kib = int(file.readline().split()[1])
    assert facts["HYPERVISOR"] == used["HYPERVISOR"] == "lxc"
    assert int(facts["TOTALMEMORY"]) == total_kib
    assert int(used["USEDMEMORY"]) + int(used["FREEMEMORY"]) == total_kib
    assert int(used["USEDCPU"]) + int(used["FREECPU"]) == int(facts["TOTALCPU"])
    assert facts["CGROUPS_VERSION"] == ("2" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "1")
    assert "ONELXC_WARNING" not in facts
    assert "ARCH" not in facts, "OpenNebula's own probe beside ours says it"
