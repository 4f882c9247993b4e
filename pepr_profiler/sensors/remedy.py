"""Why a sensor is missing, and the command that unlocks it."""

from __future__ import annotations

from pepr_profiler.sensors.machine import Surroundings
from pepr_profiler.sensors.spec import SensorSpec

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from pepr_profiler._core import Note
    from pepr_profiler.errors import SensorError


def remedy(spec: str, missing: SensorError | Note, here: Surroundings) -> dict[str, str]:
    """What is missing, why, and the exact command that unlocks it for whoever runs this program.

    The driver knows the file, but not who runs it and where: its fix is adapted to that.
    """
    sensor = SensorSpec(spec)
    why, fix = missing.why, missing.fix
    if missing.denied:
        fix = _fix_of_denied(sensor.kind, fix, here)
    elif not sensor.where:  # who named a place knows best what is wrong with it
        why, fix = _why_and_fix_of_absent(sensor.kind, why, fix, here)
    if here.root and not here.container:
        fix = fix.replace("sudo ", "")
    return {"what": missing.what, "why": why, "fix": fix}


def _fix_of_denied(kind: str, fix: str, here: Surroundings) -> str:
    if not here.container:
        # The daemon comes first: counters that are open to all are open to side channels too.
        if kind in ("perf", "powercap") and not here.root:
            return f"sudo pepr-profile daemon (or, to open it to everybody: {fix})"
        return fix
    return {
        "perf": "docker run --cap-add PERFMON --security-opt seccomp=unconfined …, or on the host: "
        "sudo sysctl kernel.perf_event_paranoid=0",
        "nvml": "docker run --gpus all …, as a user who may open /dev/nvidia*",
        "powercap": "on the host: sudo pepr-profile daemon, and docker run "
        f"-v /run/pepr-profiler:/run/pepr-profiler … (or, to open it to everybody: {fix})",
        "processes": "docker run --cap-add PERFMON …, and on the host: "
        "sudo sysctl kernel.perf_event_paranoid=2",
    }.get(kind, f"on the host: {fix}")


def _why_and_fix_of_absent(kind: str, why: str, fix: str, here: Surroundings) -> tuple[str, str]:
    """For a sensor that is not at its usual place."""
    if kind in ("perf", "powercap") and here.virtual:
        why = "this is a virtual machine, and RAPL stays with the machine that hosts it"
        return why, "measure on that machine, or see: pepr-profile run --help, --cpu-power"
    if kind == "nvml":
        in_container = (
            "start the container with its GPUs: docker run --gpus all …; if the driver's library is"
            " in it already: --sensor nvml:PATH"
        )
        return why, in_container if here.container else fix
    if not here.container:
        module = {"perf": "rapl", "powercap": "intel_rapl_msr"}.get(kind)
        return why, f"sudo modprobe {module}" if module else fix
    if kind == "perf":
        return why, "on the host: sudo modprobe rapl"
    folder = f"/sys/class/{kind}"
    return (
        f"the container does not show {folder}, or its host has none",
        f"docker run -v /sys:/host/sys:ro …, and --sensor {kind}:/host{folder}",
    )
