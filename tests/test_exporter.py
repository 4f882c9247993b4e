"""The daemon's metrics: a Prometheus server that scrapes them knows the energy that flowed."""

from __future__ import annotations

import itertools
import json
import math
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cli import BURN_UNTIL, REPOSITORY, SLOW_S, Cli, component, ended, python, until, write_replay
from daemons import PACKAGE_DATA, Daemon, daemon, lock, open_folder, open_place, raw, say
from sim.nvml import STARTED, BuildNvml, Gpu, Process, Scenario, Sensor
from sim.permissions import obey_permissions
from sim.powercap import BuildTree, Tree, Zone, two_socket_server
from sim.waves import Constant, Square

from pepr_profiler.daemon.lanes import SamplingOptions, ServedLanes
from pepr_profiler.daemon.meters import Meter, Meters
from pepr_profiler.energy.sources import Source

pytest.importorskip("prometheus_client", reason="pip install 'pepr-profiler[metrics]'")

from prometheus_client.openmetrics.parser import text_string_to_metric_families

QUANTUM_J = 0.1
LATE_S = 0.2  # of a row, and of the tree's writer, on a machine with other things to do
ENERGY, WATTS = "pepr_device_energy_joules_total", "pepr_device_power_watts"
FIRST = "gpu:GPU-1"

tmp_path = open_folder


@pytest.fixture
def tree(powercap_sim: BuildTree) -> Tree:
    """Counters that wrap every second or so, and power that changes."""
    return powercap_sim(
        Zone("intel-rapl:0", "package-0", Square(0.9, 50, 150), range_uj=120_000_000),
        Zone("intel-rapl:0:0", "core", Constant(40)),
        Zone("intel-rapl:0:1", "dram", Constant(7)),
        live=True,
    )


@pytest.fixture
def running(tree: Tree, tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--sensor", tree.spec, "--metrics", "0") as started:
        yield started


def url_of(running: Daemon) -> str:
    return str(running.status()["metrics"])


def fetch(url: str, accept: str = "application/openmetrics-text") -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=SLOW_S) as answer:
        text: str = answer.read().decode()
    return text


def scrape(running: Daemon) -> dict[tuple[str, str], float]:
    """Values by sample name and device, lane or reason."""
    values = {}
    for family in text_string_to_metric_families(fetch(url_of(running))):
        for sample in family.samples:
            labels = sample.labels
            about = labels.get("device") or labels.get("lane") or labels.get("why") or ""
            values[sample.name, about] = sample.value
    return values


def connect(running: Daemon) -> socket.socket:
    found = urllib.parse.urlsplit(url_of(running))
    assert found.hostname is not None and found.port is not None
    return socket.create_connection((found.hostname, found.port), timeout=SLOW_S)


# --- Prometheus -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """A server of its own that scrapes `target` twice a second; what answers a PromQL query."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus server here: apt-get install prometheus")
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 500ms, scrape_timeout: 500ms}\n"
        f"scrape_configs: [{{job_name: pepr, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    address = f"127.0.0.1:{free_port()}"
    command = [
        program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}", "--log.level=error",
    ]  # fmt: skip

    def ask(query: str) -> list[dict[str, Any]]:
        url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            answer = json.loads(fetch(url, "application/json"))
        except OSError:
            return []  # it is starting
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    with ended(subprocess.Popen(command)) as process:
        yield ask
        process.terminate()
        process.wait(SLOW_S)


def test_a_prometheus_server_answers_with_the_joules_that_flowed(
    running: Daemon, tree: Tree, tmp_path: Path
) -> None:
    target = urllib.parse.urlsplit(url_of(running)).netloc
    with prometheus(tmp_path, target) as ask:
        # given: ten scrapes, over which the package's counter wrapped
        counted = f'count_over_time({ENERGY}{{device="cpu:package-0"}}[1m])'
        until(lambda: [r for r in ask(counted) if float(r["value"][1]) >= 10])
        to_monotonic_s = time.monotonic() - time.time()
        scrapes = {r["metric"]["device"]: r["values"] for r in ask(f"{ENERGY}[1m]")}
        slowest_s = max(
            float(v) for r in ask("scrape_duration_seconds[1m]") for _, v in r["values"]
        )
        rise = {r["metric"]["device"]: float(r["value"][1]) for r in ask(f"increase({ENERGY}[1m])")}
    # then: both devices, and not what lies inside one
    assert set(scrapes) == {"cpu:package-0", "dram:package-0/dram"}
    for device, key, most_w in (
        ("cpu:package-0", "intel-rapl:0", 150),
        ("dram:package-0/dram", "intel-rapl:0:1", 7),
    ):
        times_s = [at_s for at_s, _ in scrapes[device]]
        joules = [float(value) for _, value in scrapes[device]]
        truth_j = [
            tree.energy_j(key, *(round((t + to_monotonic_s) * 1e9) for t in (times_s[0], at_s)))
            for at_s in times_s
        ]
        # A scrape's time is when it began; it reads a row of at most 10 ms and a base period ago,
        # of a tree that may be written late.
        off_j = QUANTUM_J + (slowest_s + LATE_S) * most_w
        assert [j - joules[0] for j in joules] == pytest.approx(truth_j, abs=off_j)
        assert truth_j[-1] > 10 * QUANTUM_J
        # `increase` goes on to the edges of its window as the samples rise
        seconds = times_s[-1] - times_s[0]
        assert rise[device] == pytest.approx(truth_j[-1], abs=off_j + 2 * truth_j[-1] / seconds)


def test_promtool_finds_nothing_to_say_against_the_metrics(running: Daemon) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    text = fetch(url_of(running), accept="text/plain")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- what is served -------------------------------------------------------------------------------


def test_counters_rise_with_the_truth_and_are_no_finer_than_unprivileged_clients_see(
    running: Daemon, tree: Tree
) -> None:
    before_ns = time.monotonic_ns()
    first = until(lambda: (v := scrape(running)).get((ENERGY, "cpu:package-0")) is not None and v)
    after_ns = time.monotonic_ns()
    for energy_j in (v for (name, _), v in first.items() if "energy_joules" in name):
        assert energy_j / QUANTUM_J == pytest.approx(round(energy_j / QUANTUM_J), abs=1e-6)
    until(lambda: time.monotonic_ns() - after_ns > 3e9)
    begin_ns = time.monotonic_ns()
    last = scrape(running)
    end_ns = time.monotonic_ns()
    for name, device, key in (
        (ENERGY, "cpu:package-0", "intel-rapl:0"),
        (ENERGY, "dram:package-0/dram", "intel-rapl:0:1"),
        ("pepr_domain_energy_joules_total", "cpu:package-0/core", "intel-rapl:0:0"),
    ):
        rise_j = last[name, device] - first[name, device]
        row_ns = round(LATE_S * 1e9)
        least_j = tree.energy_j(key, after_ns, begin_ns - row_ns) - QUANTUM_J
        most_j = tree.energy_j(key, before_ns - row_ns, end_ns) + QUANTUM_J
        assert least_j <= rise_j <= most_j
    assert last["pepr_lane_up", "powercap"] == 1
    assert (
        last["pepr_lane_samples_total", "powercap"] > first["pepr_lane_samples_total", "powercap"]
    )


def test_a_device_without_an_energy_counter_has_its_power_and_no_made_up_joules(
    nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    old = Sensor(0.1, 0.025, power_usage="instant", counter_refresh_s=None)
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(250), sensor=old), Gpu(Constant(100)))))
    with daemon(tmp_path, "--sensor", sim.spec, "--metrics", "0") as running:
        served = until(lambda: (v := scrape(running)) and any("gpu:" in d for _, d in v) and v)
    watts = {d: v for (name, d), v in served.items() if name == "pepr_device_power_watts"}
    joules = {d for name, d in served if name == ENERGY}
    (without,) = watts
    assert watts[without] == pytest.approx(250, abs=1)
    assert len(joules) == 1 and without not in joules


def test_a_counter_that_stands_still_gives_way_until_it_moves_again(tmp_path: Path) -> None:
    # given a GPU at 250 W whose counter stands still from 2 to 14 s, and one without a fault
    def row(t_s: float) -> tuple[float, float, float, float]:
        shown_s = min(t_s, 2.0) + max(t_s - 14.0, 0.0)
        return 5e6 + 250e3 * shown_s, 250e3 + (t_s * 10) % 2, 5e6 + 100e3 * t_s, 100e3

    channels = [
        f"GPU-{n}/{name} uuid=GPU-{n} model=H100 index={n}"
        for n in (1, 2)
        for name in (
            "energy energy J 1e-3 0 counter nvml-energy",
            "power power W 1e-3 0 gauge nvml-power",
        )
    ]
    times_s = [i * 0.1 for i in range(600)]
    spec = write_replay(tmp_path / "gpus", channels, [(t, *row(t)) for t in times_s])

    def serves(metric: str, other: str) -> dict[tuple[str, str], float] | None:
        found = scrape(running)
        return found if (metric, FIRST) in found and (other, FIRST) not in found else None

    with daemon(tmp_path, "--sensor", spec, "--metrics", "0") as running:
        before = until(lambda: serves(ENERGY, WATTS))
        # then its power is served meanwhile, and its joules before and after
        dead = until(lambda: serves(WATTS, ENERGY))
        assert dead[WATTS, FIRST] == pytest.approx(250, abs=1)
        again = until(lambda: serves(ENERGY, WATTS))
        assert again[ENERGY, FIRST] >= before[ENERGY, FIRST]
        # and the other one's are served all the time
        rises = [one[ENERGY, "gpu:GPU-2"] for one in (before, dead, again)]
        assert rises[0] < rises[1] < rises[2]


def test_a_meter_goes_through_wraps_resets_and_what_is_unknown() -> None:
    range_j = 262_143.0
    source = Source(
        id="cpu:x", kind="cpu", label="x", lane="l", channel=0, source="powercap", counter=True,
        scale=1e-6, modulus=range_j * 1e6,
    )  # fmt: skip
    meter = Meter(source)
    # given: 10 W for 60 s, over a wrap; then the counter begins anew and 5 W flow for 10 s
    values = [(range_j - 95 + 10 * s) % range_j * 1e6 for s in range(61)]
    values += [5e6 * s for s in range(1, 11)]
    values[20] = math.nan
    times = array("q", [(s + 1) * 1_000_000_000 for s in range(len(values))])
    for part in (slice(0, 7), slice(7, 33), slice(33, None)):
        meter.take(times[part], array("d", values[part]))
    assert meter.energy_j == pytest.approx(600 + 50)
    # and what has not been read for long is unknown
    assert meter.known(times[-1]) == meter.energy_j
    assert meter.known(times[-1] + 6_000_000_000) is None


# --- runs -----------------------------------------------------------------------------------------

RUN = "pepr_run_energy_joules_total"


def runs_in(running: Daemon) -> dict[tuple[str, str], float]:
    """Joules of runs by number and kind of device."""
    return {
        (sample.labels["run"], sample.labels["kind"]): sample.value
        for family in text_string_to_metric_families(fetch(url_of(running)))
        for sample in family.samples
        if sample.name == RUN
    }


def numbers(running: Daemon) -> dict[str, str]:
    """What each registered run is called in the metrics."""
    return {run["run"]: str(run["number"]) for run in running.status()["runs"]}


def settled(running: Daemon, after_ns: int, *, settled_s: int) -> dict[tuple[str, str], float]:
    """The runs in the metrics once all energy up to an instant has been given out."""
    until(lambda: time.monotonic_ns() > after_ns + (settled_s + 1) * 10**9)
    return runs_in(running)


def test_runs_metrics_agree_with_their_summaries_and_add_up(
    tree: Tree, nvml_sim: BuildNvml, tmp_path: Path
) -> None:
    # given two runs at once, counters that they may not read, and a driver that shows to each that
    # it is alone on the GPU
    board = Gpu(Constant(300), processes=(Process(STARTED, 2**30, sm=0.5),))
    sim = nvml_sim(Scenario(gpus=(board,)))
    options = ("--sensor", tree.spec, "--sensor", sim.spec)
    begin_ns = time.monotonic_ns()
    with ExitStack() as stack:
        metered = ("--metrics", "0", "--metrics-runs")
        settled_s = 10  # claims come every 2 s, and are about what is no older than 8 s
        waits = {"settled_s": settled_s, "check_s": 1.0}
        running = stack.enter_context(daemon(tmp_path, *options, *metered, waits=waits))
        until(lambda: ("pepr_lane_up", "nvml") in (served := scrape(running)) and served)
        lock(tree)
        clients, end_ns = [], time.monotonic_ns() + 9 * 10**9
        for which in "ab":
            summary = tmp_path / f"{which}.json"
            command = ["--json", str(summary), "--name", which, *options, "--"]
            burn = python(BURN_UNTIL, str(end_ns))
            client = running.cli.start(*command, *burn, preexec_fn=obey_permissions)
            clients.append((which, summary, stack.enter_context(ended(client))))
        until(lambda: len(running.status()["runs"]) == 2)
        names = {run.partition("-")[0]: number for run, number in numbers(running).items()}
        summaries = {}
        for which, summary, client in clients:
            _, err = client.communicate(timeout=SLOW_S)
            assert client.returncode == 0, err
            summaries[which] = json.loads(summary.read_text())
        last_ns = max(s["recording"]["window_ns"][1] for s in summaries.values())
        served = settled(running, last_ns, settled_s=settled_s)
        settled_ns = time.monotonic_ns()
    for which, summary in summaries.items():
        window_ns = summary["recording"]["window_ns"]
        seconds = window_ns[1] // 10**9 + -window_ns[0] // 10**9  # whole ones within it
        # the first and the last second are not whole, and certain is what any idle draw leaves
        for kind, ident, most_w in (
            ("cpu", "cpu:package-0", 150),
            ("dram", "dram:package-0/dram", 7),
        ):
            part = component(summary, ident)
            found_j = served[names[which], kind]
            assert found_j <= 1.05 * part["job_j"] + 2 * QUANTUM_J
            unsure_j = part["idle_j"] + (summary["duration_s"] - seconds) * most_w
            assert found_j >= 0.95 * part["job_j"] - unsure_j - 2 * QUANTUM_J
    # both claim the GPU whole, and have a half of the seconds that both were there
    of_gpu = [served[which, "gpu"] for which in names.values()]
    assert of_gpu[0] == pytest.approx(of_gpu[1], abs=2 * 300)
    assert sum(of_gpu) >= (min(s["duration_s"] for s in summaries.values()) - 6) * 300
    # and together they have no more than there was
    for kind, truth_j in (
        ("cpu", tree.energy_j("intel-rapl:0", begin_ns, settled_ns)),
        ("dram", tree.energy_j("intel-rapl:0:1", begin_ns, settled_ns)),
        ("gpu", sim.scenario.energy_j(begin_ns, settled_ns, gpu=0)),
    ):
        assert sum(v for (_, of), v in served.items() if of == kind) <= truth_j


def test_a_hostile_client_claims_no_more_than_there_is_and_no_label_of_its_own(
    tree: Tree, tmp_path: Path
) -> None:
    options = ("--sensor", tree.spec, "--metrics", "0", "--metrics-runs")
    begin_ns = time.monotonic_ns()
    waits = {"settled_s": 3, "check_s": 1.0}
    with daemon(tmp_path, *options, waits=waits) as running, raw(running.socket) as peer:
        registered = [say(peer, op="register", run=f"\u00e9vil {n}") for n in range(100)]
        assert [bool(answer.get("claims")) for answer in registered] == [n < 32 for n in range(100)]
        until(lambda: running.lane("powercap")["samples"] > 0)
        until(lambda: time.monotonic_ns() > begin_ns + 5 * 10**9)
        now_s = time.monotonic_ns() // 10**9
        for n in range(32):
            claim = {"run": f"\u00e9vil {n}", "first_s": now_s - 12, "shares": {"cpu": [1.0] * 16}}
            assert say(peer, op="claim", **claim)["ok"]
        assert not say(peer, op="claim", run="another's", first_s=now_s, shares={})["ok"]
        served = settled(running, time.monotonic_ns(), settled_s=3)
        truth_j = tree.energy_j("intel-rapl:0", begin_ns, time.monotonic_ns())
        assert 0 < sum(v for (_, kind), v in served.items() if kind == "cpu") <= truth_j
        assert {int(number) for number, _ in served} <= set(range(256))
        # it is shown as open about itself as about others
        assert "vil" not in fetch(url_of(running))


def test_runs_are_shown_only_if_the_administrator_says_so(
    running: Daemon, tree: Tree, tmp_path: Path
) -> None:
    with raw(running.socket) as peer:
        assert say(peer, op="register", run="mine") == {"v": 1, "ok": True}
        assert running.status()["runs"][0]["number"] is None
        assert say(peer, op="claim", run="mine", first_s=1, shares={"cpu": [1.0]})["ok"]
        assert RUN not in fetch(url_of(running))
    cli = Cli(tmp_path, {"PEPR_DAEMON": str(tmp_path / "other" / "d.sock")})
    result = cli("daemon", "--metrics-runs", "--sensor", tree.spec)
    assert result.status == 2 and "give --metrics 9187 too" in result.stderr


# --- who asks -------------------------------------------------------------------------------------


def test_scrapers_that_never_read_cost_others_nothing(running: Daemon) -> None:
    with ExitStack() as stuck:
        for _ in range(12):
            slow = stuck.enter_context(connect(running))
            slow.sendall(b"GET /metrics HTTP/1.1\r\n")  # and never ends it
        assert scrape(running)["pepr_lane_up", "powercap"] == 1
        assert running.ask("hello")["lanes"]
        for _ in range(30):
            stuck.enter_context(connect(running))
        until(lambda: running.lane("powercap")["samples"] > 0)
        until(lambda: running.lane("powercap")["age_s"] < 1)
    # places are free again when they have gone
    served = until(lambda: _scrape_or_none(running))
    assert served["pepr_daemon_refusals_total", "scrape"] > 0


@pytest.mark.parametrize("sockets", [16, 60])
def test_sockets_that_trickle_bytes_do_not_shut_the_port(running: Daemon, sockets: int) -> None:
    """Each sends a byte now and then, and comes again as soon as it is cut off."""
    ended, cut_off = threading.Event(), itertools.count()
    url = url_of(running)
    port = urllib.parse.urlsplit(url).port

    def trickle() -> None:
        while not ended.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), SLOW_S) as slow:
                slow.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
                while not ended.wait(0.2):
                    slow.sendall(b"x")
            next(cut_off)

    slow = [threading.Thread(target=trickle) for _ in range(sockets)]
    for thread in slow:
        thread.start()
    try:
        time.sleep(1)
        for _ in range(10):
            begin_s = time.monotonic()
            assert ENERGY in fetch(url)
            assert time.monotonic() - begin_s < 9  # who trickles is cut off after 10 s
    finally:
        ended.set()
        for thread in slow:
            thread.join()
    assert next(cut_off) > 0


def test_a_request_has_a_deadline_however_often_a_byte_comes(running: Daemon) -> None:
    with connect(running) as slow:
        begin_s = time.monotonic()
        with pytest.raises(OSError):
            while True:
                slow.sendall(b"x")
                time.sleep(0.5)
                assert time.monotonic() - begin_s < SLOW_S
        assert time.monotonic() - begin_s > 8
    assert scrape(running)["pepr_daemon_refusals_total", "scrape"] == 1


def _scrape_or_none(running: Daemon) -> dict[tuple[str, str], float] | None:
    try:
        return scrape(running)
    except OSError:
        return None  # all places are taken


def test_rubbish_is_no_request_and_harms_nobody(running: Daemon) -> None:
    for rubbish in (b"\0" * 4096, b"GET\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b""):
        with connect(running) as connection:
            connection.sendall(rubbish)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert scrape(running)["pepr_lane_up", "powercap"] == 1


def test_refused_messages_and_clients_are_counted(running: Daemon) -> None:
    with raw(running.socket) as peer:
        peer.send(b"rubbish")
        peer.recv(4096)
    served = scrape(running)
    assert served["pepr_daemon_refusals_total", "message"] == 1
    assert served["pepr_daemon_clients", ""] >= 0


# --- where ----------------------------------------------------------------------------------------


def test_a_bare_port_is_this_machines_alone_and_without_asking_there_is_none(
    running: Daemon, tree: Tree, tmp_path: Path
) -> None:
    assert urllib.parse.urlsplit(url_of(running)).hostname == "127.0.0.1"
    with daemon(tmp_path / "other", "--sensor", tree.spec) as silent:
        assert silent.status()["metrics"] is None


@pytest.mark.parametrize("where", ["", ":9187", "::1", "9187x", "host:", "127.0.0.1:70000"])
def test_a_place_that_is_none_is_refused_before_anything_starts(tmp_path: Path, where: str) -> None:
    cli = Cli(tmp_path, {"PEPR_DAEMON": str(tmp_path / "run" / "d.sock")})
    result = cli("daemon", "--metrics", where)
    assert result.status == 2
    assert "is no address for metrics" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    cli = Cli(tmp_path, {"PEPR_DAEMON": str(tmp_path / "run" / "d.sock")})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli("daemon", "--metrics", str(taken.getsockname()[1]))
    assert result.status == 125
    assert "metrics cannot be served" in result.stderr and "in use" in result.stderr


def test_without_the_package_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('not installed')\n")
    cli = Cli(tmp_path, {"PEPR_DAEMON": str(tmp_path / "run" / "d.sock")})
    path = f"{tmp_path}:{cli.environment()['PYTHONPATH']}"
    result = cli("daemon", "--metrics", "0", env={"PYTHONPATH": path})
    assert result.status == 2
    assert "pip install 'pepr-profiler[metrics]'" in result.stderr


def test_the_drop_in_of_the_documentation_lets_the_unit_serve_metrics(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze; install systemd")
    page = (REPOSITORY / "docs" / "daemon.md").read_text()
    found = re.search(r"    \[Service\]\n(    .*\n)+", page)
    assert found is not None
    drop_in = found[0].replace("    ", "").replace("/usr/bin/pepr-profile", "/bin/true")
    for name in ("pepr-profiler.service", "pepr-profiler.socket"):
        text = (PACKAGE_DATA / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/pepr-profile", "/bin/true"))
    (tmp_path / "pepr-profiler.service.d").mkdir()
    (tmp_path / "pepr-profiler.service.d" / "metrics.conf").write_text(drop_in)
    units = [str(tmp_path / name) for name in ("pepr-profiler.service", "pepr-profiler.socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- Grafana --------------------------------------------------------------------------------------


def test_the_dashboard_asks_for_nothing_that_is_not_served(powercap_sim: BuildTree) -> None:
    board = json.loads((PACKAGE_DATA / "grafana-dashboard.json").read_text())
    expressions = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    asked = {name for e in expressions for name in re.findall(r"\b(?:pepr|process)_\w+", e)}
    tree = powercap_sim(*two_socket_server())
    with (
        open_place() as folder,
        daemon(folder, "--sensor", tree.spec, "--metrics", "0", "--metrics-runs") as running,
    ):
        families = list(text_string_to_metric_families(fetch(url_of(running))))
    suffix = {"counter": "_total", "info": "_info"}
    served = {f"{family.name}{suffix.get(family.type, '')}" for family in families}
    assert asked <= served
    ours = {name for name in served if name.startswith("pepr_") and not name.endswith("_info")}
    assert ours <= asked  # and all that is served is shown
    variables = {v["name"] for v in board["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)(\w+)", json.dumps(board["panels"])))
    assert used <= variables
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_without_descriptors_a_lane_is_unknown_until_there_are_some(tree: Tree) -> None:
    # given a lane that runs, and a process that may open nothing more
    lanes = ServedLanes([tree.spec], SamplingOptions())
    lanes.open_privileged()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        meters = Meters(lanes)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            meters.update()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        # then it is left out, and is there as soon as a descriptor is
        assert list(meters) == []
        meters.update()
        assert {meter.source.id for meter in meters} >= {"cpu:package-0"}
    finally:
        lanes.stop()
