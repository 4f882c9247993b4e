"""Cgroups of version 2: the folder of one, and which processes are in it.

A cgroup is what Slurm, systemd and containers put their processes into. All that these start stays
in it, and the kernel counts its CPU time and memory as a whole.
"""

# Text is what the kernel and the core take; each of 10,000 groups would be a Path.
# ruff: noqa: PTH110, PTH112, PTH119, PTH120, PTH123

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from pepr_profiler.errors import TargetError, UsageError
from pepr_profiler.recording import procfs

_NO_VERSION_2 = "this machine has no cgroups of version 2, whose CPU time can be followed"
_USE_VERSION_2 = (
    "boot Linux with systemd.unified_cgroup_hierarchy=1; or name the processes: "
    "pepr-profile attach PID"
)
_SLURM_JOB = r"(.*/job_\d+)/step_(?:batch|interactive|extern)(?:/.*)?"
_CONTAINER = r"(?:.*[-:])?([0-9a-f]{12,64})(?:\.scope|\.service)?"
_FIND_IT = "cat /proc/PID/cgroup shows that of a process; systemd-cgls shows all"
_LISTED = 5
_SHOWN = 12  # characters of an id


def members_of(folder: str) -> set[int]:
    """The PIDs in a cgroup and in all below it; none if there is no such cgroup (any more)."""
    found: set[int] = set()
    for group in _groups_in(folder):
        try:
            with open(f"{group}/cgroup.procs") as file:
                found.update(map(int, file.read().split()))
        except OSError:  # it was removed meanwhile, or has threads only
            continue
    found.discard(0)  # processes of other PID namespaces
    return found


def oldest_of(folder: str, most: int = 256) -> list[int]:
    """The first PIDs in a cgroup by their start, without this process; `most` at most."""
    stats = {pid: procfs.find_stat(pid) for pid in members_of(folder) - {os.getpid()}}
    begun = sorted((stat.start_ticks, pid) for pid, stat in stats.items() if stat is not None)
    return [pid for _, pid in begun[:most]]


def folder_of(path: str, *, exists: bool = True) -> str:
    """The folder of a cgroup that a user names, below the mount of cgroups or as a whole path.

    Without `exists`, only the group that it is in has to be there. Raises UsageError for what is
    no cgroup, or is that of the whole machine.
    """
    if not path.strip("/") or "\0" in path:
        raise UsageError("no cgroup is named", why=f"its path is {path!r}", fix=_FIND_IT)
    path = path.removeprefix("0::")  # as cat /proc/PID/cgroup prints it
    if re.match(r"\d+:[^/]*:/", path):
        raise UsageError(
            f"{path} is a cgroup of version 1",
            why="the kernel counts all that is in a group only in version 2, a line of 0::/PATH",
            fix=_USE_VERSION_2,
        )
    mount, _ = _mount()
    is_whole = path.startswith("/") and (os.path.isdir(path) or f"{path}/".startswith(f"{mount}/"))
    folder = os.path.normpath(path if is_whole else f"{mount}/{path}")
    needed = folder if exists or os.path.exists(folder) else os.path.dirname(folder)
    if not os.path.isdir(needed):
        raise UsageError(f"there is no cgroup {folder}", why=f"{needed} is no folder", fix=_FIND_IT)
    _refuse_machine(folder, mount)
    if os.path.exists(folder) and not os.path.exists(f"{folder}/cpu.stat"):
        is_group = os.path.exists(f"{folder}/cgroup.procs")
        raise UsageError(
            f"{folder} is " + ("a cgroup of version 1" if is_group else "no cgroup"),
            why="it has no cpu.stat, by which the kernel counts what all in it has used",
            fix=_USE_VERSION_2 if is_group else _FIND_IT,
        )
    return folder


def own_folder() -> str:
    """The cgroup that this process is in, and so is what it starts.

    In a script of Slurm it is that of the whole job on this node, with all of its steps. Raises
    UsageError where that is no cgroup of version 2, or the whole machine.
    """
    mount, root = _mount()
    with open("/proc/self/cgroup") as file:
        lines = file.read().splitlines()
    inside = next((line[3:] for line in lines if line.startswith("0::")), "/")
    others = [line.split(":", 2)[1:] for line in lines if not line.endswith(":/")]
    if root != "/" and (inside + "/").startswith(root + "/"):
        inside = inside[len(root) :]  # only a part of all cgroups is mounted
    folder = os.path.normpath(f"{mount}/{inside}")
    of_version_1 = [f"{path} ({controller})" for controller, path in others if controller]
    _refuse_machine(folder, mount, of_version_1)
    in_script = re.fullmatch(_SLURM_JOB, folder)
    return folder if in_script is None else in_script[1]


def container_folder(ident: str) -> str:
    """The cgroup of a running container of Docker, Podman, containerd or CRI-O by its id.

    `ident` may be any unique beginning of the id. Raises UsageError for what cannot be an id, and
    TargetError if no container has it, or several do.
    """
    prefix = ident.partition("://")[2] or ident  # as kubectl prints it: containerd://ID
    if re.fullmatch("[0-9a-f]{1,64}", prefix) is None:
        raise UsageError(
            f"{ident!r} is no container's id",
            why="an id has hexadecimal digits only",
            fix="docker inspect --format '{{.Id}}' NAME shows it; podman and crictl inspect do too",
        )
    mount, _ = _mount()
    folders: dict[str, str] = {}
    for folder in _groups_in(mount):
        name = os.path.basename(folder)
        named = re.fullmatch(_CONTAINER, name)
        if named is not None and "conmon" not in name:  # Podman's monitors
            folders.setdefault(named[1], folder)  # the outermost group first
    found = [known for known in folders if known.startswith(prefix)]
    if len(found) == 1:
        return folders[found[0]]
    listed = ", ".join(sorted(known[:_SHOWN] for known in found or folders)[:_LISTED])
    listed += ", …" if len(found or folders) > _LISTED else ""
    if found:
        why, fix = f"these begin with it: {listed}", "give more digits of the id"
    else:
        why = f"here run {listed}" if folders else f"no cgroup below {mount} has the name of one"
        fix = "docker ps --no-trunc shows which run (podman ps, crictl ps)"
    many = "several containers have" if found else "no running container has"
    raise TargetError(f"{many} the id {prefix}", why=why, fix=fix)


def _groups_in(folder: str) -> Iterator[str]:
    """A cgroup and all below it, outer ones before inner ones."""
    level = [folder]
    while level:
        yield from level
        below: list[str] = []
        for group in level:
            try:
                with os.scandir(group) as entries:
                    below += [e.path for e in entries if e.is_dir(follow_symlinks=False)]
            except OSError:
                continue
        level = below


def _mount() -> tuple[str, str]:
    """Where cgroups of version 2 are mounted, and which of them is there. Raises UsageError."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            place, _, kind = line.partition(" - ")
            if kind.startswith("cgroup2 "):
                root, point = place.split()[3:5]
                return point, root
    raise UsageError("no cgroup can be followed", why=_NO_VERSION_2, fix=_USE_VERSION_2)


def _refuse_machine(folder: str, mount: str, of_version_1: Sequence[str] = ()) -> None:
    # Only the root of all cgroups has no type.
    if folder == mount and not os.path.exists(f"{folder}/cgroup.type"):
        why = "it holds every process, the profiler's too"
        if of_version_1:
            why += f"; what the command is in is of version 1: {', '.join(of_version_1)}"
        raise UsageError(
            f"the cgroup {folder} is the whole machine",
            why=why,
            fix="name one below it, such as /system.slice/train.service; or start what is measured "
            "in one: systemd-run --user --scope pepr-profile --follow cgroup -- CMD; for whole "
            "devices: --attribution device",
        )
