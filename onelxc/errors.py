"""What can go wrong, by who has to act on it.

One base class. A subclass exists only where a reader or a caller acts differently. The message is one line,
`Cannot <verb> <object>: <cause, in the tool's own words>`, and is what the user of OpenNebula reads.
"""

from __future__ import annotations

LINE_LIMIT, _END = 2000, 500
"""Characters of a line of text: what it quotes may be a tenant's, and as long as he likes."""


def line(text: str) -> str:
    """One line of bounded length that only prints. For every text that leaves us, since it may quote a tenant: control
    characters, C1 among them, and those that turn the direction of writing would act on somebody's terminal.
    """
    if len(text) > LINE_LIMIT:
        # the cause stands at the end, behind what is quoted
        text = f"{text[: -_END + LINE_LIMIT]} (and so on) {text[-_END:]}"
    short = " ".join(text.split())
    return short if short.isprintable() else "".join(c if c.isprintable() else "?" for c in short)


class OneLxcError(Exception):
    """Base of all errors that reach the user; `str()` is one line of text."""

    def __str__(self) -> str:
        return line(super().__str__())


def told(error: BaseException) -> str:
    """Any error as the one line that its reader gets. A fault of our own reads like an error, not like Python."""
    if isinstance(error, OneLxcError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return line(f"{error.filename or 'system call'}: {error.strerror}")
    where = ""
    place = error.__traceback__
    while place is not None:
        where = f" ({place.tb_frame.f_code.co_filename.rpartition('/')[2]}:{place.tb_lineno})"
        place = place.tb_next
    return line(f"internal error: {type(error).__name__}: {error}") + where


class TemplateError(OneLxcError):
    """The VM's template is wrong; its author has to change it."""


class ConfigurationError(OneLxcError):
    """The driver's or the host's configuration is wrong; the administrator has to change it."""


class NotSupportedError(OneLxcError):
    """Containers cannot do this; the text says what to do instead."""


class CommandError(OneLxcError):
    """A program failed. `status` is its exit code, negative for a signal, None if it did not start or timed out."""

    def __init__(self, message: str, *, status: int | None = None, stderr: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.stderr = stderr


class StorageError(OneLxcError):
    """An image or a mount is not what it has to be."""


class HypervisorError(OneLxcError):
    """libvirt said no. `code` is its VIR_ERR_* number, None where there is none."""

    def __init__(self, message: str, *, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class NoSuchDomainError(HypervisorError):
    """libvirt knows no domain of that name."""


class LibvirtGoneError(HypervisorError):
    """libvirt's daemon was restarted, or does not answer; what the container does has nothing to do with it."""


class HelperError(OneLxcError):
    """The root helper is missing, refused the request or is of another version."""


class GiveUpError(OneLxcError):
    """Another action (a cancel) asked this one to stop; everything it took is being given back."""
