"""How fast a command's output passes while metrics are looked for in it.

    python -m benchmarks.metrics

Prints MB/s of 64 MB of short lines: through a pipe alone, through the profiler without a match, and
with a match in each line; and the time that patterns which go back and try again take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_MB = 64
_LINE = b"step %7d loss 0.123 lr 0.001\n"
_PATTERNS = {
    "no match": "acc=test acc: ([0-9.]+)",
    "no match, no text in the pattern": "acc=(?i)test acc: ([0-9.]+)",
    "a match in each line": "loss=loss ([0-9.]+)",
}
_SLOW = "acc=(?:a+)+b ([0-9]+)"


def _mb_per_s(file: Path, pattern: str | None) -> float:
    """The best of three: `cat FILE`, piped to us, from its start to its end."""
    if pattern is None:
        begun_s = time.monotonic()
        with (
            file.open("rb") as source,
            subprocess.Popen(["cat"], stdin=source, stdout=subprocess.PIPE) as child,
        ):
            assert child.stdout is not None
            while os.read(child.stdout.fileno(), 1 << 16):
                pass
        return file.stat().st_size / 1e6 / (time.monotonic() - begun_s)
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "s.json"
        command = [sys.executable, "-m", "pepr_profiler", "run", "--store", folder, "--json"]
        command += [str(summary), "-q", "--metric", pattern, "--", "cat", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return file.stat().st_size / 1e6 / float(json.loads(summary.read_text())["time_s"])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "log"
        count = _MB * 1_000_000 // len(_LINE % 0)
        file.write_bytes(b"".join(_LINE % i for i in range(count)))
        alone = max(_mb_per_s(file, None) for _ in range(3))
        print(f"{'a pipe alone':<36} {alone:8.0f} MB/s")
        for name, pattern in _PATTERNS.items():
            speed = max(_mb_per_s(file, pattern) for _ in range(3))
            print(f"{name:<36} {speed:8.0f} MB/s  {speed / alone:6.1%} of a pipe")
        file.write_bytes(b"b " + b"a" * 40 + b"\n" + 3 * (b"b " + b"a" * 60_000 + b"\n"))
        took_s = file.stat().st_size / 1e6 / _mb_per_s(file, _SLOW)
        print(f"{'(?:a+)+b on long lines':<36} {took_s:8.2f} s")


if __name__ == "__main__":
    main()
