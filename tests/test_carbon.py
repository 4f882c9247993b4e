"""Grid intensity and carbon: the table, its look-up, and the arithmetic."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pepr_profiler.energy import carbon
from pepr_profiler.energy.carbon import GridIntensity, estimate, lookup
from pepr_profiler.errors import UsageError

TABLE = Path(carbon.__file__).parents[1] / "data" / "grid_intensity.csv"

# gCO2e/kWh of Ember's yearly data as noted by hand from Our World in Data: 2023, and 2022 below.
NOTED_2023 = {
    "US": 369.5, "Canada": 170.0, "Mexico": 507.2, "Brazil": 98.3, "Chile": 291.1, "UK": 237.6,
    "France": 56.0, "Germany": 381.0, "Netherlands": 267.6, "Belgium": 138.1, "Spain": 174.1,
    "Italy": 330.7, "Portugal": 165.6, "Poland": 661.9, "Czechia": 449.7, "Austria": 110.8,
    "Switzerland": 34.8, "Sweden": 40.7, "Norway": 30.1, "Finland": 79.2, "Denmark": 151.7,
    "Ireland": 290.8, "China": 582.3, "Taiwan": 642.4, "Japan": 485.4, "South Korea": 430.6,
    "India": 713.4, "Singapore": 470.8, "Australia": 548.7, "New Zealand": 112.8,
    "South Africa": 707.7,
}  # fmt: skip
NOTED_2022 = {"Iceland": 27.7, "UAE": 561.1, "Indonesia": 675.9}


def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_200_countries_each_with_plausible_value_year_and_source() -> None:
    table = rows()
    assert len(table) >= 200
    for row in table:
        assert row["iso3"].isalpha() and len(row["iso3"]) == 3, row
        assert row["iso2"].isalpha() and len(row["iso2"]) == 2, row
        assert row["name"] and row["source"], row
        assert 2018 <= int(row["year"]) <= 2025, row
        # Ember's life-cycle factors run from about 10 (wind, hydro) to 1400 (old gas) g/kWh.
        assert 10 < float(row["g_per_kwh"]) < 1400, row
    for column in ("iso3", "iso2", "name"):
        assert len({row[column] for row in table}) == len(table), column


@pytest.mark.parametrize(
    ("region", "noted", "noted_year"),
    [(region, g, 2023) for region, g in NOTED_2023.items()]
    + [(region, g, 2022) for region, g in NOTED_2022.items()],
)
def test_values_agree_with_independent_notes(region: str, noted: float, noted_year: int) -> None:
    found = lookup(region)
    assert found.year is not None and found.year >= noted_year
    if found.year == noted_year:
        assert found.g_per_kwh == pytest.approx(noted, abs=0.1)
    else:
        # A grid moves from year to year: by a third at most in these (Portugal, wet and windy
        # 2024). A wrong row, column or unit is off by more.
        assert found.g_per_kwh == pytest.approx(noted, rel=0.34)


def test_every_code_and_name_of_the_table_finds_its_own_row() -> None:
    for row in rows():
        for column in ("iso2", "iso3", "name"):
            assert lookup(row[column]).iso3 == row["iso3"], row
            assert lookup(row[column].lower()).iso3 == row["iso3"], row


@pytest.mark.parametrize(
    ("spelling", "iso3"),
    [
        ("dk", "DNK"),
        ("NA", "NAM"),  # what a CSV reader that knows "NA" loses
        (" uk ", "GBR"),
        ("U.S.A.", "USA"),
        ("united states of america", "USA"),
        ("South Korea", "KOR"),
        ("republic of korea", "KOR"),
        ("Czech Republic", "CZE"),
        ("Türkiye", "TUR"),
        ("Côte d’Ivoire", "CIV"),
        ("The Netherlands", "NLD"),
        ("Bosnia & Herzegovina", "BIH"),
        ("St. Lucia", "LCA"),
        ("DRC", "COD"),
        ("congo", "COG"),
    ],
)
def test_common_spellings_find_the_country(spelling: str, iso3: str) -> None:
    assert lookup(spelling).iso3 == iso3


@pytest.mark.parametrize("region", ["Germny", "us-east-1", "XX", "", "California"])
def test_an_unknown_region_is_refused_with_the_way_out(region: str) -> None:
    with pytest.raises(UsageError) as refused:
        lookup(region)
    assert repr(region) in refused.value.what
    assert "--carbon-intensity" in refused.value.fix


def test_a_misspelt_country_is_recognised_in_the_error() -> None:
    with pytest.raises(UsageError, match="Germany \\(DEU\\)"):
        lookup("Germny")


def test_left_out_entries_are_unknown_rather_than_wrong() -> None:
    for region in ("Central African Republic", "Western Sahara", "Falkland Islands"):
        with pytest.raises(UsageError):
            lookup(region)


def test_carbon_is_energy_times_pue_times_intensity() -> None:
    # given 1.944 MJ = 0.54 kWh in Denmark, in a data centre of PUE 1.25
    denmark = lookup("DK")
    # when
    result = estimate(1_944_000.0, intensity=denmark, pue=1.25)
    # then 0.675 kWh from the grid
    assert result == {
        "g_co2e": pytest.approx(0.675 * denmark.g_per_kwh, rel=1e-12),
        "intensity_g_per_kwh": denmark.g_per_kwh,
        "pue": 1.25,
        "source": "Ember via Our World in Data, Denmark",
        "year": denmark.year,
    }


def test_a_given_intensity_says_so_and_has_no_year() -> None:
    result = estimate(3.6e6, intensity=GridIntensity.given(56.0), pue=1.0)
    assert result == {
        "g_co2e": pytest.approx(56.0, rel=1e-12),
        "intensity_g_per_kwh": 56.0,
        "pue": 1.0,
        "source": "given",
        "year": None,
    }


@pytest.mark.parametrize("g_per_kwh", [-1.0, math.nan, math.inf])
def test_an_impossible_intensity_is_refused(g_per_kwh: float) -> None:
    with pytest.raises(UsageError, match="not possible"):
        GridIntensity.given(g_per_kwh)


@pytest.mark.parametrize("pue", [0.99, 0.0, -1.2, math.nan, math.inf])
def test_an_impossible_pue_is_refused(pue: float) -> None:
    with pytest.raises(UsageError, match="PUE"):
        estimate(1.0, intensity=GridIntensity.given(100.0), pue=pue)


def test_importing_carbon_is_light() -> None:
    # given a fresh interpreter, when carbon is imported, then nothing heavy came along
    code = (
        "import sys; from pepr_profiler.energy import carbon; "
        "assert not {'numpy', 'rich', 'click'} & set(sys.modules); "
        "assert carbon._table.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TABLE.parents[2])
