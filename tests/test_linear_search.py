"""Patterns of metrics: the same matches as with `re`, in bounded time."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from pepr_profiler.recording.linear_search import LinearPattern, TooSlowError, _Automaton

ATOMS = ("a", "b", "1", "[ab]", "[^a]", ".", r"\d", r"\w", r"\b", r"\B", "^", "$", "é", r"\s")
REPEATS = ("*", "+", "?", "*?", "+?", "??", "{1,3}", "{2}", "{0,2}?", "{1,}")


def some_pattern(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth == 0:
        return draw.choice(ATOMS)
    if kind < 0.35:
        return some_pattern(draw, depth - 1) + some_pattern(draw, depth - 1)
    if kind < 0.5:
        return f"(?:{some_pattern(draw, depth - 1)}|{some_pattern(draw, depth - 1)})"
    if kind < 0.9:
        return f"(?:{some_pattern(draw, depth - 1)}){draw.choice(REPEATS)}"
    return some_pattern(draw, depth - 1)


def repeats_nothing(items: Any) -> bool:
    for op, value in items:
        if str(op).endswith("_REPEAT"):
            if value[2].getwidth()[0] == 0 or repeats_nothing(value[2]):
                return True
        elif str(op) in ("SUBPATTERN", "BRANCH"):
            inner = value[1] if str(op) == "BRANCH" else [value[3]]
            if any(map(repeats_nothing, inner)):
                return True
    return False


def test_the_automaton_finds_what_re_finds() -> None:
    """3,000 patterns, nested as nobody would write them, on five texts each.

    How often what may be empty is repeated is a matter of taste.
    """
    draw = random.Random(1)
    for _ in range(3000):
        pattern = some_pattern(draw, draw.randint(1, 4))
        if draw.random() < 0.6:
            pattern = some_pattern(draw, 1) + f"({pattern})" + some_pattern(draw, 1)
        if draw.random() < 0.2:
            pattern = f"(?i){pattern}"
        linear = LinearPattern(pattern)
        if repeats_nothing(linear._tree):
            continue
        automaton = _Automaton(linear._tree, linear.regex.groups)
        for _ in range(5):
            text = "".join(draw.choice("abAB1é ") for _ in range(draw.randint(1, 9)))
            group = linear.regex.groups
            expected = [(m.start(), m[group]) for m in linear.regex.finditer(text)]
            assert list(automaton.find(text)) == expected, (pattern, text)
            assert list(linear.find(text)) == expected, (pattern, text)
            if expected:
                assert linear.literal in text
                assert linear.lower_literal.encode() in text.encode().lower()
                assert linear.may_be_in(f"ab1\n{text}\n é")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(?:a+)+b ([0-9]+)", "a" * 40),
        (r"(?:a+)+b ([0-9]+)", "a" * 60_000),
        (r"(?:a|aa)+$", "a" * 60_000 + "!"),
        (r"(?:.*,)*([0-9]+)!", "1," * 30_000),
        (r"(\w+\s?)+:", "word " * 10_000),
        (r"a*a*a*a*a*b", "a" * 5_000),
        (r"(?:a?){30}a{30}b", "a" * 1000),
        (r"x.*y.*z", "xy" * 30_000),
        (r"(?:a+)+b|c", "ac" * 20_000),
        (r"\d+\.\d+\.\d+e", "1" * 60_000),
        (r"(.+)+$", "a\x00" * 30_000),
        (r"(?i)(?:k+)+!", "kK" * 30_000),
    ],
)
def test_no_pattern_takes_long(pattern: str, text: str) -> None:
    """In CPU time; with `re` alone each of these takes minutes to ages."""
    linear = LinearPattern(pattern)
    assert linear.is_bounded
    begun_s = time.thread_time()
    with suppress(TooSlowError):
        list(linear.find(text))
    assert time.thread_time() - begun_s < 10


def test_the_automaton_lets_other_threads_run() -> None:
    linear = LinearPattern(r"(?:a+)+b")
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.005):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    for _ in range(3):
        with pytest.raises(TooSlowError):
            list(linear.find("a" * 400_000))
    done.set()
    thread.join()
    assert len(ticks) > 3


@pytest.mark.parametrize("pattern", [r"(?:(a+)\1)+b", r"(?:a+(?=b))+c", r"(?:x(?<=x)y+)*z"])
def test_what_cannot_be_bounded_is_known(pattern: str) -> None:
    assert not LinearPattern(pattern).is_bounded


def test_long_lines_are_searched_as_quickly_as_before_where_that_is_safe() -> None:
    linear = LinearPattern(r"epoch (\d+).*acc [0-9.]+")
    text = "x" * 1000 + "epoch 3 loss 0.1 acc 0.5"
    assert linear._is_quick(text) and list(linear.find(text)) == [(1000, "3")]


@pytest.mark.parametrize(
    ("pattern", "literal"),
    [
        ("test acc: ([0-9.]+)", "test acc: "),
        ("([0-9.]+) it/s", " it/s"),
        ("(?:(?:acc)+ [0-9])+", "acc"),
        ("a(?:bcd|efg)h", "a"),
        ("(?:long)?x", "x"),
        ("(?i)acc ([0-9])", ""),
        ("(?i:acc) of ([0-9])", " of "),
        ("[0-9]+", ""),
        ("acc �x", "acc "),
    ],
)
def test_the_text_that_each_match_has_is_known(pattern: str, literal: str) -> None:
    assert LinearPattern(pattern).literal == literal
