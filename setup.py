"""Builds the native core with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def nvml_include() -> Path:
    """The directory of nvml.h inside the installed package nvidia-nvml-dev."""
    for file in importlib.metadata.files("nvidia-nvml-dev") or []:
        if file.name == "nvml.h":
            return Path(str(file.locate())).resolve().parent
    sys.exit("nvml.h not found in nvidia-nvml-dev; reinstall it: pip install -U nvidia-nvml-dev")


def require_compiler() -> None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        sys.exit(
            f"pepr-profiler needs a C++17 compiler; found none of {', '.join(names)}.\n"
            "Install one: Debian/Ubuntu: sudo apt-get install g++; "
            "Fedora: sudo dnf install gcc-c++; conda: conda install gxx_linux-64"
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        require_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        # Its paths may lead into a build environment of pip that no longer exists.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPEPR_NVML_INCLUDE={nvml_include()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *os.environ.get("PEPR_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("pepr_profiler._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
