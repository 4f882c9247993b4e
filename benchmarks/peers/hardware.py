"""Simulated hardware with known truth, placed where programs that know nothing of it look."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sim import native, nvml, powercap
from sim.permissions import obey_permissions

from benchmarks.common import UnmeasurableError
from benchmarks.peers.environments import cache_folder

_CLASS, _DEVICES = Path("/sys/class/powercap"), Path("/sys/devices/virtual/powercap")
_NEW_MOUNTS, _NEW_NETWORK = 0x00020000, 0x40000000  # CLONE_NEWNS, CLONE_NEWNET of linux/sched.h

become_ordinary = obey_permissions
"""A `preexec_fn`: root, too, is then told "permission denied"."""


@dataclass(frozen=True)
class Machine:
    """Boards and zones that every program sees that is started with `env`, and the truth."""

    env: dict[str, str]
    epoch_ns: int
    boards: nvml.NvmlSim | None
    tree: powercap.Tree | None

    def kinds(self) -> tuple[str, ...]:
        """What there is to measure, of gpu, cpu and dram."""
        return ("gpu",) * (self.boards is not None) + tuple(
            kind for kind in ("cpu", "dram") if self.zones(kind)
        )

    def zones(self, kind: str) -> list[str]:
        """Packages or their memory, each once: neither psys nor a second view of a package."""
        prefix = {"cpu": "package", "dram": "dram"}[kind]
        zones = self.tree.zones.values() if self.tree is not None else ()
        return [
            z.key for z in zones if z.control_type == "intel-rapl" and z.name.startswith(prefix)
        ]

    def energy_j(self, kind: str, t0_ns: int, t1_ns: int) -> float:
        """What all devices of a kind truly took, by the loads' own integrals."""
        if kind == "gpu":
            assert self.boards is not None
            scenario = self.boards.scenario
            return sum(scenario.energy_j(t0_ns, t1_ns, i) for i in range(len(scenario.gpus)))
        assert self.tree is not None
        return sum(self.tree.energy_j(key, t0_ns, t1_ns) for key in self.zones(kind))


@functools.cache
def isolate() -> None:
    """This process, and all that it starts, sees mounts of its own and no network, from now on.

    Tools that would look something up fail at once, and alike on every machine. Raises
    UnmeasurableError where that is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS | _NEW_NETWORK) != 0:
        raise UnmeasurableError(
            f"no private mounts: {os.strerror(ctypes.get_errno())}; peers look for RAPL in "
            f"{_CLASS} only; run as root, or: unshare --user --map-root-user --mount --net"
        )
    _mount("--make-rprivate", "/")
    if ip := shutil.which("ip"):
        subprocess.run([ip, "link", "set", "lo", "up"], check=False)
    for place in (_CLASS, _DEVICES):
        if not place.exists():  # sysfs takes no new folder: lay one of ours over the folder around
            layer = cache_folder() / "layers" / place.parent.name
            (layer / place.name).mkdir(parents=True, exist_ok=True)
            around = place.parent
            _mount("-t", "overlay", "-o", f"lowerdir={layer}:{around}", "overlay", str(around))


@contextmanager
def machine(
    *,
    gpus: Sequence[nvml.Gpu] = (),
    zones: Sequence[powercap.Zone] = (),
    faults: Sequence[nvml.Fault] = (),
    epoch_ns: int | None = None,
) -> Iterator[Machine]:
    """A machine with these boards and zones, their files live; with neither: a bare one.

    The driver's library is found by its plain name (LD_LIBRARY_PATH in `env`), powercap where it
    always is. Raises UnmeasurableError where that cannot be had.
    """
    isolate()
    epoch_ns = time.monotonic_ns() if epoch_ns is None else epoch_ns
    env = {name: value for name, value in os.environ.items() if not name.startswith("PEPR_")}
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "LD_LIBRARY_PATH"):
        env.pop(name, None)
    boards, tree = None, None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="pepr-peers-")))
        cache = cache_folder() / "native"
        cache.mkdir(parents=True, exist_ok=True)
        env |= {"TMPDIR": str(folder), "PEPR_STORE": str(folder / "store"), "HOME": str(folder)}
        try:
            if gpus:
                (folder / "nvml").mkdir()
                scenario = nvml.Scenario(tuple(gpus), tuple(faults), epoch_ns=epoch_ns)
                boards = nvml.install(scenario, folder / "nvml", cache)
                env |= boards.env
                # Where it is missing, some tools take it that there is no GPU.
                (folder / "bin").mkdir()
                (folder / "bin/nvidia-smi").symlink_to("/bin/true")
                env["PATH"] = f"{folder / 'bin'}:{env.get('PATH', os.defpath)}"
            if zones:
                writer = powercap.build_writer(cache)
                tree = powercap.Tree(
                    folder / "powercap", tuple(zones), writer=writer, epoch_ns=epoch_ns
                )
                stack.callback(tree.stop)
                _place(tree, stack)
        except native.UnavailableError as missing:
            raise UnmeasurableError(str(missing)) from None
        yield Machine(env, epoch_ns, boards, tree)


def _place(tree: powercap.Tree, stack: ExitStack) -> None:
    for real, place in ((tree.where, _CLASS), (tree.where.parents[1] / "devices/virtual/powercap",
                                               _DEVICES)):  # fmt: skip
        _mount("--bind", str(real), str(place))
        stack.callback(_run, "umount", "--lazy", str(place))


def _mount(*arguments: str) -> None:
    _run("mount", *arguments)


def _run(*command: str) -> Any:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise UnmeasurableError(f"{' '.join(command)}: {done.stderr.strip()}")
