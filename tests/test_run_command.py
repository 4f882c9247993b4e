"""`pepr-profile -- CMD`: the child is not disturbed, and what it cost is the truth."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from cli import SLEEP_UNTIL, SLOW_S, Cli, codes, component, ended, python, until, write_replay
from sim.nvml import BuildNvml, Fault, Gpu, Scenario, Sensor, default_uuid
from sim.powercap import BuildTree, Zone, ZoneFault, two_socket_server
from sim.waves import Constant, Square

from pepr_profiler.trace.lane import LaneReader

# --- the child is not disturbed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)]
)
def test_exit_status_is_the_childs(cli: Cli, quiet_sensor: str, script: str, status: int) -> None:
    result, summary = cli.measure("--sensor", quiet_sensor, "--", "sh", "-c", script)
    assert result.status == status
    assert (summary["exit_code"], summary["complete"]) == (status, True)
    assert summary["signal"] == (status - 128 if status > 128 else None)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--", "./no-such-program"], 127, "not found"),
        (["--", "no-such-program"], 127, "not found"),
        (["--", "./plain.txt"], 126, "chmod +x"),
        (["--", "./bad-interpreter"], 126, "interpreter"),
        (["--no-such-option", "--", "touch", "started"], 2, "--no-such-option"),
        (["--"], 2, "no command"),
        (["--metric", "acc=([0-9", "--", "touch", "started"], 2, "does not compile"),
        (["--metric-file", "x.json", "--", "touch", "started"], 2, "FILE:KEY"),
        (["--sensor", "sonar", "--", "touch", "started"], 125, "no driver is called 'sonar'"),
        (["--sensor", "replay:./none", "--", "touch", "started"], 125, "cannot be read"),
        (["--sensor", "powercap:./none", "--", "touch", "started"], 125, "no powercap"),
        (["--sensor", "nvml:./none.so", "--", "touch", "started"], 125, "no NVIDIA driver"),
        (["--region", "Atlantis", "--", "touch", "started"], 2, "'Atlantis'"),
        (["--region", "DK", "--carbon-intensity", "5", "--", "touch", "started"], 2, "keep one"),
        (["--carbon-intensity", "nan", "--", "touch", "started"], 2, "finite"),
        (["--pue", "0.5", "--", "touch", "started"], 2, "--pue 1.2"),
        (["--cpu-power", "9:1", "--", "touch", "started"], 2, "IDLE must be below MAX"),
        (["--period", "0", "--", "touch", "started"], 2, "at least 1 ns"),
        (["--json", "./none/x.json", "--", "touch", "started"], 2, "--json FILE"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_bad_input_fails_with_a_remedy_before_anything_starts(
    cli: Cli, arguments: list[str], status: int, says: str
) -> None:
    (cli.folder / "plain.txt").write_text("echo no\n")
    bad = cli.folder / "bad-interpreter"
    bad.write_text("#!/no/such/interpreter\n")
    bad.chmod(0o755)
    result = cli(*arguments, cwd=cli.folder)
    assert (result.status, result.stdout) == (status, b"")
    assert says in result.stderr
    assert "fix: " in result.stderr or "--help" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (cli.folder / "started").exists()
    assert cli.runs() == []


def test_stdout_is_the_childs_alone(cli: Cli, quiet_sensor: str) -> None:
    script = r"printf 'a\000b\r'; printf err >&2; cat"
    result = cli("--sensor", quiet_sensor, "--", "sh", "-c", script, stdin=b"\xff in")
    assert result.stdout == b"a\0b\r\xff in"
    assert result.stderr.startswith("err")
    assert "pepr > " in result.stderr
    # quiet: not a word of ours
    result = cli("-q", "--sensor", quiet_sensor, "--", "sh", "-c", script, stdin=b"\xff in")
    assert (result.stdout, result.stderr) == (b"a\0b\r\xff in", "err")


def test_json_on_stdout_follows_the_childs_bytes(cli: Cli, quiet_sensor: str) -> None:
    result = cli("--json", "-", "-q", "--sensor", quiet_sensor, "--", "printf", "tail")
    assert result.stdout.startswith(b"tail{")
    summary = json.loads(result.stdout[len(b"tail") :])
    assert summary == json.loads((cli.runs()[0] / "run.json").read_text())


def test_environment_folder_and_options_are_as_without_us(cli: Cli, quiet_sensor: str) -> None:
    code = "import json, os, sys; print(json.dumps([dict(os.environ), os.getcwd(), sys.argv[1:]]))"
    child = python(code, "--json", "--help", "--", "--name", "", "a b")
    away = cli.folder / "away"
    away.mkdir()
    env = {"PEPR_SENSOR": quiet_sensor}
    plain = subprocess.run(
        child, env=cli.environment(env), cwd=away, capture_output=True, check=True
    )
    result = cli("-q", "--", *child, env=env, cwd=away)
    (environment, folder, options), plainly = json.loads(result.stdout), json.loads(plain.stdout)
    assert Path(environment.pop("PEPR_RUN_DIR")) == cli.runs()[0]
    assert environment.pop("PEPR_RUN_MARK")
    assert [environment, folder, options] == plainly


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&1 | true", ">&- 2>&-"])
def test_whoever_does_not_listen_costs_neither_status_nor_run(
    cli: Cli, quiet_sensor: str, redirection: str
) -> None:
    ours = f"{sys.executable} -m pepr_profiler --sensor {quiet_sensor} -- sh -c 'exit 5'"
    # In a pipeline the shell tells the last one's status: ours goes to a file.
    script = f"{{ {ours}; echo $? >status; }} {redirection}"
    subprocess.run(
        ["sh", "-c", script],
        env=cli.environment(),
        cwd=cli.folder,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=SLOW_S,
    )
    status = until(lambda: (cli.folder / "status").exists() and (cli.folder / "status").read_text())
    assert status == "5\n"
    assert json.loads((cli.runs()[0] / "run.json").read_text())["complete"]


def test_summary_that_stdout_does_not_take_is_said_and_costs_no_status(
    cli: Cli, quiet_sensor: str
) -> None:
    ours = [sys.executable, "-m", "pepr_profiler", "-q", "--sensor", quiet_sensor, "--json", "-"]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [*ours, "--", "sh", "-c", "exit 5"], env=cli.environment(), cwd=cli.folder,
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 5
    assert "cannot write to standard output: No space left" in result.stderr
    assert "fix:" in result.stderr
    assert json.loads((cli.runs()[0] / "run.json").read_text())["complete"]


def test_summary_that_cannot_be_written_at_the_end_is_said_and_costs_no_status(
    cli: Cli, quiet_sensor: str
) -> None:
    gone = cli.folder / "gone"
    gone.mkdir()
    result = cli("-q", "--sensor", quiet_sensor, "--json", str(gone / "x.json"),
                 "--", "sh", "-c", f"rmdir '{gone}'; exit 5")  # fmt: skip
    assert result.status == 5
    assert "cannot write" in result.stderr
    assert cli.report(cli.runs()[0])["exit_code"] == 5


def test_hung_up_terminal_costs_neither_status_nor_run(cli: Cli, quiet_sensor: str) -> None:
    # given a child that ignores SIGHUP, and a live line on the terminal after some quiet
    master, slave = pty.openpty()
    code = (
        "import signal, sys, time; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "sys.stdin.read(); time.sleep(2); sys.exit(5)"
    )
    process = cli.start("--sensor", quiet_sensor, "--metric", "x=x: ([0-9]+)", "--", *python(code),
                        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=slave,
                        start_new_session=True,
                        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0))  # fmt: skip
    os.close(slave)
    with ended(process):
        assert os.read(master, 1)
        # when the terminal goes away
        os.close(master)
        assert process.stdin is not None
        process.stdin.close()
        # then every later line fails, and nothing else does
        assert process.wait(SLOW_S) == 5
    assert cli.report(cli.runs()[0])["complete"]


# --- options, environment, names ------------------------------------------------------------------


def test_options_come_from_flags_else_from_the_environment(cli: Cli, quiet_sensor: str) -> None:
    env = {
        "PEPR_EXPERIMENT": "of the environment",
        "PEPR_JOB": "job-1",
        "PEPR_CARBON_INTENSITY": "250",
        "PEPR_PUE": "1.2",
        "PEPR_CPU_POWER": "10:50",
        "PEPR_SENSOR": quiet_sensor,
    }
    _, summary = cli.measure(
        "--experiment", "of the flag", "--name", "my run", "--pue", "1.5", "--", "sleep", "0.3",
        env=env,
    )  # fmt: skip
    assert (summary["name"], summary["experiment"], summary["job"]) == (
        "my run", "of the flag", "job-1",
    )  # fmt: skip
    assert summary["run_id"].startswith("my-run-")
    carbon, energy_j = summary["carbon"], summary["energy"]["total_j"]
    assert (carbon["intensity_g_per_kwh"], carbon["pue"]) == (250, 1.5)
    assert carbon["g_co2e"] == pytest.approx(energy_j / 3.6e6 * 250 * 1.5)
    # An idle machine draws 10 W to the last bit but one of a sum.
    assert 10 * (1 - 1e-9) <= component(summary, "cpu:modelled")["mean_w"] <= 50


def test_region_states_its_source_and_year_and_without_one_carbon_is_unknown(
    cli: Cli, quiet_sensor: str
) -> None:
    _, summary = cli.measure("--sensor", quiet_sensor, "--region", "DK", "--", "true")
    assert summary["carbon"]["intensity_g_per_kwh"] > 0
    assert summary["carbon"]["source"]
    assert summary["carbon"]["year"] >= 2022
    result, summary = cli.measure("--sensor", quiet_sensor, "--", "true")
    assert summary["carbon"] is None
    assert "--region" in result.stderr


# --- energy is the truth --------------------------------------------------------------------------


def test_measured_energies_are_the_simulations(
    cli: Cli, nvml_sim: BuildNvml, powercap_sim: BuildTree
) -> None:
    # given four GPUs at 400 W, and two sockets whose counters wrap within the run
    sim = nvml_sim(Scenario(gpus=(Gpu(Constant(400)),) * 4))
    # Below its range by what 1.5 s at 10 W and 0.15 s at 100 W take.
    range_uj = 65_712_999_613
    zones = two_socket_server(range_uj=range_uj, start_uj=range_uj - 15_000_000)
    tree = powercap_sim(*zones, live=True)
    sensors = ["--sensor", sim.spec, "--sensor", tree.spec]
    # when a command runs for 2 s
    result, summary = cli.measure(*sensors, "--region", "DK", "--", "sleep", "2")
    assert result.status == 0
    begin_ns, end_ns = summary["recording"]["window_ns"]
    # then each device has what it truly took
    for index in range(4):
        gpu = component(summary, f"gpu:{default_uuid(index)}")
        truth_j = sim.scenario.energy_j(begin_ns, end_ns, gpu=index)
        assert truth_j == pytest.approx(400 * summary["duration_s"], rel=1e-6)
        assert abs(gpu["device_j"] - truth_j) <= gpu["u_j"]
        assert abs(gpu["device_j"] - truth_j) <= 400 * 0.1  # one refresh
        assert gpu["job_j"] == pytest.approx(gpu["device_j"], abs=gpu["u_j"])
        assert gpu["source"] == "nvml-energy"
    zones = {
        "cpu:package-0": "intel-rapl:0",
        "cpu:package-1": "intel-rapl:1",
        "dram:package-0/dram": "intel-rapl:0:1",
        "dram:package-1/dram": "intel-rapl:1:1",
    }
    for ident, key in zones.items():
        part, truth_j = component(summary, ident), tree.energy_j(key, begin_ns, end_ns)
        assert abs(part["device_j"] - truth_j) <= min(part["u_j"] + 1, 0.05 * truth_j + 0.5)
        assert part["in_total"]
        assert min(part["job_j"], part["others_j"], part["idle_j"]) >= -1e-9
        shares_j = part["job_j"] + part["others_j"] + part["idle_j"]
        assert shares_j == pytest.approx(part["device_j"])
    # and nothing that lies inside another, repeats it or contains it is added
    parts = summary["energy"]["components"]
    aside = {c["id"]: c["excluded"] for c in parts if not c["in_total"]}
    assert sorted(reason for reason in aside.values()) == [
        "contains the packages", "inside package-0", "inside package-1", "repeats package-0",
    ]  # fmt: skip
    total_j = sum(c["job_j"] for c in parts if c["in_total"])
    assert summary["energy"]["total_j"] == pytest.approx(total_j)
    gpus_j = 4 * 400 * summary["duration_s"]
    assert summary["energy"]["total_j"] >= gpus_j - 4 * 400 * 0.1
    assert summary["energy"]["provenance"] == "measured"
    assert summary["sampler"]["dropped"] == 0
    assert not codes(summary) & {"reset", "unknown", "stalled", "ended-early", "late-start"}
    # and `report` gives what `run` wrote and printed
    assert cli.report(summary["run_id"]) == summary
    shown = cli("report", summary["run_id"])
    assert shown.stdout.decode() == result.stderr


def test_changing_power_is_followed(cli: Cli, nvml_sim: BuildNvml, powercap_sim: BuildTree) -> None:
    wave = Square(0.8, 50, 300)
    sim = nvml_sim(Scenario(gpus=(Gpu(wave),)))
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", wave), live=True)
    _, summary = cli.measure("--sensor", sim.spec, "--sensor", tree.spec, "--", "sleep", "1.5")
    begin_ns, end_ns = summary["recording"]["window_ns"]
    gpu = next(c for c in summary["energy"]["components"] if c["kind"] == "gpu")
    truth_j = sim.scenario.energy_j(begin_ns, end_ns)
    assert abs(gpu["device_j"] - truth_j) <= 300 * 0.1  # at most a refresh at either edge
    package = component(summary, "cpu:package-0")
    truth_j = tree.energy_j("intel-rapl:0", begin_ns, end_ns)
    assert abs(package["device_j"] - truth_j) <= 300 * 2 * 0.025  # a period and a bit, both edges
    # RAPL without a DRAM domain: memory is modelled beside it, and the total says so
    assert summary["energy"]["provenance"] == "mixed"


def test_without_sensor_energy_is_modelled_labelled_and_never_zero(cli: Cli) -> None:
    found = json.loads(cli("sensors", "--json").stdout)
    if found["channels"]:
        pytest.skip("this machine has energy sensors")
    code = "import time\nwhile time.process_time() < 0.5: pass"
    result, summary = cli.measure("--cpu-power", "10:50", "--", *python(code))
    energy = summary["energy"]
    assert energy["provenance"] == "modelled"
    assert all(c["provenance"] == "modelled" for c in energy["components"])
    assert energy["total_j"] > 0
    assert energy["u_j"] > 0
    assert "estimated" in result.stderr
    # P lies in [10 W, 50 W] and the child is not alone: its share is at most the whole
    cpu = component(summary, "cpu:modelled")
    assert 10 <= cpu["mean_w"] <= 50
    assert 0 < cpu["job_j"] <= cpu["device_j"] + 1e-9
    # every absent sensor is listed with why and the fix
    assert len(summary["missing"]) == 2
    assert all(note["what"] and note["why"] and note["fix"] for note in summary["missing"])
    assert "powercap" in result.stderr
    assert "NVIDIA" in result.stderr


def test_cpu_time_is_counted_to_the_last_slice_of_every_descendant(
    cli: Cli, powercap_sim: BuildTree
) -> None:
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(100)), live=True)
    # given a child that is busy for 0.3 s, has a short-lived child busy for 0.3 s, and an orphan
    # that is busy for 0.3 s after its parent has gone
    busy = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = f"""
import os, subprocess, sys
subprocess.run([sys.executable, "-c", {busy!r}], check=True)
read, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.close(read)
        os.set_inheritable(write, True)
        os.execv(sys.executable, [sys.executable, "-c", {busy!r}])
    os._exit(0)
os.wait()
os.close(write)
os.read(read, 1)  # until the orphan has ended
{busy}"""
    _, summary = cli.measure("--sensor", tree.spec, "--", *python(code))
    assert summary["recording"]["exit"]["cpu_s"] >= 0.9
    columns = [
        batch.values[0] for batch in LaneReader(cli.store / "runs" / summary["run_id"], "processes")
    ]
    assert columns[-1][-1] - columns[0][0] >= 0.88  # the trace, too; waited-for time is in ticks
    package = component(summary, "cpu:package-0")
    # Whatever else ran, no more than every CPU was busy: the job's share is at least this.
    least_j = 100 * 0.88 / os.sysconf("SC_NPROCESSORS_ONLN")
    assert 0.95 * least_j <= package["job_j"] <= package["device_j"]
    assert summary["memory"]["peak_rss_bytes"] > 2**20


def test_a_quiet_run_keeps_its_warnings_and_a_screen_names_the_store_it_was_given(
    cli: Cli, quiet_sensor: str, tmp_path: Path
) -> None:
    script = "sleep 600 >/dev/null 2>&1 & echo $!"
    result = cli("-q", "--sensor", quiet_sensor, "--", "sh", "-c", script)
    os.kill(int(result.stdout), signal.SIGKILL)
    assert "still run" in result.stderr and "fix: let the command wait" in result.stderr
    assert "pepr >" not in result.stderr
    elsewhere = tmp_path / "my runs"
    result = cli("--store", str(elsewhere), "--sensor", quiet_sensor, "--", "true")
    assert "--store '" in result.stderr
    result = cli("--store", "my runs", "--sensor", quiet_sensor, "--", "true", cwd=tmp_path)
    following = result.stderr.partition("next: pepr-profile ")[2]
    shown = cli(*shlex.split(following), cwd=tmp_path)
    assert shown.stdout.startswith(b"pepr > true")


def test_descendant_that_stays_is_reported_and_not_waited_for(cli: Cli, quiet_sensor: str) -> None:
    script = "sleep 600 >/dev/null 2>&1 & echo $!"
    result, summary = cli.measure("--sensor", quiet_sensor, "--", "sh", "-c", script)
    pid = int(result.stdout)
    try:
        os.kill(pid, 0)  # it lives on
        assert summary["duration_s"] < 300
        assert codes(summary) == {"descendants-left"}
        assert "still run" in result.stderr
    finally:
        os.kill(pid, signal.SIGKILL)


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_signal_reaches_the_child_and_still_ends_in_a_summary(
    cli: Cli, quiet_sensor: str, name: str
) -> None:
    code = f"""
import os, signal
def end(signo, frame):
    os.write(1, b"got " + signal.Signals(signo).name.encode())
    os._exit(5)
signal.signal(signal.{name}, end)
os.write(1, b"ready")
while True: signal.pause()
"""
    process = cli.start("--sensor", quiet_sensor, "--", *python(code))
    with ended(process):
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ready"
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=SLOW_S)
    assert (process.returncode, out) == (5, b"got " + name.encode())
    assert b"pepr > " in err
    summary = cli.report(cli.runs()[0])
    assert (summary["complete"], summary["exit_code"]) == (True, 5)


def test_child_that_a_signal_ends_is_reported_so(cli: Cli, quiet_sensor: str) -> None:
    process = cli.start("--sensor", quiet_sensor, "--", "sh", "-c", "echo ready; exec sleep 600")
    with ended(process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        process.communicate(timeout=SLOW_S)
    assert process.returncode == 128 + signal.SIGTERM
    summary = cli.report(cli.runs()[0])
    assert (summary["complete"], summary["signal"]) == (True, signal.SIGTERM)


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_come_from_output_and_files_and_the_last_match_wins(
    cli: Cli, quiet_sensor: str
) -> None:
    code = """
import json, os
print("acc: 0.5\\nacc: 0.91", flush=True)
os.write(2, b"loss=0.25\\n")
json.dump({"test": {"f1": 0.8}}, open("out.json", "w"))
print(os.isatty(1), end="")
"""
    result, summary = cli.measure(
        "--sensor", quiet_sensor,
        "--metric", "accuracy=acc: ([0-9.]+)", "--metric", "loss=loss=([0-9.]+)",
        "--metric", "bleu=BLEU ([0-9.]+)",
        "--metric-file", "out.json:test.f1:f1", "--metric-file", "none.json:x",
        "--", *python(code), cwd=cli.folder,
    )  # fmt: skip
    assert result.stdout == b"acc: 0.5\nacc: 0.91\nFalse"
    assert summary["metrics"] == {"accuracy": 0.91, "loss": 0.25, "f1": 0.8}
    assert summary["performance"] == {"metric": "accuracy", "value": 0.91}
    assert codes(summary) == {"metric-never-matched", "metric-file-missing"}
    assert "BLEU" in result.stderr
    assert "runs set" in result.stderr


def test_a_terminal_stays_a_terminal_while_its_output_is_read_along(
    cli: Cli, quiet_sensor: str
) -> None:
    master, slave = pty.openpty()
    code = "import os; print(os.isatty(1), 'acc: 0.75')"
    process = cli.start("-q", "--sensor", quiet_sensor, "--metric", "a=acc: ([0-9.]+)",
                        "--", *python(code), stdout=slave)  # fmt: skip
    os.close(slave)
    with ended(process):
        shown = b""
        while b"\n" not in shown:
            shown += os.read(master, 100)
        assert process.wait(SLOW_S) == 0
    os.close(master)
    assert shown == b"True acc: 0.75\r\n"
    assert cli.report(cli.runs()[0])["metrics"] == {"a": 0.75}


# --- sensors that fail while the child runs -------------------------------------------------------


def test_sensors_that_fail_in_mid_run_are_reported_and_cost_only_themselves(
    cli: Cli, nvml_sim: BuildNvml, powercap_sim: BuildTree
) -> None:
    # given faults that begin when the run has begun: after 2.5 s, or later on a busy machine
    lost, reset, zero, slow = range(4)
    energy = "nvmlDeviceGetTotalEnergyConsumption"
    start_mj = 10_000_000_000  # 10 MJ: a counter that reads 0 once must not add them again

    def run(fault_s: float) -> tuple[dict[str, Any], float, float]:
        """A run whose child lives until 6 s after the faults, from when until when."""
        epoch_ns = time.monotonic_ns()
        sim = nvml_sim(
            Scenario(
                gpus=(
                    Gpu(Constant(200), counter_start_mj=start_mj),
                    Gpu(Constant(200), counter_start_mj=start_mj, counter_resets_s=(fault_s,)),
                    Gpu(Constant(200), counter_start_mj=start_mj),
                    Gpu(Constant(200), counter_start_mj=start_mj),
                ),
                faults=(
                    Fault("nvmlDevice", "GPU_IS_LOST", start_s=fault_s, gpu=lost),
                    Fault(energy, "ZERO", start_s=fault_s, gpu=zero, every=5),
                    Fault(energy, "NOT_SUPPORTED", start_s=fault_s, gpu=slow, every=3),
                ),
                epoch_ns=epoch_ns,
            )
        )
        effects = (
            ZoneFault("stall", fault_s),
            ZoneFault("empty", fault_s),
            ZoneFault("garbage", fault_s, fault_s + 2),
            ZoneFault("vanish", fault_s),
            ZoneFault("reset", fault_s),
            ZoneFault("deny", 0.0),
        )
        zones = [
            Zone(f"intel-rapl:{n}", f"package-{n}", Constant(100), faults=(effect,),
                 start_uj=2**32 if effect.effect == "reset" else 0)
            for n, effect in enumerate(effects)
        ]  # fmt: skip
        still = Zone("intel-rapl:6", "package-6", Constant(0))
        tree = powercap_sim(*zones, still, live=True, epoch_ns=epoch_ns)
        end_ns = epoch_ns + round((fault_s + 6) * 1e9)
        child = python(SLEEP_UNTIL + "    sys.exit(3)", str(end_ns))
        result, summary = cli.measure("--sensor", sim.spec, "--sensor", tree.spec, "--", *child)
        assert result.status == 3
        window_ns = summary["recording"]["window_ns"]
        begin_s, end_s = ((t_ns - epoch_ns) * 1e-9 for t_ns in window_ns)
        return summary, begin_s, end_s

    # when
    for fault_s in (2.5, 8.0, 25.0):
        summary, begin_s, end_s = run(fault_s)
        if begin_s < fault_s - 0.1:
            break
    else:
        pytest.fail(f"a run begins only after {begin_s:.1f} s here")
    directory = cli.store / "runs" / summary["run_id"]

    def gpu(index: int) -> dict[str, Any]:
        return component(summary, f"gpu:{default_uuid(index)}")

    def warnings_of(about: str, lane: str) -> set[str]:
        # A lane that the machine itself kept from reading has a gap in all of its channels.
        batches = LaneReader(directory, lane)
        gaps_ns = [
            batch.since_read_ns.max() for batch in batches if batch.since_read_ns is not None
        ]
        starved = max(gaps_ns) > 1_000_000_000
        return codes(summary, about) - ({"gap"} if starved else set())

    # then what was read before is kept, and what is missing is said
    assert gpu(lost)["device_j"] == pytest.approx(200 * (fault_s - begin_s), abs=200 * 0.3)
    assert warnings_of(default_uuid(lost), "nvml") == {"ended-early"}
    # a reset loses at most what flowed since the last reading
    whole_j = 200 * (end_s - begin_s)
    assert gpu(reset)["device_j"] == pytest.approx(whole_j, abs=200 * 0.3)
    assert warnings_of(default_uuid(reset), "nvml") == {"reset"}
    # a spurious 0 or refusal is a missing sample
    for index in (zero, slow):
        assert gpu(index)["device_j"] == pytest.approx(whole_j, abs=200 * 0.2)
        assert warnings_of(default_uuid(index), "nvml") == set()
    until_fault_j = 100 * (fault_s - begin_s)
    whole_j = 100 * (end_s - begin_s)
    for number, energy_j, warned in [
        (0, until_fault_j, {"stalled"}),
        (1, until_fault_j, {"ended-early"}),
        (2, whole_j, {"gap"}),  # a counter keeps its energy over a gap
        (3, until_fault_j, {"ended-early"}),
        (4, whole_j, {"reset"}),
    ]:
        package = component(summary, f"cpu:package-{number}")
        assert package["device_j"] == pytest.approx(energy_j, abs=100 * 0.2), number
        if "gap" in warned:
            assert codes(summary, f"cpu:package-{number} ") == warned
        else:
            assert warnings_of(f"cpu:package-{number} ", "powercap") == warned
    # a counter that never moves is unknown, which is not 0
    still = component(summary, "cpu:package-6")
    assert (still["device_j"], still["job_j"]) == (None, None)
    assert codes(summary, "cpu:package-6 ") == {"unknown"}
    # and the total says which devices it lacks and for how long, and claims no u
    missing_s = {part["id"]: part["missing_s"] for part in summary["energy"]["partial"]}
    gone = {f"gpu:{default_uuid(lost)}", *(f"cpu:package-{number}" for number in (0, 1, 3))}
    assert gone <= missing_s.keys()
    assert missing_s[f"gpu:{default_uuid(lost)}"] == pytest.approx(end_s - fault_s, abs=0.5)
    assert missing_s["cpu:package-6"] == pytest.approx(end_s - begin_s)
    assert not missing_s.keys() & {f"gpu:{default_uuid(n)}" for n in (reset, zero, slow)}
    assert summary["energy"]["u_j"] is None
    for part in summary["energy"]["components"]:
        assert part["device_j"] is None or part["device_j"] > 0
        assert part["job_j"] is None or part["job_j"] >= 0
    assert summary["sampler"]["failed_reads"] > 0
    assert cli.report(summary["run_id"]) == summary


def test_denied_zone_is_missing_with_its_remedy(cli: Cli, powercap_sim: BuildTree) -> None:
    from sim.permissions import obey_permissions

    tree = powercap_sim(Zone("intel-rapl:0", "package-0"), Zone("intel-rapl:1", "package-1"))
    (tree.path("intel-rapl:1") / "energy_uj").chmod(0)
    result = cli("--sensor", tree.spec, "--json", "-", "-q", "--", "true",
                 preexec_fn=obey_permissions)  # fmt: skip
    summary = json.loads(result.stdout)
    assert len(summary["missing"]) == 1
    assert "ermission" in summary["missing"][0]["why"]
    assert summary["missing"][0]["fix"]


def test_driver_that_hangs_neither_delays_the_child_nor_keeps_us(
    cli: Cli, nvml_sim: BuildNvml, powercap_sim: BuildTree
) -> None:
    epoch_ns = time.monotonic_ns()
    sim = nvml_sim(
        Scenario(
            gpus=(Gpu(Constant(300)),),
            faults=(Fault("nvmlDevice", "HANG", start_s=4.0),),
            epoch_ns=epoch_ns,
        )
    )
    tree = powercap_sim(Zone("intel-rapl:0", "package-0", Constant(100)), live=True)
    end_ns = epoch_ns + 5_600_000_000
    result, summary = cli.measure(
        "--sensor", sim.spec, "--sensor", tree.spec, "--", *python(SLEEP_UNTIL, str(end_ns))
    )
    assert result.status == 0
    assert codes(summary, "nvml:") == {"hung-sensor"}
    assert codes(summary, "gpu:") == {"ended-early"}
    begin_ns, end_ns = summary["recording"]["window_ns"]
    gpu = next(c for c in summary["energy"]["components"] if c["kind"] == "gpu")
    assert 0 < gpu["device_j"] < 300 * (end_ns - begin_ns) * 1e-9 - 300
    # the other lane noticed nothing
    package_j = component(summary, "cpu:package-0")["device_j"]
    assert package_j == pytest.approx(100 * summary["duration_s"], abs=10)
    assert codes(summary, "package-0") == set()


def test_energy_of_a_sensor_that_never_answered_is_null_not_zero(cli: Cli, tmp_path: Path) -> None:
    spec = write_replay(
        tmp_path / "nan",
        ["acc energy J 1 0 counter test kind=other", "w power W 1 0 gauge test kind=other"],
        [(0.0, float("nan"), float("nan"))],
    )
    _, summary = cli.measure("--sensor", spec, "--cpu-power", "1:2", "--", "sleep", "0.3")
    for ident in ("other:acc", "other:w"):
        part = component(summary, ident)
        assert part["in_total"]
        assert (part["device_j"], part["job_j"], part["mean_w"]) == (None, None, None)
        assert codes(summary, ident) == {"unknown"}
    assert summary["energy"]["total_j"] > 0  # what is known: the modelled CPU
    assert summary["energy"]["provenance"] == "modelled"


def test_ctrl_c_ends_us_as_it_ended_the_child(cli: Cli, quiet_sensor: str) -> None:
    # given a child that dies of SIGINT
    process = cli.start("--sensor", quiet_sensor, "--", "sh", "-c", "echo ready; exec sleep 600")
    with ended(process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SLOW_S)
    # then a shell sees 130 and breaks off its loop, and the run is complete all the same
    assert process.returncode == -signal.SIGINT
    summary = cli.report(cli.runs()[0])
    assert (summary["complete"], summary["exit_code"]) == (True, 130)


def test_a_die_that_mirrors_another_is_reported_and_not_added(
    cli: Cli, powercap_sim: BuildTree
) -> None:
    dies = [Zone(f"intel-rapl:{i}", f"package-0-die-{i}", Constant(90)) for i in range(2)]
    tree = powercap_sim(*dies, live=True)
    _, summary = cli.measure("--sensor", tree.spec, "--", "sleep", "1.5")
    first, second = (component(summary, f"cpu:package-0-die-{i}") for i in range(2))
    assert (first["in_total"], second["in_total"]) == (True, False)
    assert first["device_j"] == pytest.approx(90 * summary["duration_s"], abs=5)
    assert "mirrored" in codes(summary)


@pytest.mark.parametrize("counter_s", [0.1, 1.0])
def test_runs_shorter_than_a_refresh_wait_for_it_and_say_how_unsure_they_are(
    cli: Cli, nvml_sim: BuildNvml, counter_s: float
) -> None:
    # given a GPU whose counter is refreshed less often than the run is long
    sensor = Sensor(counter_refresh_s=counter_s)
    off_by, wide = [], 0  # in units of ±
    for number in range(4):
        sim = nvml_sim(Scenario(gpus=(Gpu(Square(0.31, 100, 400), sensor=sensor),)))
        out = cli.folder / f"{number}.json"
        # when a program of some 10 ms runs
        cli("--json", str(out), "--sensor", sim.spec, "--scope", "device", "--", "true")
        summary = json.loads(out.read_text())
        gpu = next(c for c in summary["energy"]["components"] if c["kind"] == "gpu")
        # then the energy is known to within its ±, and no better than that tells
        truth_j = sim.scenario.energy_j(*summary["recording"]["window_ns"])
        off_by.append(abs(gpu["device_j"] - truth_j) / gpu["u_j"])
        wide += gpu["u_j"] > max(3 * gpu["device_j"], 0.5 * truth_j)
    assert wide <= 2  # it is where a busy machine read late
    # (one of twenty intervals may miss the truth by a little)
    assert sum(off > 1 for off in off_by) <= 1 and max(off_by) < 2, off_by
