"""What a build gives: errors that help, one version everywhere, types that tell the truth."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pepr_profiler
from pepr_profiler import _core

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("named", [None, "no-such-compiler -m64"])
def test_build_without_a_compiler_says_what_to_install(tmp_path: Path, named: str | None) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    environment["PATH"] = str(tmp_path)  # nothing is found there
    if named:
        environment["CXX"] = named
    folders = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]

    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "needs a C++17 compiler" in done.stderr
    assert (named or "g++").split()[0] in done.stderr
    assert "sudo apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_stands_in_one_place() -> None:
    written = [*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("*.txt"), ROOT / "Makefile"]
    for folder in ("csrc", "docs", "pepr_profiler"):
        written += [
            p for p in (ROOT / folder).rglob("*") if p.suffix in {".cpp", ".h", ".md", ".py"}
        ]
    copies = [p for p in written if f'"{pepr_profiler.__version__}"' in p.read_text()]
    assert copies == [ROOT / "pepr_profiler" / "__init__.py"]


def test_printing_the_version_reads_no_metadata_of_packages() -> None:
    code = (
        "import sys; from pepr_profiler.commands import cli;"
        "cli.main(['--version'], standalone_mode=False); print('importlib.metadata' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"pepr-profile, version {pepr_profiler.__version__}",
        "False",
    ]


def parameters_of(function: ast.FunctionDef) -> list[tuple[str, bool]]:
    """Each parameter's name, and whether it has a default."""
    names = [argument.arg for argument in function.args.args]
    optional = len(function.args.defaults)
    return [(name, len(names) - at <= optional) for at, name in enumerate(names)]


def test_the_stub_of_the_core_has_the_parameters_that_the_core_takes() -> None:
    """stubtest (`make lint`) sees no parameters of native functions; their docstrings have them."""
    stub = ast.parse((ROOT / "pepr_profiler" / "_core.pyi").read_text())
    native = [(_core, stub)]
    native += [(getattr(_core, n.name, None), n) for n in stub.body if isinstance(n, ast.ClassDef)]
    compared = 0
    for owner, node in native:
        for function in node.body:
            value = inspect.getattr_static(owner, getattr(function, "name", ""), None)
            line = (getattr(value, "__doc__", None) or "").partition("\n")[0]
            if isinstance(function, ast.FunctionDef) and line.startswith(f"{function.name}("):
                (real,) = ast.parse(f"def {line}: ...").body
                assert isinstance(real, ast.FunctionDef)
                assert parameters_of(function) == parameters_of(real), line
                compared += 1
    assert compared > 20
