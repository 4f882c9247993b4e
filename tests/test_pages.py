"""Pages: complete in themselves, safe with any name, and in a real browser what they promise.

The browser tests need Chromium and its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from cli import Cli, python
from studies import invoke

from benchmarks.report import make_run
from pepr_profiler.commands.report import report
from pepr_profiler.errors import UsageError
from pepr_profiler.report.export import run_rows
from pepr_profiler.report.html import embedded
from pepr_profiler.report.run_page import run_page
from pepr_profiler.report.study_page import study_page
from pepr_profiler.study import pepr
from pepr_profiler.study.analysis import Analysis
from pepr_profiler.study.study import Study
from pepr_profiler.summary.summarise import with_timeline
from pepr_profiler.trace.run_json import read_run, write_json
from pepr_profiler.units import format_duration

HOSTILE = "<script>alert(1)</script> \"quoted\" 'single' & ]]> --> </title>\n🦜"
LONG = "n" * 10_000


class _Elements(HTMLParser):
    """Tags with their attributes, and the text of each element's own kind."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "twenty-minutes"
    make_run(directory, hours=1 / 3, period_s=0.05)
    return directory


@pytest.fixture(scope="module")
def page_of_a_run(run_directory: Path) -> str:
    return run_page(*with_timeline(run_directory))


COLUMNS: dict[str, list[Any]] = {
    "model": ["logistic", "mlp", HOSTILE, "resmlp", "cnn", LONG, "twin", "twin too", "free"],
    "accuracy": [0.93, 0.962, 0.97, 0.981, 0.989, 0.95, 0.90, 0.90, 0.5],
    "energy_j": [12.0, 14.5, 31.0, 44.0, 160.0, 90.0, 20.0, 20.0, 11.0],
    "time_s": [3.0, 4.0, 7.0, 6.0, 30.0, 12.0, 5.0, 6.0, 2.5],
}


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.from_table(
        COLUMNS, performance="accuracy", resources=("energy_j", "time_s"), name="model"
    )


@pytest.fixture(scope="module")
def page_of_a_study(study: Study) -> str:
    return study_page(study)


def test_pages_load_nothing_and_let_only_their_own_scripts_run(
    page_of_a_run: str, page_of_a_study: str
) -> None:
    for page in (page_of_a_run, page_of_a_study):
        elements = _Elements(page)
        assert (
            not elements.every("link") and not elements.every("img") and not elements.every("base")
        )
        for _, attributes in elements.tags:
            for key in ("src", "href", "xlink:href"):
                assert (attributes.get(key) or "#").startswith("#"), attributes
            assert not [key for key in attributes if key.startswith("on")]
        policy = next(m["content"] for m in elements.every("meta") if m.get("http-equiv"))
        assert policy is not None
        assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
        assert not re.findall(r"url\((?!#)", page) and "@import" not in page


def test_pages_are_marked_up_for_a_screen_reader(page_of_a_run: str, page_of_a_study: str) -> None:
    for page in (page_of_a_run, page_of_a_study):
        elements = _Elements(page)
        ids = [a["id"] for _, a in elements.tags if "id" in a]
        assert len(ids) == len(set(ids))
        assert elements.every("html")[0]["lang"] == "en"
        for name in ("header", "main", "footer", "h1"):
            assert len(elements.every(name)) == 1
        levels = [int(tag[1]) for tag, _ in elements.tags if re.fullmatch("h[1-6]", tag)]
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        for svg in elements.every("svg"):
            assert svg["role"] == "img"
            assert set(str(svg["aria-labelledby"]).split()) <= set(ids)
        for section in elements.every("section"):
            assert section["aria-labelledby"] in ids
        assert all(th.get("scope") for th in elements.every("th"))
        assert all(i.get("aria-label") for i in elements.every("input"))


def test_a_page_of_a_run_says_what_the_summary_says(
    run_directory: Path, page_of_a_run: str
) -> None:
    summary, _ = with_timeline(run_directory)
    for c in summary["energy"]["components"]:
        assert re.search(rf">[^<]*{re.escape(c['label'].split()[0])}", page_of_a_run)
    from pepr_profiler.units import format_with_u

    total = format_with_u(summary["energy"]["total_j"], summary["energy"]["u_j"], "J")
    assert page_of_a_run.count(total) >= 3
    assert "lowest and the highest second" in page_of_a_run
    for phase in ("train", "eval"):
        assert f">{phase}</th>" in page_of_a_run
    assert "Budget of uncertainty" in page_of_a_run and ">gain</th>" in page_of_a_run


def test_a_page_of_whole_devices_says_so_and_adds_up(tmp_path: Path) -> None:
    # given a run that is counted by whole devices, of which it used a part
    cli = Cli(tmp_path)
    result, recorded = cli.measure(
        "--attribution", "device", "--", *python("import time; time.sleep(0.3)")
    )
    assert result.status == 0, result.stderr
    summary, timeline = with_timeline(cli.store / "runs" / recorded["run_id"])
    job_j = sum(c["job_j"] for c in summary["energy"]["components"] if c["in_total"])
    assert job_j < 0.95 * summary["energy"]["total_j"]
    # then its figures end at that total
    assert timeline.energy_j[-1] == pytest.approx(summary["energy"]["total_j"], rel=1e-12)
    drawn_j = sum(c.job_w @ np.diff(timeline.edges_s) for c in timeline.components if c.in_total)
    assert drawn_j == pytest.approx(summary["energy"]["total_j"], rel=1e-6)
    # and its table has rows that add up to it, and nothing is called the job's
    added = [r for r in run_rows(summary) if r["part"] == "component" and r["in_total"]]
    assert sum(r["share"] for r in added) == pytest.approx(1)
    page = run_page(summary, timeline)
    assert "Energy of the devices" in page and "--attribution device" in page
    assert "This job's" not in page and "Energy of this job" not in page


def test_hostile_texts_of_a_run_stay_text(run_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "hostile"
    shutil.copytree(run_directory, directory)
    run = read_run(directory)
    run |= {
        "name": HOSTILE,
        "experiment": HOSTILE,
        "host": HOSTILE,
        "command": ["sh", "-c", HOSTILE, LONG],
    }
    run["missing"] = [{"what": HOSTILE, "why": LONG, "fix": HOSTILE}]
    run["recording"]["warnings"] = [{"code": "x", "text": HOSTILE, "hint": HOSTILE}]
    run["recording"]["options"]["performance"] = HOSTILE
    write_json(directory / "run.json", run)
    (directory / "events-bench-2.jsonl").write_text(
        "\n".join(
            json.dumps(event)
            for event in (
                {"event": "begin", "t_ns": 10**15, "id": 1, "parent": None, "name": HOSTILE},
                {"event": "end", "t_ns": 10**15 + 10**11, "id": 1},
                {"event": "begin", "t_ns": 10**15, "id": 2, "parent": None, "name": LONG},
                {"event": "end", "t_ns": 10**15 + 10**11, "id": 2},
                {"event": "metrics", "t_ns": 10**15, "metrics": {HOSTILE: 0.5, LONG: 1.0}},
            )
        )
        + "\n"
    )

    page = run_page(*with_timeline(directory))

    elements = _Elements(page)
    assert len(elements.every("script")) == 1
    assert "alert(1)" in page and "<script>alert" not in page
    assert len(elements.every("title")) == 1 + len(elements.every("svg"))
    assert LONG[:2000] not in page
    assert len(page.encode()) < 1_500_000


def test_a_page_shows_the_metric_that_was_asked_for(run_directory: Path, tmp_path: Path) -> None:
    # given a run that logged an accuracy, an error and a loss on its way
    directory = tmp_path / "logged"
    shutil.copytree(run_directory, directory)
    begin_ns, end_ns = read_run(directory)["recording"]["window_ns"]
    with (directory / "events-bench-2.jsonl").open("w") as file:
        for epoch, error in enumerate((0.5, 0.04, 0.02, 0.01), start=1):
            metrics = {"epoch": epoch, "accuracy": 0.5, "error": error, "loss": 5.0 / epoch}
            t_ns = begin_ns + epoch * (end_ns - begin_ns) // 4
            line = {"event": "metrics", "t_ns": t_ns, "metrics": metrics}
            file.write(json.dumps(line) + "\n")

    def page(*options: str) -> str:
        out = tmp_path / "page.html"
        done = invoke(report, directory, "-o", out, *options)
        assert done.exit_code == 0, done.output
        return out.read_text()

    # then its page has the curve of it, turned round as was declared: 0.96 / 0.99 at the best
    turned = page("--metric", "error", "--transform", "one-minus")
    assert "at epoch 2: to stop there keeps 97.0% of the final 1 - error" in turned
    assert "o PePR along the run, as it needs values from 0 to 1" in page("--metric", "loss")
    refused = invoke(report, directory, "-o", "p.html", "--metric", "luck")
    assert isinstance(refused.exception, UsageError) and "luck" in str(refused.exception)


def test_an_unfinished_run_without_any_sensor_still_has_a_page(tmp_path: Path) -> None:
    directory = tmp_path / "bare"
    make_run(directory, hours=1 / 3600, period_s=0.05)
    run = read_run(directory)
    run["complete"], run["recording"]["window_ns"][1] = False, None
    write_json(directory / "run.json", run)
    for lane in directory.glob("*.arrows"):
        lane.unlink()
    page = run_page(*with_timeline(directory))
    assert "incomplete" in page and "no device could be measured" in page
    assert "<dd>unknown</dd>" in page and "<dd>0 J" not in page  # unknown is never 0


def test_data_for_the_script_cannot_end_its_element() -> None:
    value = {"a": ["</script><!--<script>", "]]>&amp;\u2028\u2029", HOSTILE]}
    text = str(embedded(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def recorded(name: str, seed: int, total_j: float, accuracy: float) -> dict[str, Any]:
    """A whole summary, as far as a study's page reads it: three epochs on the way."""
    energy_j = [total_j / 3, total_j / 2, total_j]
    return {
        "schema": 1,
        "run_id": f"r-{name[:10]}-{seed}",
        "name": name,
        "experiment": name,
        "host": name,
        "complete": True,
        "exit_code": 0,
        "energy": {"total_j": total_j, "u_j": total_j / 10, "provenance": "measured"},
        "time_s": 60.0 + seed,
        "memory": {"peak_rss_bytes": 10**9, "gpu_peak_bytes": None},
        "metrics": {"accuracy": accuracy, "parameters": 1000 * seed, name: 0.5 + seed / 100},
        "performance": {"metric": "accuracy", "value": accuracy},
        "progress": {
            "t_s": [20.0, 40.0, 60.0],
            "energy_j": energy_j,
            "u_j": [x / 10 for x in energy_j],
            "metrics": {"accuracy": [0.4, 0.5, accuracy], name: [0.1, 0.2, 0.5]},
            "left_out": 0,
        },
    }


def test_names_of_control_characters_break_no_figure_of_a_study() -> None:
    # given runs with curves, whose names, hosts, experiments and metric move cursors, break lines
    # and turn the direction of writing, as no XML may hold them
    names = ["two\nlines\x1b[2J", "bell\x07\nand\x00nul", "\u202eback", HOSTILE, LONG]
    runs = [recorded(name, seed, 10.0 * seed, 0.6) for seed, name in enumerate(names, start=1)]
    for metric in (None, names[0]):
        if metric is not None:
            for run in runs:
                run["metrics"][metric] = 0.5 + run["energy"]["total_j"] / 1000
                run["progress"]["metrics"][metric] = [0.1, 0.2, 0.5]
        # when
        page = study_page(Study.from_runs(runs, group="none", metric=metric, resources=["time"]))
        # then
        assert not [c for c in page if ord(c) < 32 and c not in "\n\t"]
        assert "\u202e" not in page and "<script>alert" not in page and LONG[:200] not in page
        assert page.count("during training</h3>") == 1


def test_a_page_says_where_training_could_have_been_stopped_over_repeats() -> None:
    # given two models that learn nothing after half of their energy, but for noise
    runs = []
    for seed in range(1, 7):
        run = recorded("early" if seed < 4 else "late", seed, 10.0 * (1 + seed // 4), 0.9)
        total_j = run["energy"]["total_j"]
        run["progress"] |= {
            "t_s": [float(t) for t in range(1, 11)],
            "energy_j": [total_j * t / 10 for t in range(1, 11)],
            "u_j": [0.0] * 10,
            "metrics": {"accuracy": [min(0.9, 0.18 * t) + seed / 1e4 for t in range(1, 11)]},
        }
        runs.append(run)
    # when
    page = study_page(Study.from_runs(runs, group="none", resources=["energy"]))
    # then
    notes = page[page.index("Where training could have been stopped") :]
    for name in ("early", "late"):
        (note,) = re.findall(rf"<li>{name} \(mean of 3 runs\): (.*?)</li>", notes)
        assert "to stop there keeps 100.0% of the final accuracy for 50% of the energy" in note


def test_a_page_of_more_runs_than_it_can_show_has_their_means() -> None:
    # given 1,200 repeats of three models
    models = [f"m{i}" for i in range(3)]
    runs = [
        recorded(m, seed, 10.0 + i + seed, 0.5) for seed in range(400) for i, m in enumerate(models)
    ]
    study = Study.from_runs(runs, group="none")
    by_id = {run["run_id"]: run for run in runs}
    asked: list[str] = []
    # when
    page = study_page(study, load=lambda run_id: by_id[asked.append(run_id) or run_id])
    few = study_page(Study.from_runs(runs[:30], group="none"))
    # then it looks at one run of each, which has the parameters, and shows no single runs
    assert sorted(asked) == ["r-m0-0", "r-m1-0", "r-m2-0"]
    assert "3 models, 1,200 runs" in page and "during training" not in page
    assert "single runs" in few and "single runs" not in page
    assert page.count("<circle") + page.count("<use") < 200


def test_a_study_too_large_to_read_shows_its_best_rows_and_says_where_all_are() -> None:
    n = 1500
    columns = {
        "m": [f"m{i}" for i in range(n)],
        "p": np.linspace(0, 1, n),
        "r": np.arange(1.0, n + 1),
    }
    study = Study.from_table(columns, performance="p", resources=("r",), name="m")
    page = study_page(study, all_rows="all.csv")
    named = re.findall(r'data-key="name">(m\d+)', page)
    order = study.rank().order
    assert named == [f"m{i}" for i in order[: len(named)]] and 100 <= len(named) < n
    note = f"the best {len(named)}; {n - len(named):,} more are not shown: all.csv has all"
    assert note in " ".join(page.split())
    # and nothing can be unticked where the script does not have all rows
    elements = _Elements(page)
    assert not elements.every("input") and 'id="data"' not in page


def test_outliers_are_named_with_the_ranking_without_them() -> None:
    rng = np.random.default_rng(5)
    time_s = np.geomspace(10, 1000, 40)
    energy_j = 300 * time_s * rng.uniform(0.9, 1.1, 40)
    energy_j[[3, 17]] *= [12, 80]
    study = Study.from_table(
        {"m": [f"model{i}" for i in range(40)], "p": rng.uniform(0.5, 0.9, 40), "e": energy_j,
         "t": time_s},
        performance="p", resources=("e",), name="m", time="t",
    )  # fmt: skip
    page = study_page(study)
    assert page.count('class="tag failed">outlier') == 2
    warned = re.search(r'<ul class="notes alarm">(.*?)</ul>', page, re.DOTALL)
    assert (
        warned and "model3" in warned[1] and "model17" in warned[1] and "model4 " not in warned[1]
    )


def test_a_page_has_both_rankings_of_two_populations_and_marks_their_rows() -> None:
    rng = np.random.default_rng(5)
    time_s = np.geomspace(10, 1000, 40)
    energy_j = np.where(np.arange(40) % 2, 300, 3000) * time_s * rng.uniform(0.95, 1.05, 40)
    study = Study.from_table(
        {"m": [f"model{i}" for i in range(40)], "p": rng.uniform(0.5, 0.9, 40), "e": energy_j,
         "time_s": time_s},
        performance="p", resources=("e",), name="m", time="time_s", unit_of={"e": "J"},
    )  # fmt: skip
    ranking = study.rank()
    assert len(ranking.either) == 2
    page = " ".join(study_page(study).split())
    assert page.count('class="tag">population at ') == 40
    assert "the best of 40" not in page
    for part in ranking.either:
        kind = ranking.population[part.whole_rows[0]]
        assert f"Of the {kind}: By PePR the best of 20 is {part.names[part.order[0]]}" in page
        assert f"PePR, 20 rows, {kind}</h3>" in page


def test_a_page_of_repeats_in_a_table_counts_their_rows() -> None:
    study = Study.from_table(
        {"m": ["a", "a", "a", "b", "b"], "p": [0.5, 0.6, 0.55, 0.7, 0.71], "e": [1, 2, 1.5, 9, 8]},
        performance="p", resources=("e",), name="m", repeats=True,
    )  # fmt: skip
    assert "2 models, 5 rows" in study_page(study)


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window. Its driver gets its path, so that nothing is downloaded."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip(
            "no Chromium with its driver (Debian: apt-get install chromium chromium-driver)"
        )
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--disable-gpu",
        "--window-size=1200,1000",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(flag)
    if os.geteuid() == 0:  # its sandbox does not run as root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


def opened(browser: Any, folder: Path, page: str, name: str = "page") -> None:
    path = folder / f"{name}.html"
    path.write_text(page, encoding="utf-8")
    browser.get(path.as_uri())


def test_pages_open_without_an_error_or_a_request(
    browser: Any, folder: Path, page_of_a_run: str, page_of_a_study: str
) -> None:
    for name, page in (("run", page_of_a_run), ("study", page_of_a_study)):
        browser.get_log("performance")
        opened(browser, folder, page, name)
        assert browser.get_log("browser") == []
        events = [
            json.loads(entry["message"])["message"] for entry in browser.get_log("performance")
        ]
        asked = {
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        }
        assert asked == {(folder / f"{name}.html").as_uri()}
        assert "<script>alert" not in (browser.title or "")


def shown(browser: Any) -> list[tuple[str, list[str], list[str], str]]:
    """The table as it stands: rank, the scores, the stars, and the name, of each row."""
    rows: list[tuple[str, list[str], list[str], str]] = browser.execute_script(
        """return [...document.querySelectorAll("table.ranking tbody tr")].map(row => [
            row.querySelector('[data-key="rank"]').firstChild.textContent.trim(),
            [...row.querySelectorAll(".score")].map(e => e.textContent),
            [...row.querySelectorAll("td .star")].map(e => e.textContent),
            row.dataset.row])"""
    )
    return rows


def toggle(browser: Any, row: int) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    box = browser.find_element(By.CSS_SELECTOR, f'tr[data-row="{row}"] input')
    box.send_keys(Keys.SPACE)


@pytest.mark.parametrize("without", [(), (4,), (8,), (4, 5, 8), (0, 1, 2, 3, 4, 5, 8)])
def test_unticking_ranks_exactly_as_python_ranks_the_rest(
    browser: Any, folder: Path, page_of_a_study: str, without: tuple[int, ...]
) -> None:
    """Twins of equal energy, the cheapest, the most expensive; at last twins that span nothing."""
    opened(browser, folder, page_of_a_study)

    for row in without:
        toggle(browser, row)

    table = {int(row): (rank, scores, stars) for rank, scores, stars, row in shown(browser)}
    rest = [i for i in range(9) if i not in without]
    assert all(table[i] == ("–", ["–", "–"], ["", ""]) for i in without)
    p = np.array(COLUMNS["accuracy"])[rest]
    for k, resource in enumerate(("energy_j", "time_s")):
        r = np.array(COLUMNS[resource])[rest]
        if r.min() == r.max():
            assert all(table[i][1][k] == "–" for i in rest)
            continue
        scores = pepr.score(p, r)
        front = pepr.pareto_front(p, r)
        for place, i in enumerate(rest):
            assert table[i][1][k] == f"{scores.pepr[place]:.3f}"
            assert table[i][2][k] == ("★" if front[place] else "")
        if k == 0:
            ranked = [rest[j] for j in pepr.rank(scores)]
            assert [int(table[i][0]) for i in ranked] == list(range(1, len(rest) + 1))
            in_order = [int(row) for rank, _, _, row in shown(browser) if rank != "–"]
            assert in_order == ranked
    hidden = browser.execute_script(
        'return [...document.querySelectorAll(".pm")].every(e => e.hidden)'
    )
    assert hidden or not without


def test_durations_of_the_page_are_written_as_everywhere(browser: Any, folder: Path) -> None:
    times_s = [90.0, 3599.7, 7198.0, 86_399.0, 90 * 3600.0]
    runs = [
        {"run_id": f"r{i}", "name": f"r{i}", "complete": True, "exit_code": 0, "time_s": time_s,
         "energy": {"total_j": None}, "memory": {}, "metrics": {"acc": 0.5 + i / 100},
         "performance": {"metric": "acc", "value": 0.5 + i / 100}}
        for i, time_s in enumerate(times_s)
    ]  # fmt: skip
    opened(browser, folder, study_page(Study.from_runs(runs, resources=("time",))))
    said = "return document.querySelector('.said').textContent"
    for most_expensive in reversed(range(2, len(times_s))):
        toggle(browser, most_expensive)
        shortest, longest = (
            format_duration(times_s[0]),
            format_duration(times_s[most_expensive - 1]),
        )
        assert f"normalisation range {shortest} … {longest};" in browser.execute_script(said)


def test_the_figure_follows_what_is_ticked(
    browser: Any, folder: Path, page_of_a_study: str
) -> None:
    """The line of equal PePR 0.6 goes through (r, P) with P / (1 + R) = 0.6, in the new range."""
    opened(browser, folder, page_of_a_study)
    look = """
        const data = JSON.parse(document.getElementById("data").textContent);
        const chart = data.groups[0].charts[0];
        const at = chart.places.wide, id = chart.id + "-wide-";
        const d = document.getElementById(id + "iso-0.6").querySelector("path").getAttribute("d");
        const line = d.slice(1).split("L").map(s => s.split(" ").map(Number));
        const gone = [...document.querySelectorAll(`[id^="${id}point-"].gone`)].map(e => e.id);
        const back = (v, [slope, offset]) => (v - offset) / slope;
        return [line.map(([x, y]) => [10 ** back(x, at.x), back(y, at.y)]), gone];"""
    toggle(browser, 4)
    line, gone = browser.execute_script(look)
    assert [name.rpartition("-")[2] for name in gone] == ["4"]
    low, high = 11.0, 90.0
    for x, y in line:
        r = min(1.0, max(0.0, (x - low) / (high - low)))
        assert y / (1 + r) == pytest.approx(0.6, abs=2e-3)
    toggle(browser, 4)
    assert browser.execute_script(look)[1] == []


def test_the_median_follows_what_is_ticked(browser: Any, folder: Path) -> None:
    kinds = [("CNN", "other")[i % 2] for i in range(9)]
    study = Study.from_table(COLUMNS, performance="accuracy", resources=("energy_j",), name="model")
    analysis = Analysis.of_table(
        study, models=COLUMNS["model"], labels=COLUMNS["model"], groups={None: range(9)},
        classes=("kind", kinds),
    )  # fmt: skip
    opened(browser, folder, study_page(study, analysis=analysis))
    look = """
        const chart = JSON.parse(document.getElementById("data").textContent).groups[0].charts[0];
        const d = document.querySelector("#g0-cost-0-wide-median path").getAttribute("d");
        const [slope, offset] = chart.places.wide.x;
        return 10 ** ((Number(/^M([-\\d.]+)/.exec(d)[1]) - offset) / slope);"""
    energy = np.array(COLUMNS["energy_j"])
    assert browser.execute_script(look) == pytest.approx(np.median(energy), rel=5e-3)
    for row in (4, 5):
        toggle(browser, row)
    rest = np.delete(energy, [4, 5])
    assert browser.execute_script(look) == pytest.approx(np.median(rest), rel=5e-3)
    toggle(browser, 0)
    rest = np.delete(energy, [0, 4, 5])
    assert browser.execute_script(look) == pytest.approx(np.median(rest), rel=5e-3)


def test_columns_sort_by_the_keyboard(browser: Any, folder: Path, page_of_a_study: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, folder, page_of_a_study)
    button = browser.find_element(By.CSS_SELECTOR, 'button[data-sort="r0"]')
    energy = COLUMNS["energy_j"]
    for sign, said in ((1, "ascending"), (-1, "descending")):
        button.send_keys(Keys.ENTER)
        order = [int(row) for _, _, _, row in shown(browser)]
        assert order == sorted(range(9), key=lambda i: (sign * energy[i], i))
        sorted_by = browser.find_elements(By.CSS_SELECTOR, "th[aria-sort]")
        assert [th.get_attribute("aria-sort") for th in sorted_by] == [said]
        assert browser.switch_to.active_element == button


def test_everything_that_acts_is_reached_by_tab_and_visibly_focused(
    browser: Any, folder: Path, page_of_a_study: str
) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, folder, page_of_a_study)
    wanted = browser.execute_script(
        "return [...document.querySelectorAll('a, button, input')]"
        ".filter(e => e.checkVisibility()).length"
    )
    seen = set()
    for _ in range(wanted + 5):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        element = browser.switch_to.active_element
        if element.tag_name in ("a", "button", "input"):
            assert element.value_of_css_property("outline-style") == "solid"
            seen.add(element.id)
    assert len(seen) >= wanted - 1


def luminance(color: str) -> float:
    """Relative luminance of a CSS rgb(), WCAG 2.1."""
    rgb = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_light_and_dark_are_both_readable(
    browser: Any, folder: Path, page_of_a_run: str, page_of_a_study: str
) -> None:
    """WCAG 2.1, AA: contrast of text at least 4.5, of what is drawn, with its bold labels, 3."""
    look = """
        const back = getComputedStyle(document.body).backgroundColor;
        const colors = new Set(), drawn = new Set();
        const texts = "h1, p, td, th, dt, dd, li, span, button, figcaption, caption";
        for (const e of document.querySelectorAll(texts))
            if (e.textContent.trim() && e.checkVisibility()) colors.add(getComputedStyle(e).color);
        for (const e of document.querySelectorAll("svg text"))
            if (e.checkVisibility()) drawn.add(getComputedStyle(e).fill);
        return [back, [...colors], [...drawn]];"""
    for name, page in (("run", page_of_a_run), ("study", page_of_a_study)):
        backs = []
        for scheme in ("light", "dark"):
            browser.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            opened(browser, folder, page, name)
            back, colors, drawn = browser.execute_script(look)
            backs.append(luminance(back))
            for least, found in ((4.5, colors), (3.0, drawn)):
                for color in found:
                    one, two = sorted((luminance(back), luminance(color)))
                    assert (two + 0.05) / (one + 0.05) >= least, (scheme, color)
        assert backs[0] > 0.8 and backs[1] < 0.05
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_theme_can_be_chosen(browser: Any, folder: Path, page_of_a_run: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, folder, page_of_a_run)
    button = browser.find_element(By.ID, "theme")
    seen = {}
    for _ in range(3):
        seen[button.text] = luminance(
            browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
        button.send_keys(Keys.ENTER)
    assert seen["Colours: dark"] < 0.05 < 0.8 < seen["Colours: light"]
    assert "Colours: auto" in seen


def test_a_narrow_screen_does_not_scroll_sideways(
    browser: Any, folder: Path, page_of_a_run: str, page_of_a_study: str
) -> None:
    for name, page in (("run", page_of_a_run), ("study", page_of_a_study)):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False},
        )
        opened(browser, folder, page, name)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        kinds = browser.execute_script(
            "return [...document.querySelectorAll('figure svg')].filter(e => e.checkVisibility())"
            ".map(e => e.getAttribute('class'))"
        )
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert wide <= 360
        assert kinds and set(kinds) == {"narrow"}


def test_paper_gets_everything_in_light_colours(
    browser: Any, folder: Path, page_of_a_study: str
) -> None:
    opened(browser, folder, page_of_a_study)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    hidden = browser.execute_script(
        """return [...document.querySelectorAll("h1, h2, h3, p, tr, svg.wide, li")]
            .filter(e => !e.checkVisibility()).map(e => e.outerHTML.slice(0, 80))"""
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert luminance(back) > 0.9
    assert hidden == []
    pdf = base64.b64decode(browser.print_page())
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_compare_writes_a_page_that_works(browser: Any, tmp_path: Path) -> None:
    """By the command, from recorded runs with a hostile name, each of two models twice."""
    cli = Cli(tmp_path)
    for name, turns in (("small", 1), (HOSTILE, 40)):
        for seed in (1, 2):
            code = f"x = sum(i * i for i in range({turns} * 10**5)); print('acc 0.{8 + seed % 2}')"
            done = cli("--name", name, "--metric", "acc=acc ([0-9.]+)", "--", *python(code))
            assert done.status == 0, done.stderr
    page = tmp_path / "study.html"
    result = cli("compare", "--resource", "time", "--anyway", "-o", str(page))
    assert result.status == 0, result.stderr
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    ranking = Study.from_store(cli.store, resources=("time",)).rankings[0]
    by_row = {int(row): scores[0] for _, scores, _, row in shown(browser)}
    assert by_row == {i: f"{x:.3f}" for i, x in enumerate(ranking.scores.pepr)}
