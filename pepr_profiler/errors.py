"""The errors a user can meet. Each says what failed, why, and the exact fix."""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from collections.abc import Sequence


class PeprError(Exception):
    """What failed, why, and the exact fix (a command to run, a flag to pass).

    `status` is the exit status the command line gives it: 2 for a usage error, 125 for a
    failure of the profiler's own, 126/127 for a command that cannot be executed / is not found.
    """

    status = 125

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.fix:
            text += f"\n  fix: {self.fix}"
        return text


class PeprWarning(UserWarning):
    """What went wrong in a block that runs: it never raises into the program."""


class UnmeasuredError(Exception):
    """`command`, which does not run yet, cannot be measured, for its cause."""

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__(f"{command[0]} cannot be measured")
        self.command = list(command)


class UsageError(PeprError):
    """The request itself is wrong (an option, a table, a pattern); nothing was started."""

    status = 2


class SensorError(PeprError):
    """A sensor cannot be opened. `denied`: only permission is missing."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", denied: bool = False) -> None:
        super().__init__(what, why=why, fix=fix)
        self.denied = denied


class TraceError(PeprError):
    """A recording cannot be read: foreign, empty or of a newer schema."""


class TargetError(PeprError):
    """A running process cannot be attached to."""


class CommandError(PeprError):
    """The command to profile cannot be executed (126) or is not found (127)."""

    def __init__(self, what: str, *, status: int, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.status = status


def warning(code: str, text: str, hint: str) -> dict[str, str]:
    """A warning as a summary has it."""
    return {"code": code, "text": text, "hint": hint}


def reason_of(error: BaseException) -> str:
    """An unforeseen error in one line; NumPy's own has a page."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def fix_of(error: BaseException) -> str:
    """What usually helps against an unforeseen error."""
    import errno

    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return "allow more open files: ulimit -n 256"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
        return "give --store DIR (or PEPR_STORE) that can be written"
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return "allow more memory: ulimit -v unlimited"
    if number == errno.EAGAIN or "thread" in str(error):
        return "allow more processes and threads (ulimit -u) and memory (ulimit -v)"
    return "see: pepr-profile sensors; if it works there, report this as a bug of pepr-profiler"
