"""What OpenNebula reads from us: stdout is the result and nothing else, stderr one line of error.

Rules: the front-end's CommandManager.rb and DriverExecHelper.rb at each tag. Up to 6.0.2 the error has to stand in a
frame; later the whole of stderr is shown, and from 6.99.80 on every line that does not look like `LEVEL: text`.
Nothing else in the package prints.
"""

from __future__ import annotations

import os
import sys

from onelxc.errors import line

FRAME_BEGIN = "ERROR MESSAGE --8<------"
FRAME_END = "ERROR MESSAGE ------>8--"


class Report:
    """The mouth of one executable. `framed` as the installation was found to want it; `verbose` prints INFO lines."""

    def __init__(self, action: str, *, framed: bool, verbose: bool = False) -> None:
        self.action = action
        self.framed = framed
        self.verbose = verbose

    def result(self, text: str) -> None:
        """Print the action's result; called once, last."""
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
        sys.stdout.flush()

    def info(self, text: str) -> None:
        """A line for the log, only when asked for: 6.0.3 to 6.10 show all of stderr to the user."""
        if self.verbose:
            sys.stderr.write(f"INFO: {self.action}: {line(text)}\n")

    def error(self, error: BaseException | str) -> None:
        """The one line for the user. It carries no prefix: 7.x keeps `ERROR: …` from the user."""
        text = line(str(error)) or type(error).__name__
        if self.framed:
            text = f"{FRAME_BEGIN}\n{text}\n{FRAME_END}"
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def silence_stdout_of_children() -> None:
    """Give descriptor 1 of what we start to nobody, keeping ours for `Report.result`."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w")
