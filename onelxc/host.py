"""What has this host, and what is in use? Processors, memory, network, names: from /proc and /sys alone.

libvirt's getInfo() is wrong on some machines (6 of 24 GiB seen), lscpu and vmstat are processes that take a second.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from onelxc import kernelfile


class Cpu(NamedTuple):
    """All processors together since boot, in ticks. `free` is idle time, waiting for disks included."""

    processors: int
    total: int
    free: int


class Memory(NamedTuple):
    """In KiB; `free` is what programs could get without swapping."""

    total_kib: int
    free_kib: int


class Traffic(NamedTuple):
    """Bytes since boot, over the host's own network cards."""

    received: int
    sent: int


def cpu(root: str = "") -> Cpu:
    """From /proc/stat: processors that are offline do not count."""
    lines = kernelfile.text(f"{root}/proc/stat").splitlines()
    count = sum(line.startswith("cpu") for line in lines) - 1
    # user nice system idle iowait irq softirq steal; the two after them (guest) are contained in user and nice
    ticks = [int(word) for word in lines[0].split()[1:9]]
    return Cpu(count, sum(ticks), ticks[3] + ticks[4])


def memory(root: str = "") -> Memory:
    """From /proc/meminfo; MemAvailable is the kernel's own estimate of what is to be had."""
    info = kernelfile.table(f"{root}/proc/meminfo")
    free = info.get("MemAvailable")
    if free is None:
        free = info.get("MemFree", 0) + info.get("Buffers", 0) + info.get("Cached", 0)
    return Memory(info.get("MemTotal", 0), min(free, info.get("MemTotal", 0)))


def traffic(root: str = "") -> Traffic:
    """Only devices that are hardware (or a virtual machine's idea of it): bridges and veths would count twice."""
    base = f"{root}/sys/class/net"
    try:
        devices = os.listdir(base)
    except OSError:
        devices = []
    received = sent = 0
    for device in devices:
        if os.path.exists(f"{base}/{device}/device"):
            received += kernelfile.number(f"{base}/{device}/statistics/rx_bytes") or 0
            sent += kernelfile.number(f"{base}/{device}/statistics/tx_bytes") or 0
    return Traffic(received, sent)


def cpu_speed_mhz(root: str = "") -> int:
    """The highest clock of the first processor; 0 where nothing tells (many ARM machines)."""
    khz = kernelfile.number(f"{root}/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if khz:
        return khz // 1000
    for line in kernelfile.text(f"{root}/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        # x86; POWER says "clock : 3425.000000MHz"
        if name.strip() in ("cpu MHz", "clock"):
            return _whole_number(value)
    return 0


def _whole_number(value: str) -> int:
    digits = value.strip().partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def model_name(root: str = "") -> str:
    """The processor's name; where /proc/cpuinfo has none (ARM), the machine's or just the architecture."""
    lines = [line.partition(":") for line in kernelfile.text(f"{root}/proc/cpuinfo").splitlines()]
    known = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    for name in ("model name", "cpu", "Model", "Hardware"):
        if known.get(name):
            return known[name]
    return kernelfile.text(f"{root}/proc/device-tree/model").strip("\0") or architecture()


def architecture() -> str:
    return os.uname().machine


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 1) of a kernel's `release`, 6.1.0-18-amd64; (0, 0) of what is none."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def host_name() -> str:
    return os.uname().nodename
