"""What do all probes have in common? argv `NAME HOST_ID HOST`, a result on stdout, one line on stderr if it fails.

A probe that fails takes more with it than itself: at the start of monitoring the whole host goes to ERROR, and 3.2.1
drops all values of that round. So a probe fails only where silence would be read as news, and says why in one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from onelxc.errors import OneLxcError


def main(run: Callable[[], str]) -> int:
    """Print what `run` gives; the exit code."""
    try:
        text = run()
    except OneLxcError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"Cannot look at this host: {error.filename or 'system call'}: {error.strerror}\n")
        return 1
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0
