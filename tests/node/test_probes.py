"""The probes and poll on deployed VMs: what they say, when, and what has been let go of by then."""

from __future__ import annotations

import base64
import os
import re

import pytest

from tests.support import hostconf, machine
from tests.support.vms import HOST, MONITORD, PULL, Driver, Vm
from tests.support.waiting import wait_until

CONFIGURATION = "<MONITOR_CONFIGURATION><PROBES_PERIOD/></MONITOR_CONFIGURATION>"
BOTH = pytest.mark.parametrize("driver", [PULL, MONITORD], indirect=True)
MODERN = pytest.mark.parametrize("driver", [MONITORD], indirect=True)
OLD = pytest.mark.parametrize("driver", [PULL], indirect=True)


def probe(driver: Driver, name: str) -> str:
    return driver.probe(f"onelxc-probes.d/{name}/onelxc", "lxc", 2, HOST, stdin=CONFIGURATION).ok().out


def states(driver: Driver) -> dict[int, str]:
    """vm/status's answer, by VM. Each call here has a parent of its own, as a new client: so it tells of all VMs."""
    first, second, *lines = probe(driver, "vm/status").splitlines()
    assert (first, second) == ("SYNC_STATE=yes", "MISSING_STATE=POWEROFF")
    found = {}
    for line in lines:
        match = re.fullmatch(r'VM = \[ ID="(\d+)", DEPLOY_ID="one-\1", STATE="(\w+)" \]', line)
        assert match, line
        found[int(match.group(1))] = match.group(2)
    return found


def monitored(driver: Driver, vm_id: int) -> dict[str, str]:
    for line in probe(driver, "vm/monitor").splitlines():
        match = re.fullmatch(r'VM = \[ ID="(\d+)", DEPLOY_ID="one-\1", MONITOR="([^"]*)" \]', line)
        assert match, line
        if int(match.group(1)) == vm_id:
            text = base64.b64decode(match.group(2)).decode()
            return {
                name.strip(): value.strip(' "') for name, _, value in (row.partition("=") for row in text.split("\n"))
            }
    raise AssertionError(f"VM {vm_id} is not in vm/monitor's answer")


def held(one: Vm) -> list[str]:
    """What the host still holds of a VM."""
    return (
        [mount.point for mount in machine.mounts() if mount.point.startswith(f"/var/lib/onelxc/mnt/{one.vm_id}/")]
        + [path for path in machine.loops().values() if path.startswith(one.directory)]
        + [name for name in machine.domains() if name == one.name]
        + [path for path in machine.cgroups() if one.name in path]
        + [link for link in machine.links() if link.startswith(f"{one.name}-")]
    )


def poll(one: Vm) -> dict[str, str]:
    out = one.driver("poll", one.name, HOST, one.vm_id, HOST).ok().out
    assert out.endswith("\n") and out.count("\n") == 1
    return dict(token.split("=") for token in out.split())


def kill_init(one: Vm) -> None:
    os.kill(machine.init_pid(one.name), 9)


@MODERN
def test_status_follows_the_life_of_a_vm(driver: Driver, vm, bridge: str) -> None:  # type: ignore[no-untyped-def]
    one = vm()
    one.add_nic(bridge)
    assert one.vm_id not in states(driver)
    one.deployed().booted()
    assert states(driver)[one.vm_id] == "RUNNING"
    one.inside("kill -USR2 1", check=False)

    def off() -> bool:
        state = states(driver)[one.vm_id]
        if state == "POWEROFF":
            assert held(one) == [], "POWEROFF was said too early"
        return state == "POWEROFF"

    wait_until(off, "the VM that switched itself off is reported so")
    one.deployed().booted(2)
    assert states(driver)[one.vm_id] == "RUNNING"
    one.act("cancel").ok()
    assert states(driver).get(one.vm_id, "POWEROFF") == "POWEROFF"


@MODERN
def test_a_reboot_from_inside_is_no_poweroff(driver: Driver, vm) -> None:  # type: ignore[no-untyped-def]
    one = vm()
    one.deployed().booted()
    first = machine.init_pid(one.name)
    one.inside("kill -TERM 1", check=False)  # busybox init reboots on it
    said = set()

    def again() -> bool:
        said.add(states(driver)[one.vm_id])
        return one.runs_anew(first)

    wait_until(again, "the container is back", interval_s=0)
    one.booted(2)
    said.add(states(driver)[one.vm_id])
    assert "POWEROFF" not in said
    assert states(driver)[one.vm_id] == "RUNNING"


@MODERN
def test_a_deploy_in_flight_is_neither_running_nor_off(driver: Driver, vm) -> None:  # type: ignore[no-untyped-def]
    one = vm()
    said = []
    running = one.start_deploy()
    while not running.ended:
        state = states(driver).get(one.vm_id)
        if not running.ended:
            said.append(state)
    running.wait().ok()
    assert "POWEROFF" not in said
    assert states(driver)[one.vm_id] == "RUNNING"


@MODERN
def test_held_still_by_a_snapshot_is_running(driver: Driver, vm) -> None:  # type: ignore[no-untyped-def]
    one = vm()
    one.deployed().booted()
    assert states(driver)[one.vm_id] == "RUNNING"
    sudo = ("runuser", "-u", "oneadmin", "--", "sudo", "-n")
    machine.command(*sudo, "lxc-freeze", "-n", one.name)
    try:
        assert states(driver)[one.vm_id] == "RUNNING"
        assert int(monitored(driver, one.vm_id)["MEMORY"]) > 0
    finally:
        machine.command(*sudo, "lxc-unfreeze", "-n", one.name)
    assert states(driver)[one.vm_id] == "RUNNING"


@MODERN
def test_numbers_of_a_deployed_vm(driver: Driver, vm) -> None:  # type: ignore[no-untyped-def]
    one = vm()
    one.deployed().booted()
    before = monitored(driver, one.vm_id)
    one.inside("mkdir -p /etc; printf 'ID=testos\\nVERSION_ID=\"7 $(x)\"\\n' > /etc/os-release")
    one.inside("dd if=/dev/zero of=/file bs=1M count=5 conv=fsync; dd if=/file of=/dev/null bs=1M iflag=direct")
    # as tm/snap_create leaves one, of which 1 MB is taken
    snapshot = one.path("disk.0.snap/1")
    os.mkdir(os.path.dirname(snapshot))
    machine.command("chown", "oneadmin", os.path.dirname(snapshot))
    with open(snapshot, "wb") as file:
        file.write(bytes(1 << 20))
        file.truncate(8 << 20)
    os.unlink("/var/tmp/one_db/onelxc-vm-facts")  # as after ten minutes
    after = monitored(driver, one.vm_id)
    assert int(before["DISKWRBYTES"]) <= os.stat(one.path("disk.0")).st_size, "what the device held before counts"
    assert int(after["DISKWRBYTES"]) - int(before["DISKWRBYTES"]) >= 5 << 20
    assert int(after["DISKWRIOPS"]) > int(before["DISKWRIOPS"])
    assert int(after["DISKRDBYTES"]) - int(before["DISKRDBYTES"]) >= 5 << 20
    assert int(after["DISKRDIOPS"]) > int(before["DISKRDIOPS"])
    taken = os.stat(one.path("disk.0")).st_blocks * 512
    assert after["DISK_SIZE"] == f"[ ID=0, SIZE={-(-taken // (1 << 20))} ]"
    assert (after["OS_ID"], after["OS_VERSION"]) == ("testos", "7 (x)")
    sizes = b"SNAPSHOT_SIZE = [ ID=1, DISK_ID=0, SIZE=1 ]\n"
    encoded = base64.b64encode(sizes).decode()
    assert probe(driver, "vm/snapshot") == f'VM = [ ID="{one.vm_id}", DEPLOY_ID="{one.name}", MONITOR="{encoded}" ]\n'
    assert probe(driver, "host/beacon").strip().isdigit()


@MODERN
@pytest.mark.parametrize("target", ["/etc/hostname", "../../../../../../../../etc/hostname", "/dev/zero"])
def test_os_release_leads_nowhere_outside(driver: Driver, vm, target: str) -> None:  # type: ignore[no-untyped-def]
    """Of the host /etc/hostname is there, of the guest it is not."""
    one = vm()
    one.deployed().booted()
    one.inside(f"mkdir -p /etc; rm -f /etc/hostname /etc/os-release; ln -s {target} /etc/os-release")
    values = monitored(driver, one.vm_id)
    assert not [name for name in values if name.startswith("OS_")]


@MODERN
def test_probes_do_without_libvirtd(driver: Driver, vm) -> None:  # type: ignore[no-untyped-def]
    one = vm()
    one.deployed().booted()
    with machine.libvirtd_away():
        assert states(driver)[one.vm_id] == "RUNNING"
        assert int(monitored(driver, one.vm_id)["MEMORY"]) > 0
        assert "TOTALCPU=" in probe(driver, "host/system")


@MODERN
def test_every_probe_of_the_bundle_answers(driver: Driver) -> None:
    for name in (
        "host/beacon",
        "host/system",
        "host/monitor",
        "vm/status",
        "vm/monitor",
        "vm/execution",
        "vm/snapshot",
    ):
        directory = f"/var/tmp/one/im/onelxc-probes.d/{name}"
        ours = [file for file in os.listdir(directory) if file.startswith("onelxc")]
        assert ours, f"{name} has no probe of ours"
        for file in ours:
            driver.probe(f"onelxc-probes.d/{name}/{file}", "lxc", 2, HOST, stdin=CONFIGURATION).ok()


@BOTH
def test_poll(driver: Driver, vm, bridge: str) -> None:  # type: ignore[no-untyped-def]
    form = {} if driver.pull else {"LXC_UNPRIVILEGED": "no"}
    with hostconf.with_line('PRIVILEGED = "yes"'):
        one = vm(user_template=form)
        one.add_nic(bridge)
        one.deployed().booted()
    assert one.privileged == (form != {})
    answer = poll(one)
    assert set(answer) == {"STATE", "USEDCPU", "USEDMEMORY", "NETRX", "NETTX"}
    assert answer["STATE"] == "a" and 0 < int(answer["USEDMEMORY"]) < 65536
    kill_init(one)
    wait_until(lambda: poll(one) == {"STATE": "d"}, "the VM is gone")
    assert held(one) == []
    assert poll(one) == {"STATE": "d"}


@BOTH
def test_poll_without_a_vm(driver: Driver) -> None:
    assert driver("poll", "one-777", HOST, 777, HOST).ok().out == "STATE=d\n"
    outcome = driver("poll", "one-x", HOST, "x", HOST)
    assert outcome.code == 1 and outcome.out == ""
    assert driver.message(outcome) == "Cannot poll a VM: no VM id in the arguments (DEPLOY_ID HOST ID HOST)"


@OLD
def test_a_vm_deleted_without_a_word_is_ended(driver: Driver, vm) -> None:  # type: ignore[no-untyped-def]
    """3.2.1's `onevm delete` after a poll that said failed: no cancel, only the transfer manager's rm -rf."""
    one = vm()
    one.deployed().booted()
    assert driver.probe("lxc.d/onelxc-reap", "lxc", 2, HOST).ok().out == ""
    assert one.running
    one.delete()
    assert driver.probe("lxc.d/onelxc-reap", "lxc", 2, HOST).ok().out == ""
    assert held(one) == []


@OLD
def test_the_host_for_3_2_1(driver: Driver) -> None:
    """As run_probes does it: all lines in one, which oned splits at commas."""
    text = driver.probe("lxc.d/onelxc", "lxc", 2, HOST).ok().out
    assert "," not in text and "*" not in text
    values = dict(line.split("=", 1) for line in text.splitlines())
    cpu = ["TOTALCPU", "CPUSPEED", "USEDCPU", "FREECPU"]
    memory = ["TOTALMEMORY", "USEDMEMORY", "FREEMEMORY"]
    assert set(values) == {"HYPERVISOR", *cpu, *memory, "NETRX", "NETTX", "ARCH", "MODELNAME", "HOSTNAME"}
    assert all(values[name].isdigit() for name in (*cpu, *memory, "NETRX", "NETTX"))
