"""Opens a tool and measures windows on command, in the tool's environment: standard library only.

Commands, one a line on stdin, obeyed in turn; instants are of CLOCK_MONOTONIC:

    begin NAME [NOT_BEFORE_NS]    end NAME [NS_AFTER_ITS_BEGIN]    quit    exit STATUS

`exit` is sys.exit, whatever is open. With --stdout FILE, what the tool itself prints goes there.

One JSON line each on stdout: first {"ready": true} or {"failed": why}, then one a window,
{"name", "begin_ns", "end_ns", "energy_j": {component: J} or null, "u_j": {component: J, k = 2} or
null, "error": str or null}, as soon as the tool knows it: at the end of the window, or when all is
closed. A window is what a caller puts into it: from the return of begin to the call of end.
Components are `gpu:0`, `cpu:1`, `dram:0` or, where a tool tells sums only, `gpu`, `cpu`, `dram`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

SPIN_S = 2e-4  # the last stretch before an instant is not slept


def until(at_ns):
    """Returns just after the instant, mostly asleep."""
    while (left_s := (at_ns - time.monotonic_ns()) * 1e-9) > 0:
        if left_s > SPIN_S:
            time.sleep(left_s - SPIN_S)


def why(error):
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def serve(open_tool):
    """Serves stdin with `open_tool(rate_hz)`, whose methods are:

    begin(name); end(name) -> {component: J}, or None: known at the end of all;
    close() -> {name: {component: J}} of those, {name: ({component: J}, {component: u})}, or None.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=None, metavar="HZ")
    parser.add_argument("--stdout", metavar="FILE")
    arguments = parser.parse_args()
    rate_hz = arguments.rate
    # What a tool prints must not come between our lines.
    told = os.fdopen(os.dup(1), "w", buffering=1)
    if arguments.stdout is None:
        os.dup2(2, 1)
    else:
        with Path(arguments.stdout).open("wb") as file:
            os.dup2(file.fileno(), 1)

    def tell(facts):
        told.write(json.dumps(facts) + "\n")

    try:
        tool = open_tool(rate_hz)
    except (Exception, SystemExit) as error:
        tell({"failed": why(error)})
        return
    tell({"ready": True})
    windows = {}
    for line in sys.stdin:
        command, *words = line.split()
        if command == "quit":
            break
        if command == "exit":
            sys.exit(int(words[0]))
        name = words[0]
        row = windows.setdefault(name, {"name": name, "energy_j": None, "u_j": None, "error": None})
        wait_ns = int(words[1]) if len(words) > 1 else 0
        until(wait_ns if command == "begin" else row.get("begin_ns", 0) + wait_ns)
        try:
            if command == "begin":
                tool.begin(name)
                row["begin_ns"] = time.monotonic_ns()
                continue
            row["end_ns"] = time.monotonic_ns()
            if row["error"] is None:
                row["energy_j"] = tool.end(name)
        except (Exception, SystemExit) as error:
            row["error"] = why(error)
            row.setdefault("begin_ns", time.monotonic_ns())
        if command == "end" and (row["energy_j"] is not None or row["error"] is not None):
            tell(windows.pop(name))
    try:
        known = tool.close() or {}
    except (Exception, SystemExit) as error:
        known, failed = {}, why(error)
    else:
        failed = "the tool told nothing about it"
    for name, row in windows.items():
        if name in known:
            found = known[name]
            row["energy_j"], row["u_j"] = found if isinstance(found, tuple) else (found, None)
        else:
            row["error"] = row["error"] or failed
        tell(row)
