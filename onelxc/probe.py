"""What do all probes have in common? argv `NAME HOST_ID HOST`, a result on stdout, one line on stderr if it fails.

A probe that fails takes more with it than itself: at the start of monitoring the whole host goes to ERROR, and 3.2.1
drops all values of that round. So a probe fails only where silence would be read as news, and says why in one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from onelxc.errors import OneLxcError, told

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main(run: Callable[[], str], *, action: str = "") -> NoReturn:
    """Print what `run` gives, and end the process. `action` is the name of one that OpenNebula's driver calls: its
    error goes to the user, in the form that the front-end wants.
    """
    try:
        text = run()
        sys.stdout.write(text)
        sys.stdout.flush()
    except OneLxcError as error:
        _fail(str(error), action)
    except BaseException as error:  # a fault of our own is one line too
        _fail(f"Cannot look at this host: {told(error)}", action)
    # not by way of the interpreter's tear-down, some milliseconds of every few seconds
    os._exit(0)


def _fail(text: str, action: str) -> NoReturn:
    from onelxc import config
    from onelxc.report import Report

    framed = False
    if action:
        try:
            framed = config.front_end(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))).framed
        except OneLxcError:
            pass  # it is the other error that matters
    try:
        Report(action, framed=framed).error(text)
    finally:
        os._exit(1)
