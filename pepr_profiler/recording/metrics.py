"""Metrics of a command, found in its output or in files that it writes.

    metrics = Metrics(["accuracy=test acc: ([0-9.]+)"], ["results.json:test.f1:f1"])
    relay = Relay(metrics.feed) if metrics.has_patterns else None
    …                                # while the child runs, on every tick:
    metrics.watch()                  # the files that were written meanwhile
    for point in metrics.take(): …   # every value in order: a curve; the last one counts
    …                                # after it has ended:
    warnings = metrics.finish()      # then take() once more

A request that cannot work raises UsageError in the constructor, before anything starts. What goes
wrong later becomes a warning {"code", "text", "hint"}: a missing metric never costs the run.
This is imported only when a metric is asked for: `re` delays the child's start by milliseconds.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pepr_profiler.errors import UsageError
from pepr_profiler.recording.linear_search import LinearPattern, TooSlowError
from pepr_profiler.trace.files import open_file

_NAME = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
# ECMA-48: control sequences (colour, cursor), operating-system commands (title, links), the rest.
_ESCAPES = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\r\n]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])"
)
# A child that never ends its line must not grow our memory; the end of the line is kept.
_LINE_BYTES = 64 * 1024
_SLOW_S, _SLOW_SHARE, _QUICK_S = 2.0, 0.05, 0.01
# Lines that take longer than 0.01 s may take 2 s, and a twentieth of the run, in all: while we
# search, the child's output waits.
_MOST_FILE_BYTES = 64 << 20  # of a metric file, which is read whole
_WATCH_SHARE = 200  # watching files may take a two-hundredth of the time

_PATTERN_FIX = "--metric accuracy='test acc: ([0-9.]+)'"
_FILE_FIX = "--metric-file results.json:accuracy, or FILE:KEY:NAME"


class MetricPoint(NamedTuple):
    """One value of one metric, at `t_ns` on CLOCK_MONOTONIC."""

    t_ns: int
    name: str
    value: float


class Metrics:
    """The metrics asked for on the command line, and their values as they appear.

    `feed` may be called from several threads at once, `take` from another.
    """

    def __init__(self, patterns: Sequence[str], files: Sequence[str] = ()) -> None:
        """Parse NAME=REGEX and FILE:KEY[:NAME]; call it before the child starts.

        What the files are now is remembered: one that the run leaves as it was is stale.
        """
        self._patterns = [_Pattern(text) for text in patterns]
        self._files = [_MetricFile(text) for text in files]
        for name in self.names:
            if self.names.count(name) > 1:
                raise UsageError(
                    f"metric {name!r} is asked for {self.names.count(name)} times",
                    why="only one value can be the run's",
                    fix="give each its own NAME, or join the patterns: (?:one|other): ([0-9.]+)",
                )
        self._points: deque[MetricPoint] = deque()
        self._lines: dict[int, _Lines] = {}
        self._lock = threading.Lock()
        self._next_look_s = 0.0

    @property
    def names(self) -> list[str]:
        """The names asked for, patterns first."""
        return [p.name for p in self._patterns] + [f.name for f in self._files]

    @property
    def has_patterns(self) -> bool:
        """Whether the child's output must be read."""
        return bool(self._patterns)

    def feed(self, channel: int, data: bytes, t_ns: int) -> None:
        """Search the lines that `data`, read at `t_ns`, completes on `channel`."""
        with self._lock:
            if channel not in self._lines:
                self._lines[channel] = _Lines(self._patterns)
            for line in self._lines[channel].split(data, t_ns):
                self._search(line)

    def take(self) -> list[MetricPoint]:
        """The values found since the last call, in order."""
        points = []
        while self._points:
            points.append(self._points.popleft())
        return points

    def watch(self) -> None:
        """Read the files that have changed; one that is just being written waits for the next look.

        A look that takes long puts the next one off.
        """
        now_s = time.monotonic()
        if not self._files or now_s < self._next_look_s:
            return
        for file in self._files:
            if file.is_news():
                with suppress(_UnusableError):  # if it stays so, finish() reports it
                    self._read(file)
        self._next_look_s = now_s + _WATCH_SHARE * (time.monotonic() - now_s)

    def _read(self, file: _MetricFile) -> None:
        self._points.append(MetricPoint(time.monotonic_ns(), file.name, file.read()))

    def finish(self) -> list[dict[str, str]]:
        """Search what has no line end, read the files; the warnings of everything that failed."""
        with self._lock:
            for lines in self._lines.values():
                for line in lines.rest():
                    self._search(line)
            for pattern in self._patterns:
                self._points.extend(pattern.series.rest())
        warnings = [warning for pattern in self._patterns for warning in pattern.warnings()]
        for file in self._files:
            if file.is_read():
                continue
            try:
                self._read(file)
            except _UnusableError as problem:
                warnings.append(problem.warning)
        return warnings

    def _search(self, line: _Line) -> None:
        for pattern in self._patterns:
            add, t_ns, name = pattern.series.add, line.t_ns, pattern.name
            for value in pattern.values(line):
                if kept := add(MetricPoint(t_ns, name, value)):
                    self._points.extend(kept)


_WHOLE = 1000  # values of one metric that are all kept
_HELD_NS = 10_000_000_000  # the longest that a value is held back


class _Series:
    """The values of one metric: the first 1,000, then fewer and fewer, so that they stay few.

    Of those between two that are kept in any case, the lowest, the highest and the last are kept
    too, so that the best value of all and the last are always there. A billion values leave
    60,000, and 3 more every 10 s.
    """

    def __init__(self) -> None:
        self.found = self.kept = 0
        self._stride, self._in_stride = 1, 0
        self._low: MetricPoint | None = None  # what is held back; None if nothing is
        self._high = self._last = MetricPoint(0, "", 0.0)
        self._low_at = self._high_at = 0  # the numbers of these
        self._held_since_ns = 0

    def add(self, point: MetricPoint) -> Sequence[MetricPoint]:
        """What is to be kept now that `point` was found."""
        self.found += 1
        if self._stride == 1:
            self.kept += 1
            if self.kept == _WHOLE:
                self._stride, self._in_stride = 2, 0
            return (point,)
        if self._low is None:
            self._held_since_ns = point.t_ns
            self._low = self._high = point
            self._low_at = self._high_at = self.found
        elif point.value < self._low.value:
            self._low, self._low_at = point, self.found
        elif point.value > self._high.value:
            self._high, self._high_at = point, self.found
        self._last = point
        if self.found % self._stride == 0:
            self._in_stride += 1
            if self._in_stride == _WHOLE:
                self._stride, self._in_stride = 2 * self._stride, 0
        elif point.t_ns - self._held_since_ns < _HELD_NS:
            return ()
        return self.rest()

    def rest(self) -> list[MetricPoint]:
        """What is still held back, in order."""
        if self._low is None:
            return []
        held = {self._low_at: self._low, self._high_at: self._high, self.found: self._last}
        self._low = None
        self.kept += len(held)
        return [point for _, point in sorted(held.items())]


class _Line(NamedTuple):
    text: str
    t_ns: int
    cut: bool = False  # its beginning was too long ago to be kept


class _Lines:
    """Bytes in, lines out: ended by \\n or \\r, without escape sequences, of bounded length.

    Only lines that one of the patterns may match. They are looked for in all that has come at once,
    which takes a hundredth of the time of looking at each line.
    """

    def __init__(self, patterns: Sequence[_Pattern]) -> None:
        self._literals = [pattern.literal for pattern in patterns if pattern.literal]
        self._others = [pattern for pattern in patterns if not pattern.literal]
        self._open = bytearray()
        self._t_ns = 0
        self._cut = False

    def split(self, data: bytes, t_ns: int) -> Iterator[_Line]:
        """The lines that end in `data`; what follows the last end stays open."""
        if b"\r" in data:
            data = data.replace(b"\r", b"\n")
        first = data.find(b"\n")
        if first < 0:
            self._extend(data, t_ns)
            return
        last = data.rfind(b"\n")
        self._extend(data[:first], t_ns)
        yield from self.rest()
        if last > first:
            for whole in self._wanted(data[first + 1 : last]):
                yield _Line(whole.decode("utf-8", "replace"), t_ns)
        self._extend(data[last + 1 :], t_ns)

    def _wanted(self, block: bytes) -> Iterable[bytes]:
        """Those of whole lines that may match, without their escape sequences."""
        if b"\x1b" in block:
            block = _ESCAPES.sub(b"", block)
        if self._others and any(pattern.may_be_in(block) for pattern in self._others):
            return filter(None, block.split(b"\n"))
        wanted: dict[int, bytes] = {}
        for literal in self._literals:
            at = block.find(literal)
            while at >= 0:
                begin = block.rfind(b"\n", 0, at) + 1
                end = block.find(b"\n", at)
                end = len(block) if end < 0 else end
                wanted[begin] = block[begin:end]
                at = block.find(literal, end + 1)
        return [line for _, line in sorted(wanted.items())]

    def rest(self) -> Iterator[_Line]:
        """The open line, if there is one, as if it had ended."""
        if self._open:
            line = _plain(bytes(self._open))
            if self._others or any(literal in line for literal in self._literals):
                yield _Line(line.decode("utf-8", "replace"), self._t_ns, self._cut)
        self._open.clear()
        self._cut = False

    def _extend(self, part: bytes, t_ns: int) -> None:
        if not part:  # a progress bar starts with \r: its line is as old as its last character
            return
        self._open += part
        self._t_ns = t_ns
        if len(self._open) > _LINE_BYTES:
            del self._open[:-_LINE_BYTES]
            self._cut = True


def _plain(line: bytes) -> bytes:
    return _ESCAPES.sub(b"", line) if b"\x1b" in line else line


class _Pattern:
    """NAME=REGEX; the value is group 1 if there is a group, else the whole match."""

    def __init__(self, text: str) -> None:
        name, equals, regex = text.partition("=")
        if not equals or not regex:
            raise UsageError(
                f"cannot read --metric {text!r}",
                why="it is not NAME=REGEX",
                fix=_PATTERN_FIX,
            )
        self.name = _checked_name(name, f"--metric {text!r}", fix=_PATTERN_FIX)
        try:
            self._search = LinearPattern(regex)
        except (re.error, RecursionError, OverflowError) as error:
            at = getattr(error, "pos", None)
            raise UsageError(
                f"the pattern of metric {name!r} does not compile",
                why=f"{getattr(error, 'msg', error)}"
                + ("" if at is None else f", here:\n  {regex}\n  {' ' * at}^"),
                fix="correct it, in single quotes so that the shell leaves it alone: "
                + _PATTERN_FIX,
            ) from error
        if self._search.regex.groups > 1:
            raise UsageError(
                f"the pattern of metric {name!r} has {self._search.regex.groups} groups",
                why="it is unclear which of them holds the value",
                fix="put (?:…) for (…) around everything but the value",
            )
        if not self._search.is_bounded:
            raise UsageError(
                f"the pattern of metric {name!r} could take for ever",
                why="it repeats a part that repeats itself, and looks around or back",
                fix="leave out (?=…), (?<=…) and \\1, or the repetition in the repetition, as in "
                "(?:a+)+",
            )
        self.literal = self._search.literal.encode()
        self.series = _Series()
        self._matches = 0
        self._given_up = self._longest_given_up = 0
        self._slow_s = 0.0
        self._begun_s = time.monotonic()
        self._rejected = 0
        self._rejected_text = ""

    def may_be_in(self, lines: bytes) -> bool:
        """Whether one of several lines may match."""
        if self._search.lower_literal.encode() not in lines.lower():
            return False
        return self._search.may_be_in(lines.decode("utf-8", "replace"))

    def values(self, line: _Line) -> Iterator[float]:
        """The values in a line, unless that has taken too much time in all."""
        if self._search.is_short(line.text):  # as most are: its time needs no clock
            yield from self._values(line)
            return
        begun_s = time.monotonic()
        try:
            if self._slow_s > _SLOW_S + (begun_s - self._begun_s) * _SLOW_SHARE:
                raise TooSlowError("the others took too long")
            yield from self._values(line)
        except TooSlowError:
            self._given_up += 1
            self._longest_given_up = max(self._longest_given_up, len(line.text))
        took_s = time.monotonic() - begun_s
        self._slow_s += took_s if took_s > _QUICK_S else 0.0

    def _values(self, line: _Line) -> Iterator[float]:
        for start, text in self._search.find(line.text):
            if line.cut and start == 0:
                continue  # the first digits may be those that were not kept
            self._matches += 1
            value = _number(text)
            if value is None:
                self._rejected += 1
                self._rejected_text = text or ""
            else:
                yield value

    def warnings(self) -> Iterator[dict[str, str]]:
        if not self._matches:
            yield {
                "code": "metric-never-matched",
                "text": f"metric {self.name!r} was never found in the command's output: "
                f"no line matches {self._search.regex.pattern!r}",
                "hint": f"set it afterwards: pepr-profile runs set RUN {self.name}=VALUE",
            }
        if self._given_up:
            yield {
                "code": "metric-too-slow",
                "text": f"metric {self.name!r}: {self._given_up:,} lines of up to "
                f"{self._longest_given_up:,} characters were not searched to their end, because "
                f"{self._search.regex.pattern!r} takes too long there",
                "hint": "begin it with the text before the value; avoid a repetition in a "
                "repetition, as in (?:a+)+, and several .*",
            }
        if self.series.kept < self.series.found:
            yield {
                "code": "metric-thinned",
                "text": f"metric {self.name!r} was found {self.series.found:,} times; "
                f"{self.series.kept:,} of the values are stored: the first and the last, the "
                "lowest and the highest, and an even sample",
                "hint": "none is needed; a pattern that matches fewer lines stores all",
            }
        if self._rejected:
            yield {
                "code": "metric-not-a-number",
                "text": f"metric {self.name!r}: {self._rejected} of {self._matches} matches are "
                f"not a finite number, the last one {self._rejected_text[:80]!r}",
                "hint": "put a group around the number alone: " + _PATTERN_FIX,
            }


class _UnusableError(Exception):
    """A metric file that gives no value, with the warning to show."""

    def __init__(self, code: str, text: str, hint: str) -> None:
        super().__init__(text)
        self.warning = {"code": code, "text": text, "hint": hint}


class _MetricFile:
    """FILE:KEY[:NAME]; JSON, JSON lines, CSV (.csv, .tsv) as written by the run.

    KEY is a column of a table, or a dotted path into JSON (`test.acc`, `history.-1.loss`); a key
    that contains dots itself is found too. Of lines and rows, the last one with a value counts.
    """

    def __init__(self, text: str) -> None:
        parts = text.split(":")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise UsageError(
                f"cannot read --metric-file {text!r}",
                why="it is not FILE:KEY or FILE:KEY:NAME",
                fix=_FILE_FIX,
            )
        self.path = Path(parts[0]).absolute()
        self.key = parts[1]
        self.name = _checked_name(parts[-1], f"--metric-file {text!r}", fix=_FILE_FIX)
        self._before = self._seen = self._fingerprint()

    def is_news(self) -> bool:
        """Whether it is there and not as it was when it was last read, or at the start."""
        # A FIFO is not even opened: its writer would take us for the reader that it waits for.
        return self.path.is_file() and self._fingerprint() != self._seen

    def is_read(self) -> bool:
        """Whether it has been read as it is now."""
        return self._seen != self._before and self._fingerprint() == self._seen

    def _fingerprint(self) -> tuple[int, ...] | None:
        # Compared with itself only, so that the clock of a file server does not matter.
        try:
            now = self.path.stat()
        except OSError:
            return None
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns

    def read(self) -> float:
        """The value; raises _UnusableError with the reason."""
        hint = f"set it afterwards: pepr-profile runs set RUN {self.name}=VALUE"
        try:
            # It may be a link: programs keep `latest.json` so, and the user has named it.
            descriptor = open_file(self.path, most_bytes=_MOST_FILE_BYTES, linked=True)
            with open(descriptor, encoding="utf-8-sig", newline="") as file:  # noqa: PTH123
                if self._before is not None and self._fingerprint() == self._before:
                    raise _UnusableError(
                        "metric-file-stale",
                        f"{self.path} is older than this run, which did not write it: "
                        f"its {self.key!r} is not used",
                        hint,
                    )
                seen = self._fingerprint()
                text = file.read()
        except FileNotFoundError:
            raise _UnusableError(
                "metric-file-missing",
                f"the run left no {self.path} to read {self.name!r} from",
                "give the path as seen from where pepr-profile starts; " + hint,
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise _UnusableError(
                "metric-file-unreadable", f"{self.path} cannot be read: {reason}", hint
            ) from error
        try:
            found = self._look_up(text)
        except KeyError as error:
            raise _UnusableError(
                "metric-key-missing",
                f"{self.path} has no value for {self.key!r}; it has {error.args[0]}",
                f"name one of those: --metric-file {self.path.name}:KEY:{self.name}",
            ) from error
        except (ValueError, RecursionError) as error:
            raise _UnusableError(
                "metric-file-malformed",
                f"{self.path} is not what its name or beginning promises: {error}",
                "write JSON, JSON lines, .csv or .tsv; " + hint,
            ) from error
        value = _number(found)
        if value is None:
            raise _UnusableError(
                "metric-not-a-number",
                f"{self.key!r} in {self.path} is not a finite number: {str(found)[:80]!r}",
                hint,
            )
        self._seen = seen
        return value

    def _look_up(self, text: str) -> Any:
        """The value of the key; KeyError(what there is instead), ValueError where malformed."""
        if self.path.suffix in (".csv", ".tsv"):
            return self._look_up_in_table(text)
        import json

        lines = [line for line in text.split("\n") if line.strip()]
        try:
            return _at_path(json.loads(text), self.key.split("."))
        except json.JSONDecodeError:
            if len(lines) < 2 or not lines[-1].startswith("{"):
                raise
        known = ""
        for line in reversed(lines):
            try:
                return _at_path(json.loads(line), self.key.split("."))
            except KeyError as error:
                known = known or error.args[0]
        raise KeyError(known)

    def _look_up_in_table(self, text: str) -> str:
        import csv
        import io

        delimiter = "\t" if self.path.suffix == ".tsv" else ","
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise ValueError(str(error)) from error
        header = rows.pop(0) if rows else []
        if self.key not in header:
            raise KeyError("the columns " + ", ".join(header))
        column = header.index(self.key)
        for row in reversed(rows):
            if column < len(row) and row[column].strip():
                return row[column]
        raise KeyError("no row with one")


def _at_path(tree: Any, path: Sequence[str]) -> Any:
    """Follow a dotted path into lists and dicts. KeyError names what the last level has instead."""
    if not path:
        return tree
    if isinstance(tree, list):
        try:
            return _at_path(tree[int(path[0])], path[1:])
        except (ValueError, IndexError):
            raise KeyError(f"a list of {len(tree)} there") from None
    if not isinstance(tree, dict):
        raise KeyError(f"no more below {str(tree)[:40]!r}")
    missing = KeyError("the keys " + ", ".join(list(tree)[:20]) if tree else "no keys")
    for length in range(len(path), 0, -1):  # a key may contain dots itself: the longest first
        key = ".".join(path[:length])
        if key in tree:
            try:
                return _at_path(tree[key], path[length:])
            except KeyError as error:
                missing = error
    raise missing


def _number(value: Any) -> float | None:
    """A finite float, or None: true, "95 %", "nan" and lists are no values of a metric."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _checked_name(name: str, where: str, *, fix: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a metric, in {where}",
            why="a name is a letter or _, then letters, digits and _ . / -",
            fix=fix,
        )
    return name
