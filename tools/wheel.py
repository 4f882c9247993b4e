"""Builds the sdist and the wheel from it, and uses the wheel where nothing else is.

    python3 tools/wheel.py

What is checked: the wheel holds the package with its data and types, and neither tests nor sources
of the core; its metadata name what the README promises; installed without extras, far from the
repository, the verbs work, and what needs an extra says which one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = "model,acc,energy\na,0.9,10\nb,0.95,20\n"
HEAVY = {"numpy", "rich", "nanoarrow", "torch", "pyarrow", "matplotlib", "jinja2"}


def say(text: str) -> None:
    print(text, flush=True)


def run(
    *command: object, cwd: Path, status: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """The command, whose status is as expected, in an environment without any of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PEPR_", "PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "PEPR_STORE": str(cwd / "store"), "PEPR_DAEMON": "off", **env},
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


def built(folder: Path) -> Path:
    """A wheel, made from the sdist of this checkout."""
    run(sys.executable, "-m", "venv", folder / "build", cwd=folder)
    python = folder / "build" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "setuptools>=77", cwd=folder)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(python, "-c", make, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    say(f"built {wheel.name}, {wheel.stat().st_size >> 10} kB, from {sdist.name}")
    return wheel


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(archive.read(about).decode())
    held = {name for name in names if name.startswith("pepr_profiler/")}
    listed = run("git", "ls-files", "pepr_profiler", cwd=ROOT).stdout.split()
    expect(held >= set(listed), f"the wheel lacks {sorted(set(listed) - held)}")
    extra = sorted(held - set(listed))
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
    say(f"holds {len(held)} files")


def use(wheel: Path, folder: Path) -> None:
    run(sys.executable, "-m", "venv", folder / "bare", cwd=folder)
    python, profile = (folder / "bare" / "bin" / name for name in ("python", "pepr-profile"))
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    where = "import pepr_profiler; print(pepr_profiler.__file__)"
    home = Path(run(python, "-c", where, cwd=folder).stdout.strip())
    expect(folder in home.parents, f"another one is imported: {home}")
    modules = f"import sys, pepr_profiler.commands.run; print(*{HEAVY} & set(sys.modules))"
    loaded = run(python, "-c", modules, cwd=folder).stdout.split()
    expect(not loaded, f"before the command starts {loaded} are imported")

    metric = ("--metric", "acc=acc ([0-9.]+)")
    for name, acc in (("one", "0.5"), ("two", "0.9")):
        run(profile, "--name", name, *metric, "--", "echo", f"acc {acc}", cwd=folder)
    run(profile, "--", "sh", "-c", "exit 7", cwd=folder, status=7)
    done = run(profile, "report", "last", "--json", "-", cwd=folder)
    expect(json.loads(done.stdout)["exit_code"] == 7, "report tells another run")
    run(profile, "sensors", cwd=folder)
    listed = run(profile, "runs", "list", cwd=folder).stdout.splitlines()
    expect(len(listed) == 3, f"runs list shows {listed}")
    refused = run(profile, "compare", "--resource", "carbon", cwd=folder, status=2)
    expect("fix:" in refused.stderr, "compare refuses without a remedy")
    (folder / "t.csv").write_text(TABLE)
    columns = ("--performance", "acc", "--resource", "energy")
    scored = run(profile, "score", "t.csv", *columns, "--json", "-", cwd=folder)
    rows = json.loads(scored.stdout)["rankings"][0]["rows"]
    expect([row["pepr"] for row in rows] == [0.9, 0.475], f"score gives {rows}")
    page = run(profile, "report", "last", "-o", "page.html", cwd=folder, status=2)
    expect("pepr-profiler[report]" in page.stderr, f"the extra is not named: {page.stderr}")
    block = "from pepr_profiler import profile\nwith profile('x') as run: run.log(a=1)\n"
    expect(
        run(python, "-c", f"{block}print(run.run_id)", cwd=folder).stdout.startswith("x-"),
        "profile() has no run",
    )
    say("installed alone, its verbs work")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pepr-wheel-") as temporary:
        folder = Path(temporary)
        wheel = built(folder)
        check_contents(wheel)
        use(wheel, folder)


if __name__ == "__main__":
    main()
