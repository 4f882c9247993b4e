"""What is missing, why, and the command that unlocks it."""

from __future__ import annotations

from pepr_profiler.sensors.machine import Place
from pepr_profiler.sensors.spec import SensorSpec

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from pepr_profiler._core import Note
    from pepr_profiler.errors import SensorError


def remedy(spec: str, missing: SensorError | Note, where: Place) -> dict[str, str]:
    """What is missing, why, and the exact command that unlocks it for whoever runs here.

    The driver knows the file, but not who is asking: its fix is adapted to that.
    """
    sensor = SensorSpec(spec)
    why, fix = missing.why, missing.fix
    if missing.denied:
        fix = _permit(sensor.kind, fix, where)
    elif not sensor.where:  # a place that was named by hand is checked by hand
        why, fix = _provide(sensor.kind, why, fix, where)
    if where.root and not where.container:
        fix = fix.replace("sudo ", "")
    return {"what": missing.what, "why": why, "fix": fix}


def _permit(kind: str, fix: str, where: Place) -> str:
    if not where.container:
        # The daemon first: what is opened to all is open to everybody's side channels too.
        if kind in ("perf", "powercap") and not where.root:
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


def _provide(kind: str, why: str, fix: str, where: Place) -> tuple[str, str]:
    """Why a sensor is not at its usual place, and how to get it there."""
    if kind in ("perf", "powercap") and where.virtual:
        why = "this is a virtual machine, and RAPL stays with the machine that hosts it"
        return why, "measure on that machine, or see: pepr-profile run --help, --cpu-power"
    if kind == "nvml":
        boxed = "start the container with its GPUs: docker run --gpus all …"
        return why, boxed if where.container else fix
    if not where.container:
        module = {"perf": "rapl", "powercap": "intel_rapl_msr"}.get(kind)
        return why, f"sudo modprobe {module}" if module else fix
    if kind == "perf":
        return why, "on the host: sudo modprobe rapl"
    folder = f"/sys/class/{kind}"
    return (
        f"the container does not show {folder}, or its host has none",
        f"docker run -v /sys:/host/sys:ro …, and --sensor {kind}:/host{folder}",
    )
