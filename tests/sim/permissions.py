"""Make root obey file permissions, so that "permission denied" can be tested as any user."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager

# linux/capability.h, linux/prctl.h; the syscalls have no wrapper in libc's headers, but in libc.
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
_SYS_ADMIN, _PERFMON = 21, 38
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}  # asm/unistd.h
_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


def _check(status: int) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def _without(*capabilities: int) -> Iterator[None]:
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    _check(_libc.capget(ctypes.byref(header), sets))
    before = [words.effective for words in sets]
    for capability in capabilities:
        sets[capability // 32].effective &= ~(1 << capability % 32)
    _check(_libc.capset(ctypes.byref(header), sets))
    try:
        yield
    finally:
        for words, effective in zip(sets, before, strict=True):
            words.effective = effective
        _check(_libc.capset(ctypes.byref(header), sets))


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Within the block, this thread cannot read past file modes. No effect on children."""
    with _without(_DAC_OVERRIDE, _DAC_READ_SEARCH):
        yield


@contextmanager
def without_perf() -> Iterator[None]:
    """Within the block, this thread counts what kernel.perf_event_paranoid lets any user count."""
    with _without(_SYS_ADMIN, _PERFMON):
        yield


def obey_permissions() -> None:
    """A `preexec_fn`: what is executed next obeys file modes, and so does all that it starts."""
    if os.geteuid() == 0:
        for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
            _check(_libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def forbid_perf() -> None:
    """This thread, and all that it starts from now on, may not use perf: as in a container.

    For good. Raises OSError where that cannot be had.
    """
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise OSError(f"the number of perf_event_open on {platform.machine()} is not known here")
    # linux/filter.h: load the number of the call; if it is this one, EPERM; else let it pass.
    code = b"".join(
        struct.pack("HBBI", *line)
        for line in (
            (0x20, 0, 0, 0),
            (0x15, 0, 1, number),
            (0x06, 0, 0, 0x00050000 | 1),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    program = _Filter(len(code) // 8, code)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))
