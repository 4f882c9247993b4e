"""What a tool does to the command that it wraps, or to the program that uses it.

Everything is compared with what the same command does alone: exit status, signals, output, what is
left running, and what is left on disk when the tool itself is killed.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sim.nvml import Gpu
from sim.powercap import Zone
from sim.waves import Constant, Square

from benchmarks.peers.environments import OURS, Installed
from benchmarks.peers.hardware import Machine, machine
from benchmarks.peers.report import MISSED, Axis, Row, run_axis
from benchmarks.peers.session import MARK, PATIENCE_S, Session, end, living, sessions

J_PER_KWH = 3.6e6
IDLE_W, BUSY_W, PERIOD_S = 10.0, 400.0, 12.0
"""The board of the last second: busy in the first second of each period, at the end of which
commands and windows of at least 4 s end. They begin when it is idle: half a period before."""

IN_CODE, WRAPPED = "in code", "wrapped command"

LISTENER = """
import signal, sys, time
def on(number, frame): sys.exit({"SIGUSR1": 5, "SIGINT": 3}[signal.Signals(number).name])
signal.signal(signal.SIGUSR1, on); signal.signal(signal.SIGINT, on)
print("listening", flush=True)
while True: time.sleep(0.05)
"""
UNTIL = """
import sys, time
busy_ns, period_ns = map(int, sys.argv[2:])
begin_ns = time.monotonic_ns()
# The first end of a busy second that is 4 s away, or more.
periods = -(-(begin_ns + 3_000_000_000 - busy_ns) // period_ns)
end_ns = busy_ns + periods * period_ns + 1_000_000_000
while time.monotonic_ns() < end_ns: time.sleep(0.005)
open(sys.argv[1], "w").write(f"{begin_ns} {time.monotonic_ns()}")
"""


@dataclass
class Wrapper:
    """A tool that wraps commands on a machine, in a folder of its own for each."""

    installed: Installed
    at: Machine
    folder: Path
    mark: str

    def environment(self) -> dict[str, str]:
        return {**self.at.env, MARK: self.mark, "PEPR_STORE": str(self.folder / "store")}

    def start(self, *command: str, terminal: int | None = None) -> subprocess.Popen[bytes]:
        """In a session of its own; one that has the terminal, if it is given one (for stdin)."""
        prefix = self.installed.wrapper(self.folder)
        assert prefix is not None
        if terminal is not None:
            prefix = ["setsid", "--ctty", *prefix]
        (self.folder / "carbontracker").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [*prefix, *command],
            env=self.environment(),
            cwd=self.folder,
            stdin=subprocess.PIPE if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=terminal is None,
        )

    def run(self, *command: str, stdin: bytes = b"") -> tuple[str, bytes]:
        """Status, as a shell has it, and stdout."""
        process = self.start(*command)
        try:
            out, _ = process.communicate(stdin, timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            end(self.mark)
            process.communicate()
            return f"hangs for {PATIENCE_S:g} s", b""
        return shell_status(process.returncode), out


def wrapper_of(tool: Installed, at: Machine) -> Wrapper:
    mark = uuid.uuid4().hex
    folder = Path(at.env["TMPDIR"]) / mark
    folder.mkdir()
    return Wrapper(tool, at, folder, mark)


def shell_status(returncode: int) -> str:
    return str(returncode if returncode >= 0 else 128 - returncode)


def left_after(mark: str, patience_s: float = 5.0) -> int:
    """How many of them are left when those that end by themselves have had the time to."""
    deadline = time.monotonic() + patience_s
    while (left := living(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(left)


def words(status: str, left: int, what: str = "process") -> str:
    many = {0: "nobody", 1: f"1 {what}"}.get(left, f"{left} {what}es")
    return f"{status}, {many} left"


# --- a wrapped command: each check gives what it found -------------------------------------------

PYTHON = sys.executable


def status_of(*command: str) -> Callable[[Wrapper], str]:
    return lambda wrapper: wrapper.run(*command)[0]


def not_executable(wrapper: Wrapper) -> str:
    file = wrapper.folder / "script"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o644)
    return wrapper.run(str(file))[0]


def output(wrapper: Wrapper) -> str:
    expected = b"\x00binary\n\xff\n" * 50
    _, out = wrapper.run("cat", stdin=expected)
    if out == expected:
        return "unchanged"
    return f"{len(out) - len(expected):+d} bytes" if expected in out else "spoilt"


def own_options(wrapper: Wrapper) -> str:
    given = ["--log_dir", "mine", "--offline", "-h", "--", "--json", "x"]
    code = "import json, sys; print('argv=' + json.dumps(sys.argv[1:]))"
    _, out = wrapper.run(PYTHON, "-c", code, *given)
    for line in out.decode(errors="replace").splitlines():
        if line.startswith("argv="):
            seen = json.loads(line[5:])
            lost = [word for word in given if word not in seen]
            if seen == given:
                return "unchanged"
            return f"lost: {' '.join(lost)}" if lost else "changed"
    return "not run"


def heard(process: subprocess.Popen[bytes]) -> bool:
    """Waits until the command says that it listens. False: the tool ended before."""
    assert process.stdout is not None
    return any(b"listening" in line for line in process.stdout)


def signalled(wrapper: Wrapper) -> str:
    process = wrapper.start(PYTHON, "-c", LISTENER)
    if heard(process):
        process.send_signal(signal.SIGUSR1)
    return after(wrapper, process)


def interrupted(wrapper: Wrapper) -> str:
    """Ctrl-C on the terminal that the tool and the command share."""
    ours, theirs = os.openpty()
    try:
        process = wrapper.start(PYTHON, "-c", LISTENER, terminal=theirs)
        if heard(process):
            os.write(ours, b"\x03")
        return after(wrapper, process)
    finally:
        os.close(ours)
        os.close(theirs)


def terminated(wrapper: Wrapper) -> str:
    process = wrapper.start("sh", "-c", "echo listening; exec sleep 1000")
    if heard(process):
        process.terminate()
    return after(wrapper, process)


def after(wrapper: Wrapper, process: subprocess.Popen[bytes]) -> str:
    """The tool's status after a signal, and who still runs."""
    try:
        process.wait(10.0)
        status = shell_status(process.returncode)
    except subprocess.TimeoutExpired:
        status = "runs on"
    left = left_after(wrapper.mark)
    end(wrapper.mark)
    process.communicate()
    return words(status, left)


def killed(wrapper: Wrapper) -> str:
    """kill -9 of the tool after 4 s of 300 W: how much of it can be read from what is left."""
    process = wrapper.start("sh", "-c", "echo listening; exec sleep 1000")
    heard(process)
    begin_ns = time.monotonic_ns()
    time.sleep(4.0)
    process.kill()
    killed_ns = time.monotonic_ns()
    process.wait()
    end(wrapper.mark)
    process.communicate()
    truth_j = wrapper.at.energy_j("gpu", begin_ns, killed_ns)
    found_j = energy_on_disk(wrapper)
    if found_j is None:
        files = sum(path.is_file() for path in wrapper.folder.rglob("*"))
        return f"no energy ({files} files)"
    return f"{100 * found_j / truth_j:.0f} % of the energy"


def energy_on_disk(wrapper: Wrapper) -> float | None:
    """What a tool left about GPUs, read as its own documentation says; J."""
    if wrapper.installed.name == OURS:
        command = [str(wrapper.installed.folder / "bin/pepr-profile"), "report", "last"]
        done = subprocess.run(
            [*command, "--json", "-"],
            env=wrapper.environment(),
            check=False,
            capture_output=True,
            cwd=wrapper.folder,
        )
        if done.returncode != 0:
            return None
        parts = json.loads(done.stdout)["energy"]["components"]
        joules = [part["device_j"] for part in parts if part["kind"] == "gpu"]
        return None if not joules or None in joules else sum(joules)
    for file in wrapper.folder.rglob("emissions*.csv"):
        rows = list(csv.DictReader(file.open()))
        return sum(float(row["gpu_energy"]) for row in rows) * J_PER_KWH if rows else None
    for file in wrapper.folder.rglob("*carbontracker.log"):
        text = file.read_text()
        took = re.search(r"Duration: +(\d+):(\d+):([\d.]+)", text)
        power = re.search(r"\(W\) for gpu: \[?([\d.]+)", text)
        if took and power:
            seconds = int(took[1]) * 3600 + int(took[2]) * 60 + float(took[3])
            return seconds * float(power[1])
    return None


WRAPPED_CHECKS: Mapping[str, tuple[str, Callable[[Wrapper], str]]] = {
    "exit status 7": ("7", status_of("sh", "-c", "exit 7")),
    "the command dies of SIGKILL": ("137", status_of("sh", "-c", "kill -9 $$")),
    "no such command": ("127", status_of("no-such-command")),
    "command not executable": ("126", not_executable),
    "stdin to stdout, binary": ("unchanged", output),
    "its own options": ("unchanged", own_options),
    "SIGUSR1 to the tool, handled by the command": ("5, nobody left", signalled),
    "Ctrl-C, handled by the command": ("3, nobody left", interrupted),
    "SIGTERM to the tool": ("143, nobody left", terminated),
    "kill -9 of the tool after 4 s": ("100 % of the energy", killed),
}


# --- a program that uses the tool ---------------------------------------------------------------


def in_window(tool: Installed, at: Machine, mark: str, stdout: Path | None = None) -> Session:
    """A session in the middle of a window; raises RuntimeError where the tool does not open."""
    session = Session(tool, {**at.env, MARK: mark}, stdout=stdout)
    if not session.ready():
        session.kill()
        raise RuntimeError(session.failed)
    session.begin("window")
    time.sleep(1.5)  # the tool at work
    return session


def program_exits(tool: Installed, at: Machine, mark: str, _: Path) -> str:
    session = in_window(tool, at, mark)
    try:
        status = session.exit(7)
        return words(str(status), left_after(mark))
    finally:
        session.kill()


def program_signalled(signo: signal.Signals) -> Callable[[Installed, Machine, str, Path], str]:
    def check(tool: Installed, at: Machine, mark: str, _: Path) -> str:
        session = in_window(tool, at, mark)
        session.process.send_signal(signo)
        try:
            session.process.wait(10.0)
            status = shell_status(session.process.returncode)
        except subprocess.TimeoutExpired:
            status = "runs on"
        session.close_pipes()  # what waits for an end of them has it, as it would without us
        left = left_after(mark)
        session.kill()
        return words(status, left)

    return check


def program_prints(tool: Installed, at: Machine, mark: str, folder: Path) -> str:
    file = folder / "stdout"
    session = in_window(tool, at, mark, stdout=file)
    session.end("window")
    session.close()
    size = file.stat().st_size
    return f"{size} bytes" if size else "nothing"


CODE_CHECKS: Mapping[str, tuple[str, Callable[[Installed, Machine, str, Path], str]]] = {
    "sys.exit(7) in a window": ("7, nobody left", program_exits),
    "SIGTERM to the program in a window": (
        "143, nobody left",
        program_signalled(signal.SIGTERM),
    ),
    "kill -9 of the program in a window": (
        "137, nobody left",
        program_signalled(signal.SIGKILL),
    ),
    "printed to stdout": ("nothing", program_prints),
}


def of_tool(axis: Axis, tool: Installed, at: Machine) -> list[Row]:
    """All checks of one tool, one after the other."""
    rows = []
    wraps = tool.tool.wrapper is not None
    for name, (truth, check) in WRAPPED_CHECKS.items():
        if not wraps:
            rows.append(axis.row(name, tool.name, WRAPPED, "", value="n/a", note=tool.tool.lacks))
            continue
        wrapper = wrapper_of(tool, at)
        look = partial(check, wrapper)
        rows.append(judged(axis, name, tool.name, WRAPPED, truth, look))
        end(wrapper.mark)
    for name, (truth, in_code) in CODE_CHECKS.items():
        mark = uuid.uuid4().hex
        folder = Path(at.env["TMPDIR"]) / mark
        folder.mkdir()
        look = partial(in_code, tool, at, mark, folder)
        rows.append(judged(axis, name, tool.name, IN_CODE, truth, look))
        end(mark)
    return rows


def judged(
    axis: Axis, name: str, tool: str, metric: str, truth: str, look: Callable[[], str]
) -> Row:
    """The row of a check. Ours is reached where it is as alone; a recording may miss a second."""
    try:
        value = look()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        note = " ".join(str(error).split())
        failed = MISSED if tool == OURS else ""
        return axis.row(
            name, tool, metric, "", truth=truth, verdict=failed, note=note, goal=goal_of(metric)
        )
    good = value == truth
    if percent := re.fullmatch(r"(\d+) % of the energy", value):
        good = abs(int(percent[1]) - 100) <= 25  # a flush a second, of 4
    verdict = ("reached" if good else "MISSED") if tool == OURS else "as alone" if good else ""
    return axis.row(
        name, tool, metric, "", truth=truth, value=value, verdict=verdict, goal=goal_of(metric)
    )


def goal_of(metric: str) -> str:
    return f"{metric}: as without us (status, signals, output, who is left, what is on disk)"


# --- the last second ----------------------------------------------------------------------------


def last_second(axis: Axis) -> Iterator[Row]:
    """A command, or a window, whose last second takes most of its energy; all tools at once."""
    board = Gpu(Square(PERIOD_S, IDLE_W, BUSY_W, duty=1 / PERIOD_S, shift_s=PERIOD_S / 2))
    period_ns = round(PERIOD_S * 1e9)
    with machine(gpus=(board,)) as at:
        busy_ns = at.epoch_ns + period_ns // 2  # once, and then each period
        wrappers = []
        for tool in axis.tools.values():
            if tool.tool.wrapper is not None:
                wrapper = wrapper_of(tool, at)
                stamps = wrapper.folder / "stamps"
                command = (PYTHON, "-c", UNTIL, stamps, busy_ns, period_ns)
                wrappers.append((wrapper, stamps, wrapper.start(*map(str, command))))
        in_code = [tool for tool in axis.tools.values() if tool.tool.driver is not None]
        with sessions(in_code, at.env) as opened:
            from_ns = time.monotonic_ns() + 3_500_000_000 - busy_ns
            end_ns = busy_ns + -(-from_ns // period_ns) * period_ns + 1_000_000_000
            for session in opened:
                session.begin("window", end_ns - 4_000_000_000)
                session.end("window", 4_000_000_000)
            told = [(session.name, session.close()[0]) for session in opened]
        for name, window in told:
            told_j = window.of("gpu")
            truth_j = at.energy_j("gpu", window.begin_ns, window.end_ns)
            yield part_seen(axis, name, IN_CODE, told_j, truth_j, window.error or "")
        for wrapper, stamps, process in wrappers:
            process.communicate(timeout=PATIENCE_S)
            told_j, truth_j = None, 0.0
            if stamps.exists():
                begin_ns, ended_ns = map(int, stamps.read_text().split())
                truth_j = at.energy_j("gpu", begin_ns, ended_ns)
                told_j = energy_on_disk(wrapper)
            why = "" if told_j is not None else "no energy of GPUs among what it left"
            yield part_seen(axis, wrapper.installed.name, WRAPPED, told_j, truth_j, why)
            end(wrapper.mark)


def part_seen(
    axis: Axis, tool: str, how: str, told_j: float | None, truth_j: float, why: str
) -> Row:
    metric = f"energy of what ends with a second of {BUSY_W:g} W after {IDLE_W:g} W"
    if told_j is None or not truth_j:
        return axis.row(how, tool, metric, "%", truth=100.0, note=why)
    seen = 100 * told_j / truth_j
    # A refresh of the counter is 40 J of 430, and the command begins before its first stamp.
    verdict = ("reached" if abs(seen - 100) <= 10 else "MISSED") if tool == OURS else ""
    return axis.row(
        *(how, tool, metric, "%"),
        truth=100.0,
        value=seen,
        verdict=verdict,
        goal="energy of what ends with a second of high power: within 10 %",
        strain=abs(seen - 100),
    )


def measure(axis: Axis) -> Iterator[Row]:
    zones = (
        Zone("intel-rapl:0", "package-0", Constant(110), start_uj=11_000_000_000),
        Zone("intel-rapl:1", "package-1", Constant(90), start_uj=23_000_000_000),
    )
    with machine(gpus=(Gpu(Constant(300)),), zones=zones) as at, ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda tool: of_tool(axis, tool, at), axis.tools.values()):
            yield from rows
    yield from last_second(axis)


if __name__ == "__main__":
    run_axis("behaviour", measure, (__doc__ or "").splitlines()[0])
