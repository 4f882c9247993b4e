"""Compile the kit's C++ once per content. Raises UnavailableError where this machine cannot."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")


class UnavailableError(Exception):
    """A tool is missing here; the text says which and what installs it."""


def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise UnavailableError("no C++ compiler ($CXX, g++, c++); install g++")


def nvml_include() -> Path:
    """The folder of nvml.h from the PyPI package nvidia-nvml-dev, wherever it unpacks it."""
    try:
        files = metadata.files("nvidia-nvml-dev") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvml.h":
            return Path(str(file.locate())).parent
    raise UnavailableError("no nvml.h; pip install nvidia-nvml-dev")


def build(
    cache: Path, name: str, sources: tuple[str, ...], *flags: str, exports: str | None = None
) -> Path:
    """The program or library `name`, compiled from `sources` (paths below this folder).

    `exports` is a linker's version script. The result is kept in `cache` under a hash of every
    C++ file of the kit, the flags and the compiler. Raises CalledProcessError, the compiler's
    words printed, when the code is wrong.
    """
    tool = compiler()
    digest = hashlib.sha256(repr((tool, name, sources, flags, exports)).encode())
    for file in sorted([*HERE.rglob("*.h"), *HERE.rglob("*.cpp")]):
        digest.update(file.read_bytes())
    target = cache.resolve() / f"{digest.hexdigest()[:16]}-{name}"
    if not target.exists():
        draft = target.with_suffix(f".{os.getpid()}")
        if exports is not None:
            script = target.with_suffix(f".{os.getpid()}.map")
            script.write_text(exports)
            flags = (*flags, f"-Wl,--version-script={script}")
        paths = [str(HERE / source) for source in sources]
        command = [tool, "-std=c++17", "-O2", *WARNINGS, f"-I{HERE}", *paths, *flags]
        subprocess.run([*command, "-o", str(draft)], check=True)
        draft.replace(target)  # atomic: pytest-xdist's workers may build side by side
    return target
