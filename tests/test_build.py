"""What a user meets who builds from source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
