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
    """`command` cannot be measured, for its cause; `started` says whether it runs already."""

    def __init__(self, command: Sequence[str], *, started: bool = False) -> None:
        super().__init__(f"{command[0]} cannot be measured")
        self.command = list(command)
        self.started = started


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
