"""How fast may a NIC be? INBOUND and OUTBOUND limits of the template, kept by tc at the host side of the veth pair.

Not libvirt's <bandwidth>: that one needs sch_sfq, and where the kernel has none the container does not start. What goes
to the container is what leaves the host side: a token bucket there. What comes from it arrives there, where nothing can
wait: it is led through an ifb device with a token bucket of its own, or, without ifb, what is too much is dropped.
The container's root cannot reach either. A kernel that can do neither is said in the log and stops nobody.

Numbers mean what they mean with KVM (libvirt): averages and peaks in kB/s, bursts in kB at the speed of the peak.
"""

from __future__ import annotations

from collections.abc import Callable

from onelxc.errors import CommandError
from onelxc.model import Bandwidth, Nic
from onelxc.names import ifb_device, nic_device
from onelxc.root.links import Namespace

LATENCY_MS = 100
"""How long a packet may wait for its turn."""
_LARGEST_PACKET = 65536
"""With segmentation offload one packet may be this long; a bucket that never holds it would drop it for ever."""


def shape(host: Namespace, vm_id: int, nic: Nic, log: Callable[[str], None]) -> None:
    """Keep the limits of a NIC whose host side is there. The same again changes nothing; no limits take them away."""
    clear(host, vm_id, nic.nic_id)
    for name, limit in (("INBOUND", nic.inbound), ("OUTBOUND", nic.outbound)):
        if limit is None:
            continue
        try:
            if name == "INBOUND":
                _limit_inbound(host, nic.device, limit)
            else:
                _limit_outbound(host, nic.device, ifb_device(vm_id, nic.nic_id), limit)
        except CommandError as error:
            log(f"NIC {nic.nic_id}: {name}_AVG_BW is not kept, this host's kernel cannot: {error}")


def clear(host: Namespace, vm_id: int, nic_id: int) -> None:
    """Take the limits of a NIC away, whether it has any or not, and whether it is still there or not."""
    device, ifb = nic_device(vm_id, nic_id), ifb_device(vm_id, nic_id)
    names = {link.name: link.kind for link in host.links()}
    if device in names:
        for parent in ("root", "ingress"):
            try:
                host.run("tc", "qdisc", "delete", "dev", device, parent, verb=f"free {device}")
            except CommandError:
                pass  # there was none: tc has no other word for that than an error
    if names.get(ifb) == "ifb":
        host.delete(ifb)


def clear_vm(vm_id: int) -> None:
    """Remove the ifb devices of a VM; all else goes with its veths."""
    with Namespace() as host:
        for link in host.links():
            if link.kind == "ifb" and link.name.startswith(ifb_device(vm_id, "")):
                host.delete(link.name)


def bucket(limit: Bandwidth) -> tuple[str, ...]:
    """The words of a token bucket: `burst` at the speed of `peak`, then the average."""
    words = ["tbf", "rate", f"{limit.average_kib}kbps", "burst", str(_burst(limit)), "latency", f"{LATENCY_MS}ms"]
    if limit.peak_kib is not None and limit.peak_kib > limit.average_kib:
        # the second bucket holds some milliseconds of the peak: less, and timers are too coarse to reach it
        second = max(_LARGEST_PACKET, limit.peak_kib * 1000 // 250)
        words += ["peakrate", f"{limit.peak_kib}kbps", "minburst", str(second)]
    return tuple(words)


def _burst(limit: Bandwidth) -> int:
    """In bytes. Enough for the longest packet, and for what passes between two ticks of a slow clock."""
    return max((limit.burst_kib or 0) * 1024, _LARGEST_PACKET * 2, limit.average_kib * 1000 // 100)


def _limit_inbound(host: Namespace, device: str, limit: Bandwidth) -> None:
    host.run("tc", "qdisc", "replace", "dev", device, "root", *bucket(limit), verb=f"limit {device}")


def _limit_outbound(host: Namespace, device: str, ifb: str, limit: Bandwidth) -> None:
    host.run("tc", "qdisc", "replace", "dev", device, "handle", "ffff:", "ingress", verb=f"limit {device}")
    everything = ["tc", "filter", "add", "dev", device, "parent", "ffff:", "protocol", "all", "prio", "1"]
    everything += ["u32", "match", "u32", "0", "0"]
    try:
        host.run("ip", "link", "add", "name", ifb, "type", "ifb", verb=f"limit {device}")
        host.change(ifb, "up")
        host.run("tc", "qdisc", "replace", "dev", ifb, "root", *bucket(limit), verb=f"limit {device}")
        host.run(*everything, "action", "mirred", "egress", "redirect", "dev", ifb, verb=f"limit {device}")
    except CommandError:
        host.delete(ifb)
        rate, burst = f"{limit.average_kib}kbps", str(_burst(limit))
        police = ("police", "rate", rate, "burst", burst, "mtu", str(_LARGEST_PACKET), "conform-exceed", "drop")
        host.run(*everything, "action", *police, verb=f"limit {device}")
