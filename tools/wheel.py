"""Builds the sdist and wheels as PyPI takes them, and tries each where nothing else is.

    make wheel [ARGS='--all --tests all']

The sdist holds what git tracks, and the tests run from it. Each version of Python needs a wheel of
its own, as pybind11 uses parts of CPython's API that abi3 does not have. auditwheel gives it the
oldest manylinux tag that its symbols allow: manylinux_2_28 in PyPA's image of that name,
manylinux_2_34 on Debian 12. In a new virtual environment with the wheel and its dependencies alone,
the commands work, a block is measured, and what needs an extra names it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINORS = range(10, 15)  # of CPython 3
TABLE = "model,acc,energy\na,0.9,10\nb,0.95,20\n"
HEAVY = {"numpy", "rich", "nanoarrow", "torch", "pyarrow", "matplotlib", "jinja2", "psutil"}
REPLAY = "channel\tmeter\tpower\tW\t1\t0\tgauge\ttest\tkind=gpu\tcomponent=gpu:meter\n0.0\t100.0\n"
BLOCK = """
import time
from pepr_profiler import profile
with profile("block", sensors=["replay:meter"]) as run:
    run.log(a=1)
    time.sleep(0.3)
print(run.summary["energy"]["components"][0]["job_j"] / run.summary["time_s"])
"""
QUICK = ("test_codebase", "test_docs", "test_old_recordings", "test_sensors", "test_units")


def run(*command: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """The command, whose status is as expected, in an environment without any of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PEPR_", "PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "PEPR_STORE": str(cwd / "store"), "PEPR_DAEMON": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != status:
        sys.exit(f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def expect(holds: object, what: str) -> None:
    if not holds:
        sys.exit(f"tools/wheel.py: {what}")


@contextmanager
def step(text: str) -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    print(f"{time.monotonic() - begin_s:6.1f} s  {text}", flush=True)


def interpreters() -> dict[str, Path]:
    """Each CPython that this machine has, on the PATH or from pyenv: "3.10" and its program."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {}
    for minor in MINORS:
        name = f"python3.{minor}"
        places = [shutil.which(name), *sorted(pyenv.glob(f"versions/3.{minor}.*/bin/{name}"))]
        # A shim of pyenv is there also where the version is not; Debian's may come without venv.
        check = f"import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
        for place in places:
            if (
                place
                and not subprocess.run(
                    [place, "-c", check], capture_output=True, check=False
                ).returncode
            ):
                found[f"3.{minor}"] = Path(place)
                break
    return found


def tracked(*below: str) -> set[str]:
    return set(run("git", "ls-files", *below, cwd=ROOT).stdout.splitlines())


def build_sdist(folder: Path) -> Path:
    source = folder / "source"  # a copy, as setuptools would add what lies about in the checkout
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", make, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    expect(held >= tracked(), f"the sdist lacks {sorted(tracked() - held)}")
    made = {"PKG-INFO", "setup.cfg"}
    extra = {n for n in held - tracked() - made if not n.startswith("pepr_profiler.egg-info/")}
    expect(not extra, f"the sdist holds what git does not track: {sorted(extra)}")
    return sdist


def build_wheel(sdist: Path, python: Path, folder: Path) -> Path:
    """A wheel of this interpreter, made from the sdist, with the tag that PyPI asks for."""
    plain, repaired = folder / "plain", folder / "repaired"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", plain, sdist, cwd=folder)
    (wheel,) = plain.glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "-w", repaired, wheel, cwd=folder)
    (wheel,) = repaired.glob("*.whl")
    expect("-manylinux_" in wheel.name, f"PyPI does not take {wheel.name}")
    check_contents(wheel)
    return wheel


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(archive.read(about).decode())
    held = {name for name in names if name.startswith("pepr_profiler/")}
    listed = tracked("pepr_profiler")
    expect(held >= listed, f"the wheel lacks {sorted(listed - held)}")
    extra = sorted(held - listed)
    expect(
        len(extra) == 1
        and extra[0].startswith("pepr_profiler/_core.")
        and extra[0].endswith(".so"),
        f"the wheel should hold one core beside the package's files, not {extra}",
    )
    others = {name for name in set(names) - held if ".dist-info/" not in name}
    expect(not others, f"the wheel holds what is no part of it: {sorted(others)}")
    (plain,) = facts.get_all("License-Expression", ["none"])
    expect(plain == "Apache-2.0", f"its license is {plain}")
    licenses = {Path(name).name for name in names if "/licenses/" in name}
    expect({"LICENSE", "NOTICE"} <= licenses, f"it has the licenses {licenses}")
    expect(facts["Description-Content-Type"] == "text/markdown", "its README is no Markdown")
    expect(str(facts.get_payload()).startswith("# pepr-profiler"), "it has no README")


def use(wheel: Path, interpreter: Path, folder: Path) -> None:
    """Does what a new user does, who has installed the wheel and no extra."""
    run(interpreter, "-m", "venv", folder / "bare", cwd=folder)
    python, profile = (folder / "bare" / "bin" / name for name in ("python", "pepr-profile"))
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    where = "import pepr_profiler; print(pepr_profiler.__file__)"
    home = Path(run(python, "-c", where, cwd=folder).stdout.strip())
    expect(folder in home.parents, f"another one is imported: {home}")
    version = run(profile, "--version", cwd=folder).stdout.split()[-1]
    expect(f"-{version}-" in wheel.name, f"--version prints {version}")
    modules = f"import sys, pepr_profiler.commands.run; print(*{HEAVY} & set(sys.modules))"
    loaded = run(python, "-c", modules, cwd=folder).stdout.split()
    expect(not loaded, f"before the command starts {loaded} are imported")

    run(profile, "--", "true", cwd=folder)
    metric = ("--metric", "acc=acc ([0-9.]+)")
    for name, acc in (("one", "0.5"), ("two", "0.9")):
        run(profile, "--name", name, *metric, "--", "echo", f"acc {acc}", cwd=folder)
    run(profile, "--", "sh", "-c", "exit 7", cwd=folder, status=7)
    done = run(profile, "report", "last", "--json", "-", cwd=folder)
    expect(json.loads(done.stdout)["exit_code"] == 7, "report shows another run")
    run(profile, "sensors", cwd=folder)
    run(profile, "daemon", "--help", cwd=folder)
    listed = run(profile, "runs", "list", cwd=folder).stdout.splitlines()
    expect(len(listed) == 4, f"runs list shows {listed}")
    refused = run(profile, "compare", "--resource", "carbon", cwd=folder, status=2)
    expect("fix:" in refused.stderr, "compare refuses without a remedy")
    (folder / "t.csv").write_text(TABLE)
    columns = ("--performance", "acc", "--resource", "energy")
    scored = run(profile, "score", "t.csv", *columns, "--json", "-", cwd=folder)
    rows = json.loads(scored.stdout)["rankings"][0]["rows"]
    expect([row["pepr"] for row in rows] == [0.9, 0.475], f"score gives {rows}")
    page = run(profile, "report", "last", "-o", "page.html", cwd=folder, status=2)
    expect("pepr-profiler[report]" in page.stderr, f"the extra is not named: {page.stderr}")
    (folder / "meter").write_text(REPLAY)
    power_w = float(run(python, "-c", BLOCK, cwd=folder).stdout)
    expect(abs(power_w - 100) < 0.01, f"a block at 100 W was measured as {power_w} W")
    run(profile, "report", "last", cwd=folder)


def test_sdist(sdist: Path, tests: str, folder: Path) -> None:
    """Runs tests from the unpacked sdist, as the README says."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    named = [f"tests/{name}.py" for name in QUICK] if tests == "quick" else []
    done = run("sh", "tools/test.sh", "-q", *named, cwd=source)
    print(f"          {done.stdout.strip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/wheel.py", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="for each Python found, not this alone")
    parser.add_argument("--tests", choices=["none", "quick", "all"], default="quick")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="dist/ if not given")
    arguments = parser.parse_args()
    mine = {f"3.{sys.version_info[1]}": Path(sys.executable)}
    pythons = interpreters() if arguments.all else mine
    if missing := [f"3.{n}" for n in MINORS if arguments.all and f"3.{n}" not in pythons]:
        print(f"this machine has no CPython {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="pepr-wheel-") as temporary:
        folders = iter(Path(temporary, str(n)) for n in range(100))

        def folder() -> Path:
            made = next(folders)
            made.mkdir()
            return made

        with step("sdist"):
            sdist = build_sdist(folder())
        made = [sdist]
        for version, python in pythons.items():
            place = folder()
            with step(f"wheel for {version}"):
                made.append(build_wheel(sdist, python, place))
            with step(f"used with {version}"):
                use(made[-1], python, folder())
        if arguments.tests != "none":
            with step(f"tests from the sdist ({arguments.tests})"):
                test_sdist(sdist, arguments.tests, folder())
        arguments.into.mkdir(parents=True, exist_ok=True)
        for file in made:
            shutil.copy(file, arguments.into)
            print(f"{file.stat().st_size >> 10:6} kB  {arguments.into / file.name}")


if __name__ == "__main__":
    main()
