"""The run's screen, character by character, from summaries written by hand."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.cells import cell_len

from pepr_profiler.report.run_text import render_live, render_run

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def component(id_: str, label: str, **values: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "kind": id_.partition(":")[0],
        "label": label,
        "source": "test",
        "provenance": "measured",
        "device_j": None,
        "others_j": 0.0,
        "idle_j": 0.0,
        "in_total": True,
        "trace_w": None,
    } | values


def package(n: int, **values: Any) -> dict[str, Any]:
    # u: sqrt(2) of it is the 2.1 kJ of the two
    power = {"mean_w": 59.45, "max_w": 82.1}
    energy = {"job_j": 50_370.0, "u_j": 1_485.0}
    return component(f"cpu:package-{n}", f"package-{n}", **(power | energy | values))


def dram(n: int) -> dict[str, Any]:
    return component(
        f"dram:package-{n}/dram",
        f"package-{n}/dram",
        job_j=9_010.0,
        u_j=636.4,
        mean_w=10.65,
        max_w=12.4,
        trace_w=[10.65] * 48,
    )


@pytest.fixture
def measured() -> dict[str, Any]:
    """A GPU node whose every sensor can be read: the run of the design's example."""
    return {
        "schema": 1,
        "run_id": "train-20417",
        "job": None,
        "name": "train",
        "experiment": None,
        "command": ["python", "train.py"],
        "host": "node7",
        "duration_s": 847.3,
        "time_s": 847.3,
        "exit_code": 0,
        "complete": True,
        "energy": {
            "total_j": 371_600.0,
            "u_j": 9_285.0,
            "mean_w": 438.6,
            "provenance": "measured",
            "components": [
                # three thirds of the run are five and a third of the sixteen cells each
                package(0, trace_w=[41.0] * 32 + [82.1] * 16),
                package(1, trace_w=[41.0] * 16 + [None] * 16 + [82.1] * 16),
                dram(0),
                dram(1),
                component(
                    "gpu:GPU-8f2a",
                    "gpu:0  H100",
                    job_j=252_840.0,
                    u_j=9_000.0,
                    mean_w=298.4,
                    max_w=611.0,
                    others_j=2_100.0,
                    idle_j=11_000.0,
                    trace_w=[70.0] * 16 + [611.0] * 16 + [300.0] * 16,
                ),
                component("cpu:package-0/core", "package-0/core", in_total=False),
                component("cpu:package-1/core", "package-1/core", in_total=False),
                component("cpu:package-0/uncore", "package-0/uncore", in_total=False),
                component("other:psys", "psys", in_total=False),
            ],
        },
        "phases": [],
        "memory": {"peak_rss_bytes": 1_234_000_000, "gpu_peak_bytes": 10_500_000_000},
        "carbon": {
            "g_co2e": 38.14,
            "intensity_g_per_kwh": 369.5,
            "pue": 1.0,
            "source": "Ember, US",
            "year": 2023,
        },
        "metrics": {"loss": 0.081234, "accuracy": 0.9737, "epoch": 3},
        "performance": {"metric": "accuracy", "value": 0.9737},
        "sampler": {"cpu_s": 1.9, "samples": 25_416, "dropped": 0, "late": 25, "rate_hz": {}},
        "missing": [
            {"what": what, "why": "no sensor", "fix": ""} for what in ("psu", "fans", "network")
        ],
        "warnings": [],
    }


@pytest.fixture
def modelled(measured: dict[str, Any]) -> dict[str, Any]:
    """A short run in a virtual machine without any sensor."""
    return measured | {
        "run_id": "digits-7",
        "duration_s": 3.42,
        "energy": {
            "total_j": 12.34,
            "u_j": 6.17,
            "mean_w": 3.608,
            "provenance": "modelled",
            "components": [
                component(
                    "cpu:modelled",
                    "EPYC 3",
                    job_j=10.1,
                    u_j=5.06,
                    mean_w=2.95,
                    max_w=4.04,
                    provenance="modelled",
                    others_j=None,
                    idle_j=1.2,
                    trace_w=[None] * 16 + [1.0] * 16 + [4.04] * 16,
                ),
                component(
                    "dram:modelled",
                    "2 GB",
                    job_j=2.24,
                    u_j=1.12,
                    mean_w=0.75,
                    max_w=0.75,
                    provenance="modelled",
                    others_j=0.5,
                ),
            ],
        },
        "memory": {"peak_rss_bytes": 312_000_000, "gpu_peak_bytes": None},
        "carbon": None,
        "metrics": {},
        "performance": None,
        "sampler": {"cpu_s": 0.021, "samples": 342, "dropped": 0, "late": 0, "cpu_fraction": 0.006},
        "missing": [
            {
                "what": "cpu energy",
                "why": "/sys/class/powercap has no zone, as in most virtual machines",
                "fix": "run on bare metal; or make the model better with --cpu-power IDLE:MAX",
            },
            {
                "what": "gpu",
                "why": "libnvidia-ml.so.1 cannot be loaded",
                "fix": "install the NVIDIA driver",
            },
        ],
        "warnings": [
            {
                "code": "metric-never-matched",
                "text": "the pattern 'acc: (.*)' never matched",
                "hint": "try it on the output of the command",
            }
        ],
    }


def assert_screen(text: str, expected: str) -> None:
    """The exact text, and what every screen of 80 columns promises."""
    assert text == expected.removeprefix("\n").removesuffix("\n")
    for line in text.split("\n"):
        assert cell_len(line) <= 80
        assert line == line.rstrip()


def test_a_measured_run_shows_each_device_once_and_what_is_not_in_the_total(
    measured: dict[str, Any],
) -> None:
    assert_screen(
        render_run(measured),
        """
pepr > python train.py   exit 0   14 min 07 s

  Energy       371.6 ± 9.3 kJ   (103.2 Wh)   mean 438.6 W   measured

  device               energy           share  mean W  peak W   power over time
  gpu:0  H100          252.8 ± 9.0 kJ   68.0%   298.4   611.0   ▁▁▁▁▁▆████▇▄▄▄▄▄
  cpu    2 packages    100.7 ± 2.1 kJ   27.1%   118.9  ≤164.2   ▄▄▄▄▄▄    ██████
  dram                  18.0 ± 0.9 kJ    4.8%    21.3   ≤24.8   ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇
  not in the total: core, uncore (inside package); psys (contains package)
  Energy is this job's share, ± k = 2 (95%). Watts are of the whole device; the
  peak is the highest mean over 1 s (≤: upper bound).

  attribution  this job 371.6 kJ, other processes 2.100 kJ, idle 11.00 kJ
  carbon       38.14 g CO2e at 369.5 g/kWh, PUE 1.00 (Ember, US 2023)
  metrics      accuracy 0.9737 (performance), loss 0.08123, epoch 3
  memory       peak 1.234 GB in RAM, 10.50 GB on GPUs
  sampling     25,416 samples, 0 dropped, 0.1% late; profiler 1.90 s CPU (0.2%)
  missing      psu, fans, network: no sensor

  saved train-20417                        next: pepr-profile report train-20417
""",
    )


@pytest.mark.parametrize(
    ("attached", "headline"),
    [
        ({4121: "train.py"}, "pepr > attach 4121 (python train.py)   14 min 07 s"),
        (
            {4121: "train.py", 4122: "train.py"},
            "pepr > attach 4121 4122 (python train.py)   14 min 07 s",
        ),
        (
            {4121: "a b.py", 7: "eval.py"},
            "pepr > attach 4121 (python 'a b.py'), 7 (python eval.py)   14 min 07 s",
        ),
        (
            {4121: "train.py", 7: f"{'x' * 80}.py"},
            f"pepr > attach 4121 (python train.py), 7 (python {'x' * 17}…   14 min 07 s",
        ),
    ],
)
def test_attached_processes_are_named_and_have_no_exit_status(
    measured: dict[str, Any], attached: dict[int, str], headline: str
) -> None:
    measured["recording"] = {
        "attached": [{"pid": pid, "command": ["python", file]} for pid, file in attached.items()]
    }
    measured["exit_code"] = None
    assert render_run(measured).split("\n")[0] == headline


def test_attribution_device_shows_what_the_devices_took_and_still_whose_it_was(
    measured: dict[str, Any],
) -> None:
    # given a whole GPU and a whole socket, of which others took a part
    gpu = measured["energy"]["components"][4] | {"device_j": 265_940.0}
    socket = package(0, device_j=60_370.0, others_j=8_000.0, idle_j=2_000.0)
    measured["energy"] |= {
        "total_j": 326_310.0, "u_j": 9_121.0, "scope": "device", "components": [gpu, socket],
    }  # fmt: skip
    lines = render_run(measured).split("\n")
    assert lines[2:4] == [
        "  Energy       326.3 ± 9.1 kJ   (90.64 Wh)   mean 438.6 W   measured",
        "               of the whole devices, whoever used them (--attribution device)",
    ]
    assert [line[:44] for line in lines[6:8]] == [
        "  gpu:0  H100          265.9 ± 9.0 kJ   81.5",
        "  cpu    package-0      60.4 ± 1.5 kJ   18.5",
    ]
    assert "  Energy, ± k = 2 (95%), and watts are of the whole device; the peak is the" in lines
    assert "  attribution  this job 303.2 kJ, other processes 10.10 kJ, idle 13.00 kJ" in lines


def test_an_estimated_run_says_that_it_is_an_estimate_and_why(modelled: dict[str, Any]) -> None:
    assert_screen(
        render_run(modelled),
        """
pepr > python train.py   exit 0   3.42 s

  Energy       12.3 ± 6.2 J   (3.428 mWh)   mean 3.608 W   estimated
               no sensor: an estimate from utilisation, ± 50% (see missing)

  device               energy           share  mean W  peak W   power over time
  cpu    EPYC 3          10.1 ± 5.1 J   81.8%    2.95    4.04        ▂▂▂▂▂▄█████
  dram   2 GB             2.2 ± 1.1 J   18.2%    0.75    0.75
  Energy is this job's share, ± k = 2 (95%). Watts are of the whole device; the
  peak is the highest mean over 1 s.

  attribution  this job 12.34 J, other processes at least 500.0 mJ, idle 1.200 J
  carbon       unknown: set --region CODE or --carbon-intensity G_PER_KWH
  memory       peak 312.0 MB in RAM
  sampling     342 samples, 0 dropped, 0.0% late; profiler 21.0 ms CPU (0.6%)
  missing      cpu energy: /sys/class/powercap has no zone, as in most virtual
               machines
                 fix: run on bare metal; or make the model better with
                 --cpu-power IDLE:MAX
               gpu: libnvidia-ml.so.1 cannot be loaded
                 fix: install the NVIDIA driver
  warning      the pattern 'acc: (.*)' never matched
                 fix: try it on the output of the command

  saved digits-7                              next: pepr-profile report digits-7
""",
    )


def test_without_any_sensor_the_energy_is_unknown_and_not_0(modelled: dict[str, Any]) -> None:
    # given
    modelled["energy"] = {
        "total_j": None,
        "u_j": None,
        "mean_w": None,
        "provenance": None,
        "components": [],
    }
    modelled["memory"] = {"peak_rss_bytes": None, "gpu_peak_bytes": None}
    modelled["missing"] = modelled["missing"][1:]
    modelled["warnings"] = []
    # when, then
    assert_screen(
        render_run(modelled),
        """
pepr > python train.py   exit 0   3.42 s

  Energy       unknown

  carbon       unknown: set --region CODE or --carbon-intensity G_PER_KWH
  memory       peak unknown in RAM
  sampling     342 samples, 0 dropped, 0.0% late; profiler 21.0 ms CPU (0.6%)
  missing      gpu: libnvidia-ml.so.1 cannot be loaded
                 fix: install the NVIDIA driver

  saved digits-7                              next: pepr-profile report digits-7
""",
    )


def test_a_run_that_lost_its_profiler_says_so_first(modelled: dict[str, Any]) -> None:
    modelled |= {"complete": False, "exit_code": None}
    assert_screen(
        "\n".join(render_run(modelled).split("\n")[:7]),
        """
pepr > python train.py   incomplete   3.42 s

  Energy       12.3 ± 6.2 J   (3.428 mWh)   mean 3.608 W   estimated
               no sensor: an estimate from utilisation, ± 50% (see missing)
               incomplete: the profiler was killed or still runs; these are the
               figures so far

""",
    )


def test_mixed_provenance_is_shown_row_by_row(measured: dict[str, Any]) -> None:
    # given a GPU that is measured beside a CPU that is not
    energy = measured["energy"]
    energy["provenance"] = "mixed"
    for part in energy["components"]:
        if part["kind"] != "gpu":
            part["provenance"] = "modelled"
    energy["components"] = [part for part in energy["components"] if part["in_total"]]
    # when, then the sparkline is shorter by what the word takes; the GPU's fourth of ten cells
    # is 1.6 buckets of 70 W and 3.2 of 611 W, 5.6 eighths of 611 W: the sixth block
    assert_screen(
        "\n".join(render_run(measured).split("\n")[2:9]),
        """
  Energy       371.6 ± 9.3 kJ   (103.2 Wh)   mean 438.6 W   mixed
               there is no sensor for the estimated rows (see missing)

  device                         energy          share mean W peak W  power
  gpu:0  H100         measured   252.8 ± 9.0 kJ  68.0%  298.4  611.0  ▁▁▁▆██▇▄▄▄
  cpu    2 packages   estimated  100.7 ± 3.0 kJ  27.1%  118.9 ≤164.2  ▄▄▄▄  ████
  dram                estimated   18.0 ± 1.3 kJ   4.8%   21.3  ≤24.8  ▇▇▇▇▇▇▇▇▇▇
""",
    )


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exit 0"),
        (7, "exit 7"),
        (127, "exit 127"),
        (128, "exit 128"),
        (130, "killed by SIGINT (130)"),
        (137, "killed by SIGKILL (137)"),
        (143, "killed by SIGTERM (143)"),
        (255, "exit 255"),
    ],
)
def test_the_headline_says_how_the_command_ended(
    measured: dict[str, Any], code: int, text: str
) -> None:
    measured["exit_code"] = code
    headline = render_run(measured).split("\n")[0]
    assert headline == f"pepr > python train.py   {text}   14 min 07 s"


def test_a_run_in_code_has_its_name_and_no_exit_status(measured: dict[str, Any]) -> None:
    measured |= {"command": [], "exit_code": None, "name": "resnet18"}
    assert render_run(measured).split("\n")[0] == "pepr > resnet18   14 min 07 s"


def test_phases_are_ranked_by_energy_with_the_unknown_last(modelled: dict[str, Any]) -> None:
    modelled["phases"] = [
        {"name": "load", "count": 1, "duration_s": 0.42, "energy_j": 1.2, "u_j": 0.61},
        {"name": "検証", "count": 1000, "duration_s": 0.3, "energy_j": None, "u_j": None},
        {"name": "train", "count": 10, "duration_s": 2.7, "energy_j": 9.9, "u_j": 4.96},
    ]
    assert_screen(
        "\n".join(render_run(modelled).split("\n")[11:15]),
        """
  phase                energy           share   count     time
  train                   9.9 ± 5.0 J   80.2%      10   2.70 s
  load                    1.2 ± 0.6 J    9.7%       1   420 ms
  検証                        unknown       ?   1,000   300 ms
""",
    )


def test_twelve_phases_are_shown_and_the_rest_counted(modelled: dict[str, Any]) -> None:
    # given 15 phases, the later the more expensive
    modelled["phases"] = [
        {"name": f"p{i:02d}", "count": 1, "duration_s": 1.0, "energy_j": i / 10, "u_j": 0.1}
        for i in range(1, 16)
    ]
    # when
    lines = render_run(modelled).split("\n")
    # then
    names = [line.split()[0] for line in lines if re.match(r"  p\d\d ", line)]
    assert names == [f"p{i:02d}" for i in range(15, 3, -1)]
    assert lines[lines.index(next(x for x in lines if x.startswith("  p04"))) + 1] == "  … 3 more"


def test_long_names_are_cut_by_cells_and_not_by_characters(measured: dict[str, Any]) -> None:
    # given names whose characters are two cells wide
    measured["command"] = ["python", "訓練" * 40]
    measured["energy"]["components"][4]["label"] = "gpu:0  計算加速器第一号"
    measured["run_id"] = "r" * 40
    measured["phases"] = [
        {"name": "長い名前" * 20, "count": 3, "duration_s": 60.0, "energy_j": 1e5, "u_j": 3e3}
    ]
    # when
    text = render_run(measured)
    # then the columns still stand below each other
    lines = text.split("\n")
    # the command has 80 - 7 - 23 = 50 cells: 8, 20 wide characters and the ellipsis are 49
    assert lines[0] == "pepr > python '" + "訓練" * 10 + "…   exit 0   14 min 07 s"
    assert lines[5].startswith("  gpu:0  計算加速器…    252.8 ± 9.0 kJ   68.0%")
    assert lines[-2:] == [
        f"  saved {'r' * 40}",
        f"  next: pepr-profile report {'r' * 40}",
    ]
    assert max(map(cell_len, lines)) <= 80
    header, row = lines[12:14]
    ends = [cell_len(header[: header.index(key) + len(key)]) for key in ("share", "count", "time")]
    values = ("26.9%", "  3", "00 s")
    assert [cell_len(row[: row.index(key) + len(key)]) for key in values] == ends


@pytest.mark.parametrize("color", [False, True])
def test_names_can_neither_style_nor_move_nor_break_the_screen(
    measured: dict[str, Any], color: bool
) -> None:
    # given names full of markup, escape codes, line ends, a right-to-left override and a byte
    # that is no text
    evil = "[red]\x1b[31m\r\n\t\u202e\udcff"
    seen = r"[red]\x1b[31m\r\n\t\u202e\udcff"
    measured["command"] = ["./run", evil]
    measured["energy"]["components"][4]["label"] = f"gpu:0  {evil}"
    measured["phases"] = [
        {"name": evil, "count": 1, "duration_s": 1.0, "energy_j": 1e5, "u_j": 3e3}
    ]
    measured["metrics"] = {evil: 1.0}
    measured["missing"] = [{"what": evil, "why": evil, "fix": evil}]
    measured["warnings"] = [{"code": "x", "text": evil, "hint": evil}]
    # when
    text = render_run(measured, color=color)
    # then they are visible, and nothing but line ends and our own codes is left
    plain = ANSI.sub("", text)
    assert plain.split("\n")[0] == f"pepr > ./run '{seen}'   exit 0   14 min 07 s"
    assert f"  {seen}" in plain
    assert f"metrics      accuracy 0.9737 (performance), {seen} 1" in plain
    assert all(character.isprintable() for character in plain.replace("\n", ""))
    assert max(map(cell_len, plain.split("\n"))) <= 80
    text.encode("utf-8")


def test_color_changes_no_character(measured: dict[str, Any]) -> None:
    plain, colored = render_run(measured), render_run(measured, color=True)
    assert "\x1b" not in plain
    assert "\x1b[" in colored
    assert ANSI.sub("", colored) == plain


@pytest.mark.parametrize("width", [30, 50, 79, 81, 100, 200])
def test_no_line_is_wider_than_asked(
    measured: dict[str, Any], modelled: dict[str, Any], width: int
) -> None:
    for summary in (measured, modelled):
        for line in render_run(summary, width=width).split("\n"):
            assert cell_len(line) <= width
            assert line == line.rstrip()


def test_a_wider_terminal_shows_names_in_full_and_48_buckets(measured: dict[str, Any]) -> None:
    measured["energy"]["components"][4]["label"] = "gpu:0  NVIDIA H100 80GB HBM3"
    row = render_run(measured, width=140).split("\n")[5]
    assert row.startswith("  gpu:0  NVIDIA H100 80GB HBM3   252.8 ± 9.0 kJ")
    assert row.endswith("   " + "▁" * 16 + "█" * 16 + "▄" * 16)


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_one_unknown_part_makes_its_row_unknown(
    measured: dict[str, Any], unknown: float | None
) -> None:
    # given one package of two whose counter died
    measured["energy"]["components"][1] |= {"job_j": unknown, "u_j": unknown, "mean_w": unknown}
    # when
    row = render_run(measured).split("\n")[6]
    # then the other package's half is not passed off as the sum
    assert row == "  cpu    2 packages           unknown       ?       ?  ≤164.2   ▄▄▄▄▄▄    ██████"


def test_a_summary_is_only_read(measured: dict[str, Any]) -> None:
    before = copy.deepcopy(measured)
    render_run(measured)
    assert measured == before


@pytest.mark.parametrize(
    ("elapsed_s", "energy_j", "power_w", "line"),
    [
        (42.9, 1_234.0, 29.4, "pepr  00:42  1.234 kJ  29.40 W  estimated"),
        (3_599.9, 371_612.0, 438.6, "pepr  59:59  371.6 kJ  438.6 W  estimated"),
        (3_661.0, None, math.nan, "pepr  1:01:01  unknown  unknown  estimated"),
    ],
)
def test_the_live_line_is_one_line(
    elapsed_s: float, energy_j: float | None, power_w: float, line: str
) -> None:
    energy = {"total_j": energy_j, "mean_w": power_w, "provenance": "modelled"}
    assert render_live(elapsed_s, energy, 80) == line
    assert render_live(elapsed_s, energy, 11) == line[:11].rstrip()


def test_the_live_line_costs_no_heavy_import() -> None:
    # given a fresh interpreter, as it is while the child runs
    code = (
        "import sys\n"
        "from pepr_profiler.report.run_text import render_live\n"
        "render_live(1.0, dict(total_j=2.0, mean_w=3.0, provenance='measured'), 80)\n"
        "print(sorted({'rich', 'numpy'} & set(sys.modules)))\n"
    )
    # when
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # then
    assert done.stdout.strip() == "[]"


def test_a_run_of_an_experiment_leads_to_its_ranking(measured: dict[str, Any]) -> None:
    text = render_run({**measured, "experiment": "my sizes"})
    assert text.splitlines()[-1].endswith("next: pepr-profile compare --experiment 'my sizes'")
    alone = render_run({**measured, "experiment": "my sizes"}, comparable=False)
    assert f"next: pepr-profile report {measured['run_id']}" in alone
