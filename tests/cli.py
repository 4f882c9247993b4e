"""The product as its users meet it: real processes, a store of their own, simulated hardware."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import prepared
import pytest

import pepr_profiler

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = Path(pepr_profiler.__file__).parents[1]  # from where the product is imported
SLOW_S = 200.0  # far beyond anything that works; only a hang takes that long
READERS = ("compare", "report", "runs", "score")  # forked by a process that has loaded the product


@dataclass(frozen=True)
class Result:
    """What a finished command left: its status and its two outputs."""

    status: int
    stdout: bytes
    stderr: str


@dataclass(frozen=True)
class Cli:
    """`pepr-profile` as a process, with its store in `folder`; `variables` for all it starts."""

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PEPR_")}
        paths = [str(PACKAGES), *kept.get("PYTHONPATH", "").split(os.pathsep)]
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        kept |= {"TMPDIR": str(self.folder), "PEPR_DAEMON": "off", "PEPR_STORE": str(self.store)}
        return {**kept, **self.variables, **(extra or {})}

    def start(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "pepr_profiler"),
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            env=self.environment(env),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def __call__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        bounds: tuple[int, int] | None = None,
        **options: Any,
    ) -> Result:
        """Waits for a command to end; `bounds` is the most seconds and bytes that it may take."""
        if arguments[:1] and arguments[0] in READERS and not (stdin or options.keys() - {"cwd"}):
            folder = options.get("cwd", ".")
            done = prepared.run(
                arguments, self.environment(env), folder, bounds=bounds, timeout_s=SLOW_S
            )
            if done:
                return Result(done[0], done[1], done[2].decode())
        if bounds:
            options["preexec_fn"] = partial(prepared.bound, *bounds)
        with self.start(*arguments, env=env, stdin=subprocess.PIPE, **options) as process:
            try:
                out, err = process.communicate(stdin, timeout=SLOW_S)
            except BaseException:
                process.kill()
                raise
        return Result(process.returncode, out or b"", (err or b"").decode())

    def measure(
        self, *arguments: str, verb: str = "run", **options: Any
    ) -> tuple[Result, dict[str, Any]]:
        """Runs or attaches with `--json FILE`; its result and its summary."""
        path = self.folder / "summary.json"
        path.unlink(missing_ok=True)
        result = self(verb, "--json", str(path), *arguments, **options)
        assert path.exists(), result.stderr
        return result, json.loads(path.read_text())

    def runs(self, store: Path | None = None) -> list[Path]:
        """The run directories, as they are on disk."""
        return sorted(p for p in ((store or self.store) / "runs").glob("*") if p.is_dir())

    def report(self, run: Path | str) -> dict[str, Any]:
        result = self("report", str(run), "--json", "-")
        assert result.status == 0, result.stderr
        summary: dict[str, Any] = json.loads(result.stdout)
        return summary


SLEEP_UNTIL = """if True:
    import sys, time
    while time.monotonic_ns() < int(sys.argv[1]): time.sleep(0.01)
"""
"""A program that ends at an instant (CLOCK_MONOTONIC, ns), however late it starts."""

BURN_UNTIL = SLEEP_UNTIL.replace("time.sleep(0.01)", "sum(range(1000))")


def python(code: str, *arguments: str) -> list[str]:
    """The command that runs `code`."""
    return [sys.executable, "-c", code, *arguments]


def until(condition: Callable[[], Any], *, within_s: float = SLOW_S) -> Any:
    """Asks again and again until `condition` gives a true value, and returns it."""
    begin_s = time.monotonic()
    while (waited_s := time.monotonic() - begin_s) < within_s:
        value = condition()
        if value:
            return value
        time.sleep(min(max(0.01, waited_s / 20), 0.1))
    raise AssertionError(f"not within {within_s:g} s: {condition}")


def used_s(pid: int) -> float:
    """The CPU time that a living process has used, in whole ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def charged_s(process: subprocess.Popen[bytes]) -> float:
    """Waits for a process to end well; the CPU time of it and of all that it waited for."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def calls_of(work: Callable[[], object]) -> int:
    """How many functions `work` calls: what it costs, which is the same on every machine."""
    calls = itertools.count()

    def count(frame: FrameType, event: str, function: object) -> None:  # noqa: ARG001
        if event in ("call", "c_call"):
            next(calls)

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return next(calls)


def component(summary: Mapping[str, Any], ident: str) -> dict[str, Any]:
    """A component of a summary by its id."""
    found = [c for c in summary["energy"]["components"] if c["id"] == ident]
    assert len(found) == 1, [c["id"] for c in summary["energy"]["components"]]
    return dict(found[0])


def codes(summary: Mapping[str, Any], about: str = "") -> set[str]:
    """The codes of a summary's warnings; with `about`, of those whose text contains it.

    Tests run beside other programs: that these used the CPU is left out, unless `about` is that.
    """
    warnings = [warning for warning in summary["warnings"] if about in warning["text"]]
    others = "of the CPU time that was used"
    return {w["code"] for w in warnings if others in about or others not in w["text"]}


def write_replay(path: Path, channels: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """A replay file of tab-separated channel lines; its sensor spec."""
    lines = ["channel\t" + "\t".join(channel.split()) for channel in channels]
    lines += ["\t".join(map(repr, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return f"replay:{path}"


def write_meter(path: Path, power_w: float, name: str = "x") -> str:
    """The spec of a sensor that says so many watts, of a device that is the job's alone."""
    channel = f"meter power W 1 0 gauge test kind=gpu component=gpu:{name}"
    return write_replay(path, [channel], [(0.0, float(power_w))])


def made_locale(folder: Path, language: str, encoding: str) -> dict[str, str]:
    """Makes a locale, or skips the test; the variable that lets programs find it."""
    path = folder / f"{language}.{encoding}"
    command = ["localedef", "-i", language, "-f", encoding, str(path)]
    made = shutil.which("localedef") and subprocess.run(command, capture_output=True, check=False)
    if not made or made.returncode:
        pytest.skip(f"no locale {language} can be made here (Debian: apt-get install locales)")
    return {"LOCPATH": str(folder)}


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kills the process at the end of the block, if it still runs, and closes its pipes."""
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
