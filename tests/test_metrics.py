"""A metric is found wherever the command puts it, and a missing one is said, never invented."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from cli import Cli, calls_of, ended, python, write_meter

from pepr_profiler.errors import UsageError
from pepr_profiler.recording.metrics import MetricPoint, Metrics

ACCURACY = "accuracy=test acc: ([0-9.]+)"


def found(metrics: Metrics, *chunks: bytes) -> list[float]:
    """The values in `chunks`, read one after the other and followed by the end of the output."""
    for t_ns, chunk in enumerate(chunks):
        metrics.feed(1, chunk, t_ns)
    metrics.finish()
    return [point.value for point in metrics.take()]


def codes(warnings: list[dict[str, str]]) -> list[str]:
    assert all(warning["text"] and warning["hint"] for warning in warnings)
    return [warning["code"] for warning in warnings]


# --- the request ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("accuracy", "not NAME=REGEX"),
        ("accuracy=", "not NAME=REGEX"),
        ("=acc: (.*)", "cannot name a metric"),
        ("9lives=(.*)", "cannot name a metric"),
        ("top 1=(.*)", "cannot name a metric"),
        ("acc=acc: ([0-9.]+", "missing ), unterminated subpattern"),
        ("acc=(a)(b)", "2 groups"),
    ],
)
def test_pattern_that_cannot_work_is_refused_with_a_remedy(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        Metrics([text])
    assert caught.value.fix


def test_broken_pattern_is_shown_where_it_breaks() -> None:
    with pytest.raises(UsageError) as caught:
        Metrics(["acc=test [0-9.+"])

    *_, pattern, pointer = caught.value.why.splitlines()
    assert pattern[pointer.index("^") :] == "[0-9.+"


@pytest.mark.parametrize("text", ["r.json", "r.json:", ":acc", "a:b:c:d", "r.json:0.acc"])
def test_metric_file_that_cannot_work_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(UsageError, match="--metric-file") as caught:
        Metrics([], [text])
    assert caught.value.fix


def test_one_name_for_two_values_is_refused() -> None:
    with pytest.raises(UsageError, match="'acc' is asked for 2 times"):
        Metrics(["acc=a: (.*)"], ["r.json:test.accuracy:acc"])


# --- in the output -------------------------------------------------------------------------------


def test_every_match_is_kept_in_order_with_its_time() -> None:
    # given two metrics
    metrics = Metrics([ACCURACY, "loss=loss ([0-9.e-]+)"])

    # when three epochs are printed, the first in two pieces
    metrics.feed(1, b"epoch 1 loss 0.5 test a", 10)
    metrics.feed(1, b"cc: 0.7\nepoch 2 loss 2", 20)
    metrics.feed(1, b"e-1 test acc: 0.8\nno number here\n", 30)

    # then a curve of each exists
    assert metrics.take() == [
        MetricPoint(20, "accuracy", 0.7),
        MetricPoint(20, "loss", 0.5),
        MetricPoint(30, "accuracy", 0.8),
        MetricPoint(30, "loss", 0.2),
    ]
    assert metrics.take() == []
    assert metrics.finish() == []


def test_without_a_group_the_whole_match_is_the_value() -> None:
    assert found(Metrics([r"acc=(?<=acc=)\S+"]), b"acc=0.25\n") == [0.25]


def test_output_cut_anywhere_gives_the_same_values() -> None:
    # given a training's output with colours, a progress bar and text in several scripts
    values = [round(0.5 + 0.01 * i, 2) for i in range(40)]
    output = b"".join(
        f"\r 50%|██▌  | nan\r\x1b[2K\x1b[32mÉpoque\x1b[0m test \x1b[1macc: {value}\r\n".encode()
        for value in values
    )

    # when it arrives in pieces of any length
    for seed in range(50):
        generator = random.Random(seed)
        cuts = sorted(generator.sample(range(len(output)), 60))
        chunks = [output[a:b] for a, b in zip([0, *cuts], [*cuts, len(output)], strict=True)]

        # then
        assert found(Metrics([ACCURACY]), *chunks) == values


def test_links_titles_and_cursor_moves_are_not_part_of_the_line() -> None:
    line = (
        b"\x1b]0;title test acc: 9\x07test \x1b]8;;http://x\x1b\\acc\x1b]8;;\x1b\\"
        b": \x1b[A0.5\x1b(B\x1b[K"
    )

    assert found(Metrics([ACCURACY]), line) == [0.5]


def test_progress_bar_is_as_old_as_its_text_not_as_the_next_one() -> None:
    # given tqdm's way of writing: the carriage return comes first
    metrics = Metrics([ACCURACY])

    metrics.feed(1, b"\rtest acc: 0.1", 100)
    metrics.feed(1, b"\rtest acc: 0.2", 200)
    metrics.finish()

    assert [(point.t_ns, point.value) for point in metrics.take()] == [(100, 0.1), (200, 0.2)]


def test_channels_do_not_mix() -> None:
    # given stdout and stderr, each in the middle of a line
    metrics = Metrics([ACCURACY])

    metrics.feed(1, b"test ac", 1)
    metrics.feed(2, b"c: 0.9\ntest acc", 2)
    metrics.feed(1, b"c: 0.1\n", 3)
    metrics.feed(2, b": 0.2\n", 4)

    assert [point.value for point in metrics.take()] == [0.1, 0.2]


def test_undecodable_bytes_hide_nothing_and_break_nothing() -> None:
    everything = bytes(range(256)) * 8

    assert found(Metrics([ACCURACY]), everything, b"\n\xfftest acc: 0.5\xff\n") == [0.5]


def test_endless_line_costs_bounded_memory_and_yields_no_truncated_number() -> None:
    # given 64 MiB without a newline in which a number straddles every border there could be
    metrics = Metrics(["value=^[0-9]{9}", ACCURACY])
    chunk = b"7" * 65536

    # when
    tracemalloc.start()
    for _ in range(1024):
        metrics.feed(1, chunk, 0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    metrics.feed(1, b" test acc: 0.5\n", 0)

    # then the digits that are left of the number are not taken for it; what follows is found
    assert peak_bytes < 1_000_000
    assert [(p.name, p.value) for p in metrics.take()] == [("accuracy", 0.5)]
    assert found(Metrics([ACCURACY]), *[chunk] * 3, b" test acc: 0.5\n") == [0.5]


def test_many_lines_are_cheap() -> None:
    # given 100,000 lines as a verbose training prints them
    lines = [b"step %d loss 0.123 lr 0.001 throughput 812.5 img/s\n" % i for i in range(100_000)]
    data = b"".join(lines)
    metrics = Metrics([ACCURACY, "loss=val loss ([0-9.]+)"])

    # when
    def feed() -> None:
        for start in range(0, len(data), 65536):
            metrics.feed(1, data[start : start + 65536], 0)

    # then a line takes ten calls: 1000 lines a second cost less than 1 % of a core
    assert calls_of(feed) < 12 * len(lines)


def test_pattern_that_never_matches_is_said_with_the_way_out() -> None:
    metrics = Metrics([ACCURACY])
    metrics.feed(1, b"val acc: 0.5\n", 0)

    (warning,) = metrics.finish()

    assert codes([warning]) == ["metric-never-matched"]
    assert "test acc: ([0-9.]+)" in warning["text"]
    assert "pepr-profile runs set RUN accuracy=VALUE" in warning["hint"]


@pytest.mark.parametrize("text", ["0.9.", "n/a", "95%", "nan", "inf", "0,9", ""])
def test_match_that_is_no_number_is_counted_and_shown(text: str) -> None:
    # given one good and two bad matches
    metrics = Metrics(["acc=acc: ?(.*)"])
    metrics.feed(1, f"acc: 0.5\nacc: {text}\nacc: {text}\n".encode(), 0)

    (warning,) = metrics.finish()

    assert codes([warning]) == ["metric-not-a-number"]
    assert "2 of 3" in warning["text"]
    assert repr(text) in warning["text"]
    assert [point.value for point in metrics.take()] == [0.5]


# --- in files ------------------------------------------------------------------------------------


def value_in(path: Path, key: str) -> float | str:
    """What a run gets that writes `path` after its start: the value, or the warning's code."""
    text = path.read_bytes()
    path.unlink()
    metrics = Metrics([], [f"{path}:{key}:it"])
    path.write_bytes(text)
    warnings = metrics.finish()
    points = metrics.take()
    assert len(warnings) + len(points) == 1
    return points[0].value if points else codes(warnings)[0]


TREE: dict[str, Any] = {
    "accuracy": 0.9,
    "test": {"acc": 0.8, "top.5": 0.95, "text": "0.7"},
    "test.f1": 0.6,
    "history": [{"acc": 0.1}, {"acc": 0.2}],
    "true": True,
    "bad": "high",
    "nan": float("nan"),
    "none": None,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accuracy", 0.9),
        ("test.acc", 0.8),
        ("test.top.5", 0.95),
        ("test.text", 0.7),
        ("test.f1", 0.6),
        ("history.0.acc", 0.1),
        ("history.-1.acc", 0.2),
        ("absent", "metric-key-missing"),
        ("test.absent", "metric-key-missing"),
        ("accuracy.deeper", "metric-key-missing"),
        ("history.7.acc", "metric-key-missing"),
        ("history.acc", "metric-key-missing"),
        ("test", "metric-not-a-number"),
        ("true", "metric-not-a-number"),
        ("bad", "metric-not-a-number"),
        ("nan", "metric-not-a-number"),
        ("none", "metric-not-a-number"),
    ],
)
def test_json_is_read_by_dotted_path(tmp_path: Path, key: str, value: float | str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(TREE, indent=2))

    assert value_in(path, key) == value


@pytest.mark.parametrize("name", ["log.jsonl", "log.json", "log.txt"])
def test_last_line_with_the_key_counts_in_json_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = [{"epoch": 1, "acc": 0.5}, {"epoch": 2, "acc": 0.6, "note": "a\u2028b"}, {"event": 1}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    assert value_in(path, "acc") == 0.6
    assert value_in(path, "loss") == "metric-key-missing"


@pytest.mark.parametrize(("name", "delimiter"), [("log.csv", ","), ("log.tsv", "\t")])
def test_last_row_with_a_value_counts_in_a_table(tmp_path: Path, name: str, delimiter: str) -> None:
    # given Lightning's habit: rows of training leave the column of the test empty
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [["epoch", "a, test\nacc"], [1, 0.5], [2, 0.75], [3, ""]]
        )

    assert value_in(path, "a, test\nacc") == 0.75
    assert value_in(path, "epoch") == 3
    assert value_in(path, "absent") == "metric-key-missing"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", b""),
        ("r.json", b'{"acc": 0.9'),
        ("r.json", b'{\n"acc": 0.9,\n'),
        ("r.jsonl", b'{"acc": 0.9}\n{"acc": 0.'),
        ("r.json", b"[" * 100_000),
        ("r.csv", b'acc\n"0.9'),
    ],
)
def test_malformed_file_is_said_and_its_older_values_are_not_used(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    assert value_in(path, "acc") == "metric-file-malformed"


def test_missing_key_says_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    metrics = Metrics([], [f"{path}:test.accuracy"])
    path.write_text(json.dumps(TREE))

    (warning,) = metrics.finish()

    assert "acc, top.5, text" in warning["text"]


def test_file_that_is_none_is_said_and_does_not_block(tmp_path: Path) -> None:
    # given nothing, a folder, a FIFO nobody writes to, and text that is not UTF-8
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    names = ["absent", "folder", "fifo", "binary"]
    metrics = Metrics([], [f"{tmp_path / name}:acc:{name}" for name in names])
    (tmp_path / "binary").write_bytes(b'{"acc": "\xff"}')

    # then each is a warning
    assert codes(metrics.finish()) == ["metric-file-missing", *["metric-file-unreadable"] * 3]
    assert metrics.take() == []


def test_file_of_an_earlier_run_is_stale_until_it_is_written_again(tmp_path: Path) -> None:
    # given a file from before the start
    path = tmp_path / "results.json"
    path.write_text('{"acc": 0.9}')

    # when the run does not touch it, then it is not used
    untouched = Metrics([], [f"{path}:acc"])
    (warning,) = untouched.finish()
    assert codes([warning]) == ["metric-file-stale"]
    assert untouched.take() == []

    # when another process writes it, even with the same content and an older time, then it is
    rewritten = Metrics([], [f"{path}:acc"])
    program = (
        "import os, sys; open(sys.argv[1], 'w').write(sys.argv[2]); os.utime(sys.argv[1], (0, 0))"
    )
    subprocess.run([sys.executable, "-c", program, path, '{"acc": 0.9}'], check=True)
    assert rewritten.finish() == []
    assert [(point.name, point.value) for point in rewritten.take()] == [("acc", 0.9)]


def test_watched_file_gives_a_curve_and_each_value_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pepr_profiler.recording.metrics._WATCH_SHARE", 0)  # no look is put off
    # given a file that is written again and again, and one that is none
    path = tmp_path / "results.json"
    os.mkfifo(tmp_path / "fifo")
    metrics = Metrics([], [f"{path}:acc", f"{tmp_path / 'fifo'}:acc:fifo"])
    metrics.watch()
    for text in (
        '{"acc": 0.5}',
        '{"acc": 0.5, "lo',
        '{"acc": 0.75}',
        '{"loss": 1}',
        '{"acc": 1.0}',
    ):
        path.write_text(text)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # however coarse its clock is
        metrics.watch()
    # then half a file and one without the key are nothing, and the end adds only what is new
    assert [point.value for point in metrics.take()] == [0.5, 0.75, 1.0]
    assert codes(metrics.finish()) == ["metric-file-unreadable"]
    assert metrics.take() == []
    path.write_text('{"acc": 0.25}')
    metrics.finish()
    assert [point.value for point in metrics.take()] == [0.25]


def test_watching_a_fifo_does_not_let_its_writer_go_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    metrics = Metrics([], [f"{tmp_path / 'fifo'}:acc"])
    metrics.watch()
    with pytest.raises(OSError, match="No such device"):  # ENXIO: nobody reads
        os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)


def test_relative_path_means_the_folder_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = Metrics([], ["results.json:acc"])
    Path("results.json").write_text('{"acc": 0.5}')
    monkeypatch.chdir("/")

    assert metrics.finish() == []
    assert [point.value for point in metrics.take()] == [0.5]


# --- in bounds ------------------------------------------------------------------------------------


def test_a_pattern_that_goes_back_and_tries_again_is_searched_all_the_same() -> None:
    """On 40 characters it held all threads for 10 minutes; three long lines took 67 s."""
    metrics = Metrics([r"acc=(?:a+)+b ([0-9]+)"])
    metrics.feed(1, b"a" * 40 + b"c b\n" + b"a" * 20 + b"b 17\n", 1)
    assert [point.value for point in metrics.take()] == [17.0]
    begun_s = time.thread_time()
    metrics.feed(1, 300 * (b"b " + b"a" * 60_000 + b"\n"), 1)
    assert time.thread_time() - begun_s < 20
    (warning,) = metrics.finish()
    assert warning["code"] == "metric-too-slow"
    assert "60,002 characters" in warning["text"]


def test_a_pattern_that_cannot_be_bounded_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="could take for ever"):
        Metrics([r"acc=(?:(a+)\1)+b"])


def test_signals_are_heard_while_a_slow_pattern_is_searched(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    line = (
        "import sys, time; print('b ' + 'a' * 60_000, flush=True); print('on', flush=True); " * 20
    )
    pattern = ("--metric", r"acc=(?:a+)+b ([0-9]+)")
    command = python(line + "time.sleep(100)")
    with ended(
        cli.start(*pattern, "--sensor", write_meter(tmp_path / "m", 5), "--", *command)
    ) as run:
        assert run.stdout is not None
        while run.stdout.readline() != b"on\n":
            pass
        begun_s = time.monotonic()
        run.terminate()
        run.communicate(timeout=60)
        assert run.returncode == 143
        assert time.monotonic() - begun_s < 30


@pytest.mark.parametrize("chunks", [60, pytest.param(200, marks=pytest.mark.long)])
def test_a_metric_in_every_line_takes_bounded_memory_and_disk(chunks: int) -> None:
    """60,000 values; the first and last, the best and worst, and an even sample are kept."""
    metrics = Metrics(["x=([0-9.]+)", "loss=loss ([0-9.]+)"])
    points = []
    tracemalloc.start()
    for chunk in range(chunks):
        lines = (f"loss {(i * 7919) % 1_000_003}" for i in range(chunk * 1000, chunk * 1000 + 1000))
        metrics.feed(1, "\n".join(lines).encode() + b"\n", chunk * 1_000_000)
        if chunk % 20 == 19:
            points += metrics.take()
    warnings = metrics.finish()
    points += metrics.take()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 20_000_000
    values = [point.value for point in points if point.name == "loss"]
    assert len(values) < 25_000
    truth = [(i * 7919) % 1_000_003 for i in range(1000 * chunks)]
    assert values[0] == truth[0] and values[-1] == truth[-1]
    assert min(values) == min(truth) and max(values) == max(truth)
    assert values[:1000] == truth[:1000]
    times = [point.t_ns for point in points if point.name == "loss"]
    assert times == sorted(times)
    late = [t for t in times if t >= chunks * 500_000]
    assert max(b - a for a, b in itertools.pairwise(late)) <= 2_000_000  # even: no hole
    assert [warning["code"] for warning in warnings] == ["metric-thinned", "metric-thinned"]


def test_a_rare_value_is_kept_at_once_and_a_held_one_after_a_while() -> None:
    metrics = Metrics(["x=x ([0-9]+)"])
    for second in range(3000):
        metrics.feed(1, f"x {second}\n".encode(), second * 1_000_000_000)
    kept = {point.value for point in metrics.take()}
    assert set(range(1000)) <= kept
    assert max(kept) >= 2989  # nothing is held back for more than 10 s


@pytest.mark.parametrize("pattern", ["acc=test acc: ([0-9.]+)", "acc=(?i)test acc: ([0-9.]+)"])
def test_lines_without_a_match_cost_next_to_nothing(pattern: str) -> None:
    """In calls a line; a chunk of 64 KB is looked at as a whole."""
    metrics = Metrics([pattern])
    chunk = b"step 1 loss 0.1\n" * 4096

    def feed() -> None:
        for _ in range(100):
            metrics.feed(1, chunk, 0)

    assert calls_of(feed) < 100 * 60


def test_lines_among_others_are_found_as_if_alone() -> None:
    """Whatever lies beside them, in the order of the lines, each once for each match."""
    draw = random.Random(3)
    words = [
        b"test acc: 0.5",
        b"loss 3",
        b"\x1b[32mtest ac\x1b[0mc: 0.25",
        b"\xff\xfe",
        b"",
        b"x\r",
    ]
    for _ in range(300):
        lines = [draw.choice(words) for _ in range(draw.randint(1, 30))]
        data = b"\n".join(lines) + b"\n"
        together, alone = Metrics([ACCURACY, "loss=loss ([0-9])"]), []
        together.feed(1, data, 1)
        for line in re.split(rb"[\r\n]", data):
            one = Metrics([ACCURACY, "loss=loss ([0-9])"])
            one.feed(1, line + b"\n", 1)
            alone += one.take()
        assert together.take() == alone


@pytest.mark.parametrize("regex", [r"(?<=a)\n", "a\nb", r"\r", r"\n+"])
def test_a_pattern_with_a_line_end_matches_no_line_and_does_not_hang(regex: str) -> None:
    assert found(Metrics([f"x={regex}"]), b"a\nb\n\na\r\nb\n") == []
