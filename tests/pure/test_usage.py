"""Readers of /proc, /sys and cgroups against small trees: a systemd host, one with cgroup v1, an ARM board."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onelxc import cgroup, containers, host, kernelfile, samples, usage
from onelxc.containers import Container

STAT = "%d (libvirt_lxc) S 1 1 1 0 -1 4194560 1124 0 0 0 1 1 0 0 20 0 3 0 %d 1 1"
DEEP = 1800
SCOPE = "/machine.slice/machine-lxc\\x2d4242\\x2done\\x2d5.scope"


def plant(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.fixture
def systemd_host(tmp_path: Path) -> str:
    """cgroup v2 under systemd: the scope's inner group holds the limits and the processes."""
    inner = f"/sys/fs/cgroup{SCOPE}/libvirt"
    return plant(
        tmp_path,
        {
            "/run/libvirt/lxc/driver.pid": "999",
            "/run/libvirt/lxc/one-5.pid": "4242",
            "/run/libvirt/lxc/one-6.pid": "4300",
            "/run/libvirt/lxc/one-7.pid": "4400",
            "/run/libvirt/lxc/one-5.xml": "<x/>",
            "/proc/4242/status": "Name:\tlibvirt_lxc\nNSpid:\t4242\n",
            "/proc/4242/cmdline": "/usr/lib/libvirt/libvirt_lxc\0--name\0one-5\0--console\x0022\0",
            "/proc/4242/cgroup": f"0::{SCOPE}/libvirt/init.scope\n",
            "/proc/4242/stat": STAT % (4242, 1000),
            "/proc/4242/task/4242/children": "4243 ",
            # the number of a dead controller is used by another process now
            "/proc/4300/status": "Name:\tsshd\nNSpid:\t4300\n",
            "/proc/4300/cmdline": "/usr/sbin/sshd\0-D\0",
            # as that of another is used by a container's process, which calls itself as it likes
            "/proc/4400/status": "Name:\tx\rNSpid:\t4400\nNSpid:\t4400\t7\n",
            "/proc/4400/cmdline": "/usr/lib/libvirt/libvirt_lxc\0--name\0one-7\0",
            "/proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\nproc /proc proc rw 0 0\n",
            f"{inner}/cpu.stat": "usage_usec 2500000\nuser_usec 1000000\n",
            f"{inner}/cpu.max": "150000 100000\n",
            f"{inner}/memory.current": "104857600\n",
            f"{inner}/memory.max": "268435456\n",
            f"{inner}/memory.stat": "anon 1000\nfile 5000\ninactive_file 52428800\n",
            f"{inner}/memory.events": "low 0\nhigh 0\nmax 7\noom 2\noom_kill 3\n",
            f"{inner}/pids.current": "12\n",
            f"{inner}/cgroup.events": "populated 1\nfrozen 0\n",
            f"/sys/fs/cgroup{SCOPE}/cgroup.events": "populated 1\nfrozen 0\n",
        },
    )


@pytest.fixture
def old_host(tmp_path: Path) -> str:
    """cgroup v1 without systemd, with a cgroup2 mount beside that counts nothing."""
    group = "machine/lxc-4242-one-5.libvirt-lxc"
    return plant(
        tmp_path,
        {
            "/proc/mounts": "".join(
                f"cgroup /sys/fs/cgroup/{name} cgroup rw,{name} 0 0\n"
                for name in ("cpu,cpuacct", "memory", "freezer", "pids")
            )
            + "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            "/proc/4242/cgroup": f"8:pids:/\n4:memory:/{group}\n3:freezer:/{group}\n2:cpu,cpuacct:/{group}\n0::/\n",
            f"/sys/fs/cgroup/cpu,cpuacct/{group}/cpuacct.usage": "2500000000\n",
            f"/sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_quota_us": "-1\n",
            f"/sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_period_us": "100000\n",
            f"/sys/fs/cgroup/cpu,cpuacct/{group}/tasks": "1\n2\n3\n",
            f"/sys/fs/cgroup/cpu,cpuacct/{group}/init.scope/tasks": "4\n",
            f"/sys/fs/cgroup/memory/{group}/memory.usage_in_bytes": "104857600\n",
            f"/sys/fs/cgroup/memory/{group}/memory.limit_in_bytes": "9223372036854771712\n",
            f"/sys/fs/cgroup/memory/{group}/memory.stat": "inactive_file 1\ntotal_inactive_file 52428800\n",
            f"/sys/fs/cgroup/memory/{group}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            f"/sys/fs/cgroup/freezer/{group}/freezer.state": "THAWED\n",
        },
    )


def test_only_live_controllers_are_containers(systemd_host: str) -> None:
    assert containers.running(systemd_host) == [Container("one-5", 4242)]
    assert containers.started_s(Container("one-5", 4242), systemd_host) == 10.0


def test_no_directory_of_libvirt_is_no_container(tmp_path: Path) -> None:
    assert containers.running(str(tmp_path)) == []


def test_version_2(systemd_host: str) -> None:
    mounted = cgroup.mounts(systemd_host)
    groups = cgroup.of(4242, mounted, systemd_host)
    assert cgroup.version(mounted) == 2
    assert groups.unified == f"{systemd_host}/sys/fs/cgroup{SCOPE}/libvirt"
    assert cgroup.cpu_ns(groups) == 2_500_000_000
    assert cgroup.memory_kib(groups) == 50 * 1024
    assert cgroup.memory_limit_kib(groups) == 256 * 1024
    assert cgroup.cpu_quota(groups) == 1.5
    assert cgroup.oom_kills(groups) == 3
    assert cgroup.tasks(groups) == 12
    assert not cgroup.frozen(groups)


def test_version_2_frozen_at_the_scope(systemd_host: str) -> None:
    plant(Path(systemd_host), {f"/sys/fs/cgroup{SCOPE}/cgroup.events": "populated 1\nfrozen 1\n"})
    assert cgroup.frozen(cgroup.of(4242, cgroup.mounts(systemd_host), systemd_host))


def test_version_1(old_host: str) -> None:
    mounted = cgroup.mounts(old_host)
    groups = cgroup.of(4242, mounted, old_host)
    assert cgroup.version(mounted) == 1
    assert cgroup.cpu_ns(groups) == 2_500_000_000
    assert cgroup.memory_kib(groups) == 50 * 1024
    assert cgroup.memory_limit_kib(groups) is None
    assert cgroup.cpu_quota(groups) is None
    assert cgroup.oom_kills(groups) == 3
    assert cgroup.tasks(groups) == 4
    assert not cgroup.frozen(groups)
    plant(Path(old_host), {"/sys/fs/cgroup/freezer/machine/lxc-4242-one-5.libvirt-lxc/freezer.state": "FROZEN\n"})
    assert cgroup.frozen(groups)


def test_a_process_that_has_gone_has_no_groups(systemd_host: str, old_host: str) -> None:
    for root in (systemd_host, old_host):
        assert cgroup.cpu_ns(cgroup.of(1, cgroup.mounts(root), root)) is None


def test_network_and_disks_from_the_guests_side(systemd_host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "directory", lambda: "/nonexistent")
    net = "/sys/class/net"
    plant(
        Path(systemd_host),
        {
            f"{net}/one-5-0/statistics/rx_bytes": "100\n",
            f"{net}/one-5-0/statistics/tx_bytes": "2000\n",
            f"{net}/one-5-10/statistics/rx_bytes": "1\n",
            f"{net}/one-5-10/statistics/tx_bytes": "2\n",
            f"{net}/one-51-0/statistics/rx_bytes": "7777\n",
            f"{net}/one-51-0/statistics/tx_bytes": "7777\n",
            "/proc/self/mountinfo": (
                "40 1 7:3 / /var/lib/onelxc/mnt/5/root rw - ext4 /dev/loop3 rw\n"
                "41 1 7:3 / /var/lib/onelxc/mnt/5/base rw - ext4 /dev/loop3 rw\n"
                "42 1 7:4 / /var/lib/onelxc/mnt/5/disk.2 rw - ext4 /dev/loop4 rw\n"
                "43 1 7:5 / /var/lib/onelxc/mnt/51/root rw - ext4 /dev/loop5 rw\n"
                "44 1 0:50 / /var/lib/onelxc/mnt/5/context rw - tmpfs tmpfs rw\n"
            ),
            "/sys/dev/block/7:3/stat": "10 0 80 5 20 0 160 5 0 5 5\n",
            "/sys/dev/block/7:4/stat": "1 0 8 5 2 0 16 5 0 5 5\n",
            # what the device had counted for its earlier image
            "/run/onelxc/io/7:4": "1 0 0 5 1 0 8 5 0 5 5\n",
            "/sys/dev/block/7:5/stat": "9 9 9 9 9 9 9 9 9 9 9\n",
            "/proc/4243/net/fib_trie": (
                "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.7\n"
                "        /32 host LOCAL\nLocal:\n     |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 10.0.0.7\n"
                "        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n"
            ),
            "/proc/4243/net/if_inet6": (
                "00000000000000000000000000000001 01 80 10 80       lo\n"
                "fe80000000000000021ea7fffe000001 02 40 20 80     eth0\n"
                "20010db8000000000000000000000007 02 40 00 80     eth0\n"
            ),
        },
    )
    used = usage.Readings("test", systemd_host).of(Container("one-5", 4242))
    assert used is not None
    assert used.net == usage.Net(received=2002, sent=101)
    assert used.io == usage.Io(read_bytes=88 * 512, written_bytes=168 * 512, reads=10, writes=21)
    assert used.addresses == ("10.0.0.7", "2001:db8::7")
    assert (used.memory_kib, used.oom_kills, used.tasks) == (51200, 3, 12)
    # no reading before: 2.5 s of CPU since the container's start, 10 s after boot
    assert used.cpu_percent == pytest.approx(250 / (samples.now_s() - 10), rel=0.01)


def test_host(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "/proc/stat": "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 50 0 25 400 25 0 0 0\ncpu3 1 1 1 1 1 0 0 0\nintr 5\n",
            "/proc/meminfo": "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 700 kB\nBuffers: 1 kB\nCached: 2 kB\n",
            "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\ncpu MHz\t\t: 1999.98\n",
            "/sys/class/net/eth0/device/vendor": "x",
            "/sys/class/net/eth0/statistics/rx_bytes": "11",
            "/sys/class/net/eth0/statistics/tx_bytes": "22",
            "/sys/class/net/br0/statistics/rx_bytes": "500",
        },
    )
    assert host.cpu(root) == host.Cpu(processors=2, total=1000, free=850)
    assert host.memory(root) == host.Memory(1000, 700)
    assert host.traffic(root) == host.Traffic(11, 22)
    assert host.cpu_speed_mhz(root) == 1999
    assert host.model_name(root) == "Some CPU @ 2GHz"
    plant(tmp_path, {"/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3400000\n"})
    assert host.cpu_speed_mhz(root) == 3400


def test_an_arm_board_tells_little(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "/proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\nCPU part\t: 0xd08\n\nModel\t\t: Raspberry Pi 4\n",
            "/proc/meminfo": "MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 10 kB\nCached: 20 kB\n",
        },
    )
    assert host.cpu_speed_mhz(root) == 0
    assert host.model_name(root) == "Raspberry Pi 4"
    assert host.memory(root) == host.Memory(1000, 130)
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\n")
    assert host.model_name(root) == host.architecture()


def test_kernelfile_of_what_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "gone")
    assert (kernelfile.text(missing), kernelfile.number(missing), kernelfile.table(missing)) == ("", None, {})
    (tmp_path / "limit").write_text("max\n")
    assert kernelfile.number(str(tmp_path / "limit")) is None


def test_of_a_million_addresses_the_first_are_told(systemd_host: str) -> None:
    """A tenant may have as many as he likes; what is told has to fit a datagram."""
    ours = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}" for number in range(300_000)]
    routes = "".join(f"     |-- {address}\n        /32 host LOCAL\n" for address in ours)
    plant(Path(systemd_host), {"/proc/4243/net/fib_trie": f"Main:\n{routes}"})
    found = usage.addresses(Container("one-5", 4242), systemd_host)
    assert found[:2] == ("10.0.0.0", "10.0.0.1")
    assert len(found) == 32


def test_control_groups_that_lie_deep_are_no_trouble(systemd_host: str) -> None:
    """On version 2 a tenant makes his own, below the one that is looked at."""
    top = os.path.join(systemd_host, f"sys/fs/cgroup{SCOPE}/libvirt")
    os.unlink(f"{top}/pids.current")
    plant(Path(systemd_host), {f"/sys/fs/cgroup{SCOPE}/libvirt/cgroup.threads": "1\n2\n"})
    here = os.getcwd()
    os.chdir(top)
    for _ in range(DEEP):
        os.mkdir("g")
        os.chdir("g")
    try:
        assert cgroup.tasks(cgroup.of(4242, cgroup.mounts(systemd_host), systemd_host)) == 2
    finally:
        for _ in range(DEEP):
            os.chdir("..")
            os.rmdir("g")
        os.chdir(here)
