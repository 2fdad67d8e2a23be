"""Which verbs does the helper know, and which function answers each?

`"verb": ("module", "function")`, imported only when asked for. In a session the function is called as
`function(work, request)`, `request` being the caller's JSON object without its "do"; a one-shot verb, which holds no
VM's lock, as `function(config, request, log)`. Both give plain JSON data and raise the errors of `onelxc.errors`.
Everything in `request` comes from an unprivileged process: see `validate`.
"""

from __future__ import annotations

VERBS: dict[str, tuple[str, str]] = {
    "release": ("onelxc.root.release", "verb"),
    "prepare": ("onelxc.root.prepare", "verb"),
    "commit": ("onelxc.root.record", "commit"),
    "kept": ("onelxc.root.record", "kept"),
    "freeze": ("onelxc.root.freezer", "verb_freeze"),
    "thaw": ("onelxc.root.freezer", "verb_thaw"),
    "exec": ("onelxc.root.execution", "start"),
    "exec_cancel": ("onelxc.root.execution", "cancel"),
    "telinit": ("onelxc.root.telinit", "verb"),
    "refresh": ("onelxc.root.refresh", "verb"),
    "attach_disk": ("onelxc.root.livedisks", "attach"),
    "detach_disk": ("onelxc.root.livedisks", "detach"),
    "resize_disk": ("onelxc.root.growth", "resize"),
    "snapshot_create": ("onelxc.root.snapshots", "create"),
    "snapshot_check": ("onelxc.root.snapshots", "check"),
    "snapshot_revert": ("onelxc.root.snapshots", "revert"),
    "snapshot_delete": ("onelxc.root.snapshots", "delete"),
    "reconfigure": ("onelxc.root.reconfigure", "verb"),
    "resize": ("onelxc.root.record", "resize"),
    "console": ("onelxc.root.consolelog", "verb"),
    "record": ("onelxc.root.known", "verb"),
    "new_nic": ("onelxc.root.network", "new_nic"),
    "attach_nic": ("onelxc.root.network", "attach_nic"),
    "detach_nic": ("onelxc.root.network", "detach_nic"),
    "settle": ("onelxc.root.refresh", "settle"),
}

ONE_SHOT: dict[str, tuple[str, str]] = {
    "reap": ("onelxc.root.reap", "verb"),
    "check": ("onelxc.root.check", "verb"),
    "sample": ("onelxc.root.sample", "verb"),
    "executions": ("onelxc.root.execution", "finished"),
}

ANY_VERSION = ("reap", "sample", "executions")
"""One-shot verbs of the probes, whose form never changes. Between an upgrade of the front-end and `install.sh node` on
a host actions are refused, but a host that could not be looked at would go to ERROR with all its VMs.
"""
