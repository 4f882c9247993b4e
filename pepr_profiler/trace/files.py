"""Files that may come from somebody else, opened, read and replaced without harm.

A run directory, a store or a table can be received as an archive, or lie where others may write.
What is read is a regular file of bounded size: a FIFO would wait for ever, a device may act when
it is opened, and a sparse file of 50 GB would fill the memory. Nothing is written through a link
that somebody has planted.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Any


class UnusableFileError(OSError):
    """A path leads to something that is not read; `strerror` says what it is."""


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | Path, *, most_bytes: int, linked: bool = False) -> int:
    """A descriptor to read a regular file of at most `most_bytes`; OSError if it is none.

    `linked` allows a symbolic link, for a file that the user names. What is no regular file is not
    even opened: that alone may let the writer of a FIFO go on, or start a device.
    """
    _require_regular(os.stat(path, follow_symlinks=linked), path, most_bytes)  # noqa: PTH116
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if linked else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _require_regular(os.fstat(descriptor), path, most_bytes)  # it may have been replaced
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: str | Path, *, most_bytes: int, linked: bool = False) -> bytes:
    """All of a regular file of at most `most_bytes`; OSError if it is none."""
    descriptor = open_file(path, most_bytes=most_bytes, linked=linked)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
        return file.readall()


def read_given_file(path: str | Path, *, most_bytes: int) -> bytes:
    """All of a file that the user names: a regular file, a link to one, or a pipe (`<(sort x)`)."""
    kind = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISFIFO(kind):
        return read_file(path, most_bytes=most_bytes, linked=True)
    # Opening a FIFO without a writer would wait for one; it reads as empty.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123
        os.set_blocking(descriptor, True)
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise _too_large(path, f"more than {most_bytes:,}", most_bytes)
    return data


def _require_regular(about: os.stat_result, path: str | Path, most_bytes: int) -> None:
    kind = stat.S_IFMT(about.st_mode)
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "something else")
        raise UnusableFileError(errno.EINVAL, f"it is {what}, not a regular file", str(path))
    if about.st_size > most_bytes:
        raise _too_large(path, f"{about.st_size:,}", most_bytes)


def _too_large(path: str | Path, has: str, most_bytes: int) -> UnusableFileError:
    text = f"it has {has} bytes; of such a file at most {most_bytes:,} are read"
    return UnusableFileError(errno.EFBIG, text, str(path))


def replace_file(path: str | Path, data: bytes) -> None:
    """Replaces a file atomically: a reader sees the old one or the new one, never a part.

    A link at `path` is replaced, not followed. The draft has a name that nobody can foresee, and
    is made anew in the directory as it is now, so that no planted link leads elsewhere.
    """
    folder, name = os.path.split(path)
    directory = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        draft = f".{os.urandom(8).hex()}.tmp"
        file = os.open(draft, CREATE, 0o666, dir_fd=directory)
        try:
            try:
                _write_all(file, data)
            finally:
                os.close(file)
            os.replace(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft, dir_fd=directory)
            raise
    finally:
        os.close(directory)


CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""Opens a file that was not there before; a link in its place is an error."""


def open_to_append(path: str | Path) -> int:
    """A descriptor that appends to a regular file of one name, made if it is not there.

    OSError for anything else: bytes written through a link, or into a file that is also elsewhere,
    would change a file that somebody else chose.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise UnusableFileError(errno.EINVAL, "it is not a regular file of one name", str(path))
    return descriptor


def moved_up(descriptor: int) -> int:
    """The same file with a high descriptor, if there is one.

    Programs close descriptors that they do not know, and open files of their own: those get low
    numbers, and are not taken for ours.
    """
    import fcntl

    try:
        high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except OSError:
        return descriptor
    os.close(descriptor)
    return high


_HIGH = 300
"""As csrc/system/file.h has it, which says why."""


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


# --- whether a run has all of its files -----------------------------------------------------------

_MOST_BYTES = 16 << 30
_PART_BYTES = 1 << 20
_GROWING = ".jsonl"
"""A program that outlives its run may still add events and notes."""


def list_files(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Size and CRC-32 of each file that a summary is made of; None if one cannot be read.

    This takes 0.7 ms per MB. It finds what was lost or mixed up, not what somebody forged.
    """
    try:
        return {name: _about(directory / name) for name in sorted(_names(directory))}
    except OSError:
        return None


def file_errors(directory: Path, listed: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """How the files of a run differ from those that were listed at its end."""
    for name, then in listed.items():
        if "/" in name:
            yield f"{name} is outside of it"
            continue
        try:
            now = _about(directory / name, then["bytes"] if name.endswith(_GROWING) else None)
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror or error}"
        else:
            if now["bytes"] != then["bytes"]:
                yield f"{name} has {now['bytes']:,} bytes instead of {then['bytes']:,}"
            elif now["crc32"] != then["crc32"]:
                yield f"{name} has other content (CRC-32 {now['crc32']} instead of {then['crc32']})"
    for name in sorted(_names(directory) - listed.keys()):
        if not name.endswith(_GROWING):
            yield f"{name} was added"


def _names(directory: Path) -> set[str]:
    forms = (".arrows", _GROWING)
    names = os.listdir(directory)  # noqa: PTH208
    return {name for name in names if name.endswith(forms) and name[0] != "."}


def _about(path: Path, first_bytes: int | None = None) -> dict[str, Any]:
    """Size and CRC-32 of a file, or of its first bytes."""
    from zlib import crc32

    size = check = 0
    with open(open_file(path, most_bytes=_MOST_BYTES), "rb", buffering=0) as file:
        while first_bytes is None or size < first_bytes:
            wanted = _PART_BYTES if first_bytes is None else min(_PART_BYTES, first_bytes - size)
            if not (part := file.read(wanted)):
                break
            size, check = size + len(part), crc32(part, check)
    return {"bytes": size, "crc32": f"{check:08x}"}
