"""Searches for a regular expression in bounded time, whatever the pattern and the text are.

Python's `re` goes back and tries again: `(?:a+)+b` on 40 characters takes hours, in which no other
thread runs and no signal is heard. So the steps that it may take are estimated first. Where they
are too many, the pattern's automaton is followed instead, all of its states at once (R. Cox,
Regular Expression Matching: the Virtual Machine Approach). That takes a time proportional to the
text, in Python code that other threads interrupt. Which characters a part of the pattern matches,
`re` itself is asked. What matches first is the same as with `re`, except where a part that may be
empty is repeated.

google-re2 would be quicker, but its `\\d` and `\\w` know ASCII only and it has no lookaround: one
pattern would find other values where it is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

try:
    from re import _compiler, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as _compiler  # type: ignore[import-not-found, no-redef, unused-ignore]
    import sre_parse as _parser  # type: ignore[import-not-found, no-redef, unused-ignore]

MOST_STEPS = 10_000_000
"""Of `re` in one line: 0.1 to 0.3 s."""

MOST_MOVES = 500_000
"""Of the automaton in one line: 0.3 s."""

_LONGEST_PROGRAM = 2000


class TooSlowError(Exception):
    """A search was given up, or cannot be made in bounded time."""


class LinearPattern:
    """A compiled pattern whose `find` takes bounded time."""

    def __init__(self, regex: str) -> None:
        """Raises as `re.compile` does."""
        self.regex = re.compile(regex)
        tree = _parser.parse(regex)
        self._group = self.regex.groups
        self._steps, self._prefix = _steps_of(tree), _prefix_of(tree)
        self.literal = _literal_of(tree)
        self.lower_literal = _literal_of(tree, lower=True)
        self._tree = tree
        # A text of this length is quick whatever it holds: nothing has to be counted.
        self._short = -1
        if self._steps is not None:
            self._short = (
                int((MOST_STEPS / self._steps.factor) ** (1 / (self._steps.power + 1))) - 1
            )
        self._among_lines: re.Pattern[str] | None = None
        if self._steps is not None and self._steps.power == 0 and _is_local(tree):
            self._among_lines = re.compile(regex, re.MULTILINE)
        self._automaton: _Automaton | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether every line can be searched, at least if it is not long."""
        if self._steps is not None:
            return True
        try:
            self._automaton = self._automaton or _Automaton(self._tree, self._group)
        except TooSlowError:
            return False
        return True

    def is_short(self, text: str) -> bool:
        """Whether a text is so short that it is searched quickly whatever it holds."""
        return len(text) <= self._short

    def may_be_in(self, lines: str) -> bool:
        """Whether one of several lines may match; False only if surely none does."""
        if self._among_lines is None:
            return True
        return self._among_lines.search(lines) is not None

    def find(self, text: str) -> Iterator[tuple[int, str | None]]:
        """Where each match begins, and the group in it, or all of it if there is none.

        Raises TooSlowError if the search takes too long; what was found before it stands.
        """
        if len(text) <= self._short or self._is_quick(text):
            group = self._group
            return ((match.start(), match[group]) for match in self.regex.finditer(text))
        self._automaton = self._automaton or _Automaton(self._tree, self._group)
        return self._automaton.find(text)

    def _is_quick(self, text: str) -> bool:
        if self._steps is None:
            return False
        starts = text.count(self._prefix) if self._prefix else len(text)
        # A float: an integer of many digits would take long itself.
        steps = float(starts) * float(len(text) + 1) ** self._steps.power * self._steps.factor
        return steps <= MOST_STEPS


# --- how many steps `re` may take -----------------------------------------------------------------

_ONE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")  # what matches exactly one character


class _Steps(NamedTuple):
    """From one start, at most `factor` times the length of the text to the `power`."""

    power: int
    factor: float


def _steps_of(items: Any, *, last: bool = True) -> _Steps | None:
    """The most steps from one start; None if they may grow exponentially.

    `last` says that the whole has matched once these items have: then nothing is tried again.
    """
    power, factor = 0, 1.0
    for index, (op, value) in enumerate(items):
        is_last = last and index == len(items) - 1
        parts: Sequence[Any] = ()
        if str(op) == "SUBPATTERN":
            parts = (value[3],)
        elif str(op) == "BRANCH":
            parts = value[1]
            factor *= len(parts)
        elif str(op) in ("ASSERT", "ASSERT_NOT"):
            parts, is_last = (value[1],), False
        elif str(op) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = value
            if most == 1:
                parts = (body,)
                factor *= 2.0
            elif any(str(inner) not in _ONE for inner, _ in body):
                return None
            elif not is_last:
                power += most is _parser.MAXREPEAT
                factor *= 1.0 if most is _parser.MAXREPEAT else most - least + 1.0
        elif str(op) == "ATOMIC_GROUP":
            parts = (value,)
        elif str(op) == "GROUPREF":
            power += 1
        elif str(op) not in (*_ONE, "AT"):
            return None
        inner_steps = [_steps_of(part, last=is_last) for part in parts]
        if None in inner_steps:
            return None
        power += max((steps.power for steps in inner_steps if steps), default=0)
        factor *= max((steps.factor for steps in inner_steps if steps), default=1.0)
    return _Steps(power, factor)


def _is_local(items: Any) -> bool:
    """Whether what matches in a line matches among other lines too."""
    for op, value in items:
        if str(op) == "SUBPATTERN":
            parts: Sequence[Any] = (value[3],)
        elif str(op) == "BRANCH":
            parts = value[1]
        elif str(op) in ("MAX_REPEAT", "MIN_REPEAT"):
            parts = (value[2],)
        elif str(op) in _ONE or (str(op) == "AT" and not str(value).endswith("_STRING")):
            parts = ()
        else:
            return False
        if not all(map(_is_local, parts)):
            return False
    return True


def _prefix_of(tree: Any) -> str:
    """The text with which each match begins; empty if there is none."""
    prefix = ""
    if tree.state.flags & re.IGNORECASE:
        return prefix
    for op, value in tree:
        if str(op) != "LITERAL":
            break
        prefix += chr(value)
    return prefix


def _literal_of(tree: Any, *, lower: bool = False) -> str:
    """The longest text that is in each match, or with `lower`, in its lower case; else empty."""
    runs = _runs(tree, bool(tree.state.flags & re.IGNORECASE), lower)
    return max(runs, key=len, default="")


def _runs(items: Any, ignore_case: bool, lower: bool) -> Iterator[str]:
    run = ""
    for op, value in items:
        if str(op) == "LITERAL" and _is_certain(chr(value), ignore_case, lower):
            run += chr(value).lower() if lower else chr(value)
            continue
        yield run
        run = ""
        if str(op) == "SUBPATTERN":
            yield from _runs(value[3], ignore_case or bool(value[1] & re.IGNORECASE), lower)
        elif str(op).endswith("_REPEAT") and value[0] > 0:
            yield from _runs(value[2], ignore_case, lower)
    yield run


def _is_certain(character: str, ignore_case: bool, lower: bool) -> bool:
    """Whether a match has the very bytes of this character, in lower case with `lower`."""
    if lower:  # i, k and s are also other letters, such as the Kelvin sign, in lower case
        return character.isascii() and not (ignore_case and character in "iksIKS")
    # U+FFFD stands for an undecodable byte; surrogates have no encoding.
    return not (ignore_case or "\ud800" <= character < "\ue000" or character == "\ufffd")


# --- the automaton ------------------------------------------------------------------------------

_CHARACTER, _SPLIT, _SAVE, _AT, _MATCH = range(5)


_Thread = tuple[int, tuple[int, int, int]]
"""Which instruction is next, where the match begins, and where the group begins and ends."""


class _Automaton:
    """A pattern as a program: each instruction is (kind, argument, next), a split has two nexts."""

    def __init__(self, tree: Any, group: int) -> None:
        """Raises TooSlowError for a pattern that is no regular expression in the strict sense."""
        self._state, self._flags = tree.state, tree.state.flags
        self._program: list[tuple[int, Any, Any]] = []
        self._sets: list[re.Pattern[str]] = []
        self._masks: dict[str, int] = {}
        self._group = group
        self._is_word = re.compile(r"\w", self._flags & re.ASCII)
        end = self._emit(_MATCH, None, None)
        self._start = self._compile(tree, end, self._flags)

    def _emit(self, kind: int, argument: Any, following: Any) -> int:
        if len(self._program) >= _LONGEST_PROGRAM:
            raise TooSlowError("it repeats too much")
        self._program.append((kind, argument, following))
        return len(self._program) - 1

    def _compile(self, items: Any, following: int, flags: int) -> int:
        """Adds items, from the last to the first; where they begin."""
        for op, value in reversed(list(items)):
            following = self._compile_one(str(op), op, value, following, flags)
        return following

    def _compile_one(self, name: str, op: Any, value: Any, following: int, flags: int) -> int:
        if name in _ONE:
            part = _parser.SubPattern(self._state, [(op, value)])
            self._sets.append(_compiler.compile(part, flags & ~re.DEBUG))
            return self._emit(_CHARACTER, 1 << (len(self._sets) - 1), following)
        if name == "AT":
            return self._emit(_AT, str(value), following)
        if name == "SUBPATTERN":
            number, added, removed, body = value
            if removed:
                raise TooSlowError("it switches flags off")
            if number != self._group or not number:
                return self._compile(body, following, flags | added)
            end = self._emit(_SAVE, 2, following)
            return self._emit(_SAVE, 1, self._compile(body, end, flags | added))
        if name == "BRANCH":
            starts = [self._compile(branch, following, flags) for branch in value[1]]
            first = starts.pop()
            for start in reversed(starts):
                first = self._emit(_SPLIT, None, (start, first))
            return first
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._compile_repeat(name == "MIN_REPEAT", value, following, flags)
        raise TooSlowError("it looks around, back or ahead")

    def _compile_repeat(self, lazy: bool, value: Any, following: int, flags: int) -> int:
        least, most, body = value

        def split(into: int, beyond: int) -> tuple[int, int]:
            return (beyond, into) if lazy else (into, beyond)

        if most is _parser.MAXREPEAT:
            loop = self._emit(_SPLIT, None, None)
            again = self._compile(body, loop, flags)
            self._program[loop] = (_SPLIT, None, split(again, following))
            beyond = following = loop
        else:
            beyond = following
            for _ in range(most - least):
                following = self._compile(body, following, flags)
                following = self._emit(_SPLIT, None, split(following, beyond))
        for _ in range(least):
            following = self._compile(body, following, flags)
        return following

    def find(self, text: str) -> Iterator[tuple[int, str | None]]:
        self._moves = 0
        at, was_empty = 0, False
        while at <= len(text):
            found = self._search(text, at, was_empty)
            if found is None:
                return
            (start, first, last), end = found
            if not self._group:
                first, last = start, end
            yield start, text[first:last] if first >= 0 and last >= 0 else None
            at, was_empty = end, end == start

    def _search(
        self, text: str, at: int, advances: bool
    ) -> tuple[tuple[int, int, int], int] | None:
        """The first match from `at` on, and its end; with `advances`, none that is empty there."""
        found, begin = None, at
        # In order of preference.
        threads: list[_Thread] = []
        while True:
            seen: set[int] = set()
            now: list[_Thread] = []
            for thread in threads:
                self._follow(thread, text, at, seen, now)
            if found is None:
                self._follow((self._start, (at, -1, -1)), text, at, seen, now)
            self._moves += len(seen) + 1
            if self._moves > MOST_MOVES:
                raise TooSlowError("it takes too long")
            threads = []
            mask = self._mask(text[at]) if at < len(text) else 0
            for pc, saved in now:
                kind, wanted, following = self._program[pc]
                if kind == _MATCH and advances and at == begin:
                    continue
                if kind == _MATCH:
                    found = saved, at
                    break  # the others are less preferred
                if mask & wanted:
                    threads.append((following, saved))
            if at >= len(text) or (found is not None and not threads):
                return found
            at += 1

    def _follow(
        self, thread: _Thread, text: str, at: int, seen: set[int], now: list[_Thread]
    ) -> None:
        """Adds to `now` what a thread reaches without reading a character."""
        waiting = [thread]
        while waiting:
            pc, saved = waiting.pop()
            if pc in seen:
                continue
            seen.add(pc)
            kind, argument, following = self._program[pc]
            if kind == _SPLIT:
                waiting += [(following[1], saved), (following[0], saved)]
            elif kind == _SAVE:
                saved = (saved[0], at, -1) if argument == 1 else (*saved[:2], at)
                waiting.append((following, saved))
            elif kind == _AT:
                if self._holds(argument, text, at):
                    waiting.append((following, saved))
            else:
                now.append((pc, saved))

    def _holds(self, where: str, text: str, at: int) -> bool:
        """Whether an edge is at a place; a line has no line ends."""
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING", "AT_BEGINNING_LINE"):
            return at == 0
        if where in ("AT_END", "AT_END_STRING", "AT_END_LINE"):
            return at == len(text)
        before = at > 0 and self._is_word.match(text[at - 1]) is not None
        after = at < len(text) and self._is_word.match(text[at]) is not None
        return (before != after) == (where == "AT_BOUNDARY")

    def _mask(self, character: str) -> int:
        """Which of the sets match a character, as bits."""
        mask = self._masks.get(character)
        if mask is None:
            if len(self._masks) > 10_000:
                self._masks.clear()
            mask = sum(1 << i for i, one in enumerate(self._sets) if one.match(character))
            self._masks[character] = mask
        return mask
