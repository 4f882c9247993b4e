"""What is printed, on terminals and in files of any encoding and any kind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import SLOW_S, Cli, made_locale, python, write_meter
from daemons import Daemon, daemon

from pepr_profiler import _core
from pepr_profiler.commands import COMMANDS, moves_cursor
from pepr_profiler.errors import SensorError
from pepr_profiler.report.text import encode_readably

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "C": C_LOCALE,
}
ENCODINGS = {"C": "ascii"}
SUBCOMMANDS = {
    "runs": ("list", "show", "set", "rm", "export"),
    "daemon": ("status", "stop"),
}
SCREENS = (
    *(("report", "last"), ("runs", "list"), ("runs", "show", "last")),
    *(("compare", "--experiment", "größe"), ("sensors",), ("--", "nö"), ("attach", "nö")),
)
"""What is printed most."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A store with two runs of the experiment "größe", and a table."""
    cli = Cli(tmp_path_factory.mktemp("größe"))
    meter = write_meter(cli.folder / "meter–1", 100)
    for name, accuracy in (("modèle–50", 0.9), ("±b", 0.8)):
        command = ("--", "sh", "-c", f"echo acc {accuracy}; sleep 0.05")
        options = ("--sensor", meter, "--name", name, "--experiment", "größe")
        result = cli(*options, "--metric", "acc=acc ([0-9.]+)", *command)
        assert result.status == 0, result.stderr
    (cli.folder / "t.csv").write_text("model,größe,acc\nrésnet–50,100,0.9\n±b,50,0.8\n")
    return cli


def printed(cli: Cli, *arguments: str, environment: str) -> str:
    """Both outputs, as a reader of that encoding sees them."""
    result = cli(*arguments, env=ENVIRONMENTS[environment], stderr=subprocess.STDOUT)
    data = "-" in arguments  # which is UTF-8
    text = result.stdout.decode("utf-8" if data else ENCODINGS.get(environment, environment))
    assert "Traceback" not in text, text
    return text


def commands_on(cli: Cli) -> Iterator[tuple[str, ...]]:
    """Every command at least once, with errors that name what is not ASCII."""
    folder, meter = cli.folder, f"replay:{cli.folder / 'meter–1'}"
    score = ("score", str(folder / "t.csv"), "--performance")
    yield from (("report", "last"), ("report", "nö–"), ("report", "last", "-o", "x.nö"))
    yield from (("report", "last", "-o", str(folder / "ö.html")), ("report", "last", "--json", "-"))
    yield from (("runs", "list"), ("runs", "list", "--json"), ("runs", "show", "last"))
    yield from (("runs", "set", "last", "größe=1"), ("runs", "set", "last", "nö"))
    yield from (("runs", "rm", "nö"), ("runs", "list", "--name", "nö"))
    yield ("runs", "export", str(folder / "ö.csv"))
    yield from (("compare", "--experiment", "größe"), ("compare", "--experiment", "nö"))
    yield ("compare", "--experiment", "größe", "--json", "-")
    yield from ((*score, "acc", "--resource", "größe"), (*score, "nö", "--resource", "größe"))
    yield from (("sensors",), ("sensors", "--sensor", meter), ("sensors", "--sensor", "replay:/nö"))
    yield ("run", "--sensor", meter, "--name", "modèle", "--", "true")
    yield ("run", "--store", str(folder / "ö"), "--sensor", meter, "--", "true")
    yield from (("--", "nö"), ("--sensor", "nö", "--", "true"), ("--region", "nö", "--", "true"))
    yield from (("--metric", "é=(", "--", "true"), ("--cpu-power", "nö", "--", "true"), ("--nö",))
    yield from (("attach", "nö"), ("attach", "999999999"), ("nö",), ("mark", "é"))
    yield ("attach", "--duration", "0.1s", "--sensor", meter, "--name", "ü", str(os.getpid()))
    yield from (("daemon", "status"), ("daemon", "--socket", str(folder / "ö"), "status"))


@pytest.mark.parametrize(
    ("environment", "every"),
    [
        *((name, name == "C") for name in ENVIRONMENTS),  # all fail in the same place, if at all
        *(pytest.param(name, True, marks=pytest.mark.long) for name in ENVIRONMENTS),
    ],
)
def test_no_command_fails_where_its_text_cannot_be_encoded(
    recorded: Cli, environment: str, every: bool
) -> None:
    for arguments in commands_on(recorded) if every else SCREENS:
        printed(recorded, *arguments, environment=environment)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_plain_on_an_ascii_stdout(recorded: Cli, command: str) -> None:
    for sub in ("", *SUBCOMMANDS.get(command, ())):
        words = [word for word in (command, sub) if word]
        text = printed(recorded, *words, "--help", environment="ascii")
        assert text.startswith("Usage: pepr-profile")
        assert "\\u" not in text  # an escape where we have a plain word


def test_daemon_status_is_plain_on_an_ascii_stdout(cli: Cli, open_folder: Path) -> None:
    with daemon(open_folder, "--sensor", write_meter(cli.folder / "meter–1", 100)) as running:
        assert isinstance(running, Daemon)
        text = printed(cli, "daemon", "--socket", str(running.socket), "status", environment="C")
    assert "client(s)" in text


@pytest.mark.parametrize("environment", ["ascii", "C"])
def test_ascii_text_keeps_its_numbers_names_and_columns(recorded: Cli, environment: str) -> None:
    # given the report as a UTF-8 terminal has it
    usual = recorded("report", "last").stdout.decode().splitlines()

    # when it is printed in ASCII
    plain = printed(recorded, "report", "last", environment=environment).splitlines()

    # then every line has the same words, and columns begin where they began
    assert len(plain) == len(usual)
    for ours, theirs in zip(plain, usual, strict=True):
        shown = theirs.replace("±", "+/-").replace("µ", "u").replace("…", "...")
        shown = shown.replace("≤", "<=").replace("–", "-")
        shown = "".join(c if c not in "éöß" else f"\\x{ord(c):x}" for c in shown)
        blocks = [word for word in shown.split() if not word.isascii()]
        assert all(set(word) <= set("▁▂▃▄▅▆▇█") for word in blocks), blocks
        kept = ours.split()
        assert [w for w in shown.split() if w.isascii()] == kept[: len(kept) - len(blocks)]
    heads = next(line for line in usual if "mean W" in line)
    [row] = [line for line in plain if line.startswith("  gpu ")]
    assert next(line for line in plain if "mean W" in line) == heads
    assert row[: heads.index("mean W") + len("mean W")].endswith("100.00")


def test_latin1_keeps_what_it_has(recorded: Cli) -> None:
    text = printed(recorded, "runs", "list", environment="latin-1")

    assert "±" in text  # ISO-8859-1 has it
    assert "modèle-50" in text  # and è, but no en dash


def test_names_are_the_same_in_every_locale(tmp_path: Path) -> None:
    # given a run that is recorded and filtered in the C locale
    cli = Cli(tmp_path)
    meter = write_meter(tmp_path / "größe", 100)
    options = ("--sensor", meter, "--name", "modèle–1", "--experiment", "größe", "--job", "é")
    result = cli("run", *options, "--", "echo", "ü", env=C_LOCALE)
    assert result.status == 0, result.stderr
    assert cli("runs", "set", "last", "größe=2", env=C_LOCALE).status == 0
    listed = cli("runs", "list", "--experiment", "größe", "--json", env=C_LOCALE)

    # then its facts are text, and the child had its argument as it was
    [run] = json.loads(listed.stdout)["runs"]
    facts = [run[key] for key in ("name", "experiment", "job")]
    assert facts == ["modèle–1", "größe", "é"]
    assert run["command"] == ["echo", "ü"]
    assert run["metrics"] == {"größe": 2}
    assert result.stdout.decode() == "ü\n"
    assert cli.report(cli.runs()[0])["name"] == "modèle–1"


def test_files_stay_utf8_whatever_the_terminal_is(recorded: Cli, tmp_path: Path) -> None:
    run = next(path.name for path in recorded.runs() if path.name.startswith("b-"))
    for environment, variables in ENVIRONMENTS.items():
        for name in ("runs.csv", "runs.jsonl", "page.html"):
            path = tmp_path / name
            command = ("report", run, "-o") if name == "page.html" else ("runs", "export")
            assert recorded(*command, str(path), env=variables).status == 0
            text = path.read_text(encoding="utf-8")
            assert "±b" in text or "\\u00b1b" in text, (environment, name)
        summary = recorded("report", run, "--json", "-", env=variables)
        assert json.loads(summary.stdout)["name"] == "±b"
        ranking = recorded("compare", "--experiment", "größe", "--json", "-", env=variables)
        assert "modèle–50" in ranking.stdout.decode("utf-8")
        rows = recorded("runs", "export", "-", "--format", "csv", env=variables)
        assert "modèle–50" in rows.stdout.decode("utf-8")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "a +/- b  x\nu ... - <= EUR\\xe9 \\u4e2d"),
        ("latin-1", "a ± b    x\nµ ... - <= EURé \\u4e2d"),
        ("cp1252", "a ± b    x\nµ … – <= €é \\u4e2d"),
        ("utf-8", "a ± b    x\nµ … – ≤ €é 中"),
    ],
)
def test_each_letter_is_kept_where_the_encoding_has_it(encoding: str, shown: str) -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding=encoding, newline="")
    encode_readably(stream)
    encode_readably(stream)  # as often as a program likes

    stream.write("a ± b    x\nµ … – ≤ €é 中")
    stream.flush()

    assert data.getvalue().decode(encoding) == shown


def test_names_of_any_bytes_are_printed(recorded: Cli) -> None:
    for environment in ("ascii", "C", "latin-1"):
        env = recorded.environment(ENVIRONMENTS[environment])
        command = [sys.executable.encode(), b"-m", b"pepr_profiler", b"report", b"n\xff\xfe"]
        done = subprocess.run(command, env=env, capture_output=True, timeout=SLOW_S, check=False)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr


def on_terminal(cli: Cli, *arguments: str, **variables: str) -> bytes:
    """What a command writes to a terminal that is its stdout."""
    master, slave = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as reader:
        cli(*arguments, stdout=slave, env=variables)
        os.close(slave)
        data = b""
        while True:
            try:
                part = reader.read(1 << 16)
            except OSError:  # all that wrote to it have closed it
                return data
            if not part:
                return data
            data += part


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "unknown"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, False),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
@pytest.mark.parametrize("command", [("report", "last"), ("compare", "--experiment", "größe")])
def test_colours_are_for_terminals_that_have_them(
    recorded: Cli, variables: dict[str, str], coloured: bool, command: tuple[str, ...]
) -> None:
    assert (b"\x1b[" in on_terminal(recorded, *command, **variables)) is coloured


@pytest.mark.parametrize(("value", "coloured"), [(None, False), ("", False), ("1", True)])
def test_colours_in_a_file_are_asked_for(recorded: Cli, value: str | None, coloured: bool) -> None:
    for command in (("report", "last"), ("compare", "--experiment", "größe")):
        env = {} if value is None else {"FORCE_COLOR": value}
        assert (b"\x1b[" in recorded(*command, env=env).stdout) is coloured


@pytest.mark.parametrize(("term", "moves"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_live_line_is_for_terminals_that_move_the_cursor(
    monkeypatch: pytest.MonkeyPatch, term: str, moves: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb"):
        assert moves_cursor(terminal) is moves
    with Path(os.devnull).open("w") as no_terminal:
        assert not moves_cursor(no_terminal)


def test_paths_in_errors_may_hold_any_bytes() -> None:
    with pytest.raises(SensorError) as caught:
        _core.Sampler(os.fsdecode(b"replay:/n\xff"), 10**9).wait_ready(SLOW_S)

    assert caught.value.what == "replay file '/n\\xff' cannot be read"


OTHER_LOCALE = """
import locale, sys
locale.setlocale(locale.LC_ALL, "fr_FR.ISO-8859-1")
from pepr_profiler import _core
from pepr_profiler.errors import SensorError
for spec in ("replay:/nothing", "nvml:/nothing", "hwmon:/nothing"):
    try:
        _core.Sampler(spec, 10**9).wait_ready(10)
    except SensorError as error:
        print(ascii(error.why))
"""


def test_messages_are_readable_in_a_program_of_another_language(tmp_path: Path) -> None:
    # given a program in French and ISO-8859-1, where strerror gives bytes that are no UTF-8
    env = {**os.environ, **made_locale(tmp_path, "fr_FR", "ISO-8859-1")}
    env.pop("LC_ALL")
    done = subprocess.run(
        python(OTHER_LOCALE), env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.strip("'").rpartition(": ")[2] for line in lines] == 3 * [
        "No such file or directory"
    ]
