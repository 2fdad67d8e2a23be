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
    "console": ("onelxc.root.consolelog", "verb"),
    "record": ("onelxc.root.record", "verb"),
}

ONE_SHOT: dict[str, tuple[str, str]] = {}
