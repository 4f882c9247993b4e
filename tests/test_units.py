"""How numbers with units are written and read. Expected texts follow GUM 7.2.6, by hand."""

from __future__ import annotations

import math
import random
import re
from decimal import Decimal

import pytest

from pepr_profiler.errors import UsageError
from pepr_profiler.units import (
    J_PER_KWH,
    J_PER_WH,
    format_amount,
    format_duration,
    format_quantity,
    format_with_u,
    parse_duration,
    parse_overhead,
    parse_range,
)

SCALE = {"n": "1e-9", "µ": "1e-6", "m": "1e-3", "": "1", "k": "1e3", "M": "1e6", "G": "1e9"}
SCALE |= {"T": "1e12", "P": "1e15"}


def read_back(number: str, prefixed: str, unit: str) -> Decimal:
    """The value that a shown number stands for, by decimal arithmetic and not by floats."""
    return Decimal(number) * Decimal(SCALE[prefixed.removesuffix(unit)])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (151_000, "J", "151.0 kJ"),
        (1.94e6, "J", "1.940 MJ"),
        (0.0123, "J", "12.30 mJ"),
        (29.4, "W", "29.40 W"),
        (-151_000, "J", "-151.0 kJ"),
        (38.14, "g", "38.14 g"),
        (1_234, "g", "1.234 kg"),
        (2_500_000, "g", "2.500 t"),
        (512, "B", "512 B"),
        (1_048_576, "B", "1.049 MB"),
        (1_234_000_000, "B", "1.234 GB"),
        (0, "J", "0 J"),
    ],
)
def test_a_quantity_has_a_prefix_and_four_digits(value: float, unit: str, text: str) -> None:
    assert format_quantity(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999.94, "999.9 J"), (999.96, "1.000 kJ"), (0.99996, "1.000 J"), (1000, "1.000 kJ")],
)
def test_rounding_up_moves_on_to_the_next_prefix(value: float, text: str) -> None:
    assert format_quantity(value, "J") == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_known_is_never_a_number(value: float | None) -> None:
    assert format_quantity(value, "J") == "unknown"
    assert format_with_u(value, 1.0, "J") == "unknown"
    assert format_duration(value) == "unknown"


def test_every_shown_quantity_is_within_half_of_its_last_digit() -> None:
    # given values over 24 orders of magnitude
    draw = random.Random(1)
    values = [draw.uniform(1, 10) * 10.0 ** draw.randint(-9, 15) for _ in range(3000)]
    for value in values:
        # when
        number, prefixed = format_quantity(value, "J").split(" ")
        # then the text means the value, to four digits
        error = abs(read_back(number, prefixed, "J") - Decimal(value))
        assert error <= Decimal(value) * Decimal("0.000501")
        assert len(number.replace(".", "")) == 4


@pytest.mark.parametrize(
    ("value", "u", "text"),
    [
        (371_612, 9_300, "371.6 ± 9.3 kJ"),
        (1.94e6, 12_345, "1.940 ± 0.012 MJ"),
        (18_010, 9_960, "18 ± 10 kJ"),  # 9.96 carries to 10: two digits are no decimals
        (371_612, 123_000, "370 ± 120 kJ"),
        (-12.34, 0.5, "-12.34 ± 0.50 J"),
        (0.5, 0.25, "500 ± 250 mJ"),
        (0, 2.3, "0.0 ± 2.3 J"),
        (0, 0, "0 ± 0 J"),
    ],
)
def test_an_uncertainty_has_two_digits_and_the_value_as_many_decimals(
    value: float, u: float, text: str
) -> None:
    assert format_with_u(value, u, "J") == text


@pytest.mark.parametrize(
    ("value", "u", "text"),
    [(12.3, 123, "10 ± 120 J"), (0.4, 2_300, "0.0 ± 2.3 kJ"), (800, 2_300, "0.8 ± 2.3 kJ")],
)
def test_an_uncertainty_above_the_value_picks_the_prefix(value: float, u: float, text: str) -> None:
    assert format_with_u(value, u, "J") == text


@pytest.mark.parametrize(
    ("value", "u", "text"),
    [(999.97, 0.8, "999.97 ± 0.80 J"), (999.97, 8.0, "1.0000 ± 0.0080 kJ")],
)
def test_a_prefix_changes_only_where_the_shown_value_carries(
    value: float, u: float, text: str
) -> None:
    assert format_with_u(value, u, "J") == text


def test_a_tiny_uncertainty_is_rounded_up_and_not_to_nothing() -> None:
    assert format_with_u(371_612, 0.001, "J") == "371.612 ± 0.001 kJ"


@pytest.mark.parametrize("u", [None, math.nan])
def test_an_unknown_uncertainty_is_not_zero(u: float | None) -> None:
    assert format_with_u(371_612, u, "J") == "371.6 ± ? kJ"


def test_a_column_takes_the_decimals_of_its_total() -> None:
    total = (371_612.0, 9_300.0)
    assert format_with_u(18_000, 900, "J", like=total) == "18.0 ± 0.9 kJ"
    # and leaves them where a known number would read as 0
    assert format_with_u(18, 0.9, "J", like=total) == "18.00 ± 0.90 J"
    assert format_with_u(18_000, 900, "J", like=(None, None)) == "18.00 ± 0.90 kJ"


def test_a_shown_interval_is_the_interval() -> None:
    draw = random.Random(2)
    for _ in range(3000):
        # given a value and an uncertainty of 0.01 % to 100 times it
        value = draw.uniform(1, 10) * 10.0 ** draw.randint(-6, 12)
        u = value * 10.0 ** draw.uniform(-4, 2)
        # when
        shown, plus_minus, shown_u, prefixed = format_with_u(value, u, "J").split(" ")
        # then both are what they were, to half of the second digit of u
        assert plus_minus == "±"
        half_digit = Decimal(u) / 19  # u is shown as 10 to 99, its half digit 1/20 at worst
        assert abs(read_back(shown_u, prefixed, "J") - Decimal(u)) <= half_digit
        assert abs(read_back(shown, prefixed, "J") - Decimal(value)) <= half_digit


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.0004, "400 µs"),
        (0.42, "420 ms"),
        (0.9996, "1.00 s"),
        (3.42, "3.42 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (847.3, "14 min 07 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7_500, "2 h 05 min"),
        (86_399, "1 d 00 h"),
        (273_600, "3 d 04 h"),
        (0, "0 s"),
        (-3.42, "-3.42 s"),
    ],
)
def test_a_duration_reads_as_a_person_says_it(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


@pytest.mark.parametrize(
    ("text", "duration_ns"),
    [
        ("10ms", 10_000_000),
        ("2s", 2_000_000_000),
        ("0.5", 500_000_000),
        (" 250 us ", 250_000),
        ("250µs", 250_000),
        ("1.5min", 90_000_000_000),
        ("5m", 300_000_000_000),
        ("1e-3", 1_000_000),
        ("1ns", 1),
    ],
)
def test_a_duration_option_is_read_in_whole_nanoseconds(text: str, duration_ns: int) -> None:
    assert parse_duration(text) == duration_ns


@pytest.mark.parametrize("text", ["", "ms", "10 parsecs", "0", "-1s", "nan", "1e999s", "0.1ns"])
def test_a_bad_duration_says_what_to_write(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration") as caught:
        parse_duration(text)
    assert repr(text) in caught.value.what
    assert caught.value.why
    assert "10ms" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "share"), [("0.5%", 0.005), ("0.005", 0.005), (" 100% ", 1.0), ("1", 1.0)]
)
def test_an_overhead_is_a_share_of_a_core(text: str, share: float) -> None:
    assert parse_overhead(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "0", "-1%", "101%", "2", "nan", "half"])
def test_a_bad_overhead_says_what_to_write(text: str) -> None:
    with pytest.raises(UsageError, match="is not possible") as caught:
        parse_overhead(text)
    assert "--overhead 0.5%" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("1:2", (1.0, 2.0)),
        ("151k:1.94M", (151_000.0, 1_940_000.0)),
        ("151kJ : 1.94MJ", (151_000.0, 1_940_000.0)),
        ("5m:0.1", (0.005, 0.1)),
        ("-1.5:+2e3", (-1.5, 2_000.0)),
        ("1:2GB", (1.0, 2e9)),
    ],
)
def test_bounds_take_prefixes_and_units(text: str, bounds: tuple[float, float]) -> None:
    assert parse_range(text) == pytest.approx(bounds, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("3", "two numbers"),
        ("1:2:3", "two numbers"),
        ("3:x", "'x' is not a number"),
        (":3", "'' is not a number"),
        ("nan:1", "'nan' is not a number"),
        ("1:2kWh", "'2kWh' is not a number"),  # its conversion would be silent
        ("3:1", "MIN must be below MAX"),
        ("2:2", "MIN must be below MAX"),
    ],
)
def test_bad_bounds_say_what_to_write(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=re.escape(why)) as caught:
        parse_range(text)
    assert "--range 151k:1.94M" in caught.value.fix


def test_a_kilowatt_hour_is_a_kilowatt_for_an_hour() -> None:
    assert J_PER_KWH == 1000 * 3600 == 1000 * J_PER_WH


def test_the_largest_number_has_a_layout_too() -> None:
    assert format_with_u(1.5e308, 1e307, "J").endswith(" PJ")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (4000.4, "", "4000"),
        (9999.9, "", "10.00 k"),
        (3.3e-5, "", "0.000033"),
        (0.0, "", "0"),
        (1.5, "", "1.5"),
        (4000.4, "kWh", "4000 kWh"),
        (123456.0, "EUR", "123456 EUR"),
        (3.3e-5, "EUR", "0.00003300 EUR"),
        (0.5, "EUR", "0.5000 EUR"),
        (1e300, "EUR", "1.000e+300 EUR"),
        (151000.0, "J", "151.0 kJ"),
    ],
)
def test_an_amount_is_a_plain_number_where_it_can_be(value: float, unit: str, text: str) -> None:
    assert format_amount(value, unit) == text


@pytest.mark.parametrize(
    ("value", "u", "unit", "text"),
    [
        (0.8971, 0.00467, "", "0.8971 ± 0.0047"),
        (12345.6, 78.9, "kWh", "12346 ± 79 kWh"),
        (2.0, 0.0, "", "2.000 ± 0.000"),
        (0.0, 0.0, "EUR", "0 ± 0 EUR"),
        (1.5, 7.04, "", "1.5 ± 7.0"),
        (3.3e-5, 1e-6, "", "0.0000330 ± 0.0000010"),
        (2.0, 1e-9, "", "2.00000 ± 0.00001"),
        (1e300, 1e299, "", "1.000e+300 ± 1.0e+299"),
        (1010.0, 50.0, "J", "1.010 ± 0.050 kJ"),
    ],
)
def test_only_units_that_are_known_take_a_prefix(
    value: float, u: float, unit: str, text: str
) -> None:
    assert format_amount(value, unit, u) == text
