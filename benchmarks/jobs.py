"""One summary of a job of many nodes: seconds, peak memory, and how often its ± holds the truth.

Each node has 8 GPUs, 2 packages with their memory, and 4 ranks with a recording each. A rank has
two GPUs of its own and a quarter of what the job has of the CPUs; it sees all devices. The truth is
known, and recordings differ from it by errors drawn as docs/measurement.md (F) has them: gains are
a board's own and the same in all recordings of it, edges of GPUs are alike, those of others are
drawn anew, and the rule by which CPU time is shared errs alike everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import ROOT, header, judge, main, show

RANKS, GPUS, SOCKETS = 4, 8, 2
BUCKETS = 48
DURATION_S, JITTER_S = 3600.0, 4.0
KINDS = {
    "gpu": {"watts": 350.0, "gain": 0.037, "edges_j": 30.0, "spread": 0.02},
    "cpu": {"watts": 150.0, "gain": 0.03, "edges_j": 3.0, "spread": 0.05},
    "dram": {"watts": 25.0, "gain": 0.15, "edges_j": 1.0, "spread": 0.05},
}
JOB, OTHERS, SHARING = 0.75, 0.05, 0.10
"""Of the CPUs' energy: the job's, others', and how sure that is, of what others had."""
DEVICES = [*(("gpu", i) for i in range(GPUS)), *((k, i) for k in ("cpu", "dram") for i in range(2))]
CAUSES = (
    *("gain_j", "offset_j", "model_j", "edges_j", "duty_j", "lag_j", "quantisation_j", "gaps_j"),
    *("aliasing_j", "attribution_j", "disagreement_j"),
)


class World(NamedTuple):
    """A job as it was, and as its recordings have it."""

    summaries: list[dict[str, Any]]
    truth_j: float


def drawn(nodes: int, rng: np.random.Generator) -> World:
    """A job on some nodes."""
    in_step, sharing = rng.standard_normal(2)
    truths_j: list[float] = []
    summaries = [
        summary
        for node in range(nodes)
        for summary in node_of(node, RANKS * nodes, rng, in_step, sharing, truths_j)
    ]
    return World(summaries, math.fsum(truths_j))


def node_of(
    node: int,
    world_size: int,
    rng: np.random.Generator,
    in_step: float,
    sharing: float,
    truths_j: list[float],
) -> Iterator[dict[str, Any]]:
    """The summaries of a node's ranks; `truths_j` gets what they truly took."""
    busy = 1 + 0.03 * rng.standard_normal()
    count = len(DEVICES)
    facts = [KINDS[kind] for kind, _ in DEVICES]
    watts, gains, edges_u_j, spreads = (
        np.array([fact[name] for fact in facts]) for name in ("watts", "gain", "edges_j", "spread")
    )
    power_w = watts * busy * (1 + spreads * rng.standard_normal(count))
    gain = gains * rng.standard_normal(count)
    is_gpu = np.array([kind == "gpu" for kind, _ in DEVICES])
    parts = rng.dirichlet(np.full(RANKS, 400.0))  # of the CPUs, among the ranks
    for local in range(RANKS):
        begin_s = float(rng.uniform(0, JITTER_S))
        end_s = DURATION_S + float(rng.uniform(0, JITTER_S))
        span_s = end_s - begin_s
        edges = np.where(is_gpu, in_step, rng.standard_normal(count))
        device_j = power_w * span_s * (1 + gain) + edges_u_j * edges
        own = np.array([kind != "gpu" or i // 2 == local for kind, i in DEVICES])
        part = np.where(is_gpu, own.astype(float), JOB * parts[local])
        truths_j += (power_w * span_s * part)[own].tolist()
        part = np.where(is_gpu, part, part * (1 + SHARING * (1 - JOB) * sharing))
        yield summary_of(node, local, world_size, begin_s, end_s, device_j, part, own)


def summary_of(
    node: int,
    local: int,
    world_size: int,
    begin_s: float,
    end_s: float,
    device_j: NDArray[np.float64],
    part: NDArray[np.float64],
    own: NDArray[np.bool_],
) -> dict[str, Any]:
    """What run.json of one rank says, as far as a job's summary reads it."""
    components: list[dict[str, Any]] = []
    variance_j2 = linear_j = 0.0
    span_s = end_s - begin_s
    for i, (kind, index) in enumerate(DEVICES):
        facts = KINDS[kind]
        whole_j, job_j = float(device_j[i]), float(device_j[i] * part[i])
        idle_j = 0.0 if kind == "gpu" else (1 - JOB - OTHERS) * whole_j
        of_job = float(part[i])
        budget = dict.fromkeys(CAUSES, 0.0)
        budget["gain_j"] = facts["gain"] * job_j
        budget["edges_j"] = facts["edges_j"] * of_job
        budget["attribution_j"] = 0.0 if kind == "gpu" else SHARING * (1 - of_job) * job_j
        u_j = 2 * math.hypot(*budget.values())
        ident = f"gpu:GPU-{node:06x}-{index}" if kind == "gpu" else f"{kind}:package-{index}"
        components.append(
            {
                "id": ident, "kind": kind, "label": ident, "source": "powercap",
                "provenance": "measured", "in_total": bool(own[i]), "impossible_readings": 0,
                **({} if own[i] else {"excluded": "was not used by the job"}),
                "device_j": whole_j, "job_j": job_j, "others_j": whole_j - job_j - idle_j,
                "idle_j": idle_j, "idle_w": 30.0, "job_idle_j": 0.2 * job_j, "u_j": u_j,
                "mean_w": whole_j / span_s, "max_w": 1.1 * whole_j / span_s,
                "trace_w": [whole_j / span_s] * BUCKETS, "budget": budget, "cross_check": None,
            }
        )  # fmt: skip
        if own[i]:
            variance_j2 += budget["gain_j"] ** 2
            linear_j += budget["attribution_j"] + budget["edges_j"]
    total_j = math.fsum(c["job_j"] for c in components if c["in_total"])
    begin_ns = int(begin_s * 1e9)
    return {
        "schema": 1, "run_id": f"rank-{node:04d}-{local}", "job": "big", "name": "train",
        "experiment": None, "command": ["python", "train.py"], "host": f"node{node:04d}",
        "boot_id": f"boot-{node:04d}", "node": None, "rank": RANKS * node + local,
        "local_rank": local, "world_size": world_size, "local_world_size": RANKS,
        "launcher": "torchrun", "attempt": 0,
        "clock": [{"t_ns": 0, "unix_ns": 1_790_000_000 * 10**9}], "started_at": "2026-11-30",
        "duration_s": span_s, "time_s": span_s, "exit_code": 0, "signal": None, "complete": True,
        "energy": {
            "total_j": total_j, "u_j": 2 * math.hypot(math.sqrt(variance_j2), linear_j),
            "mean_w": total_j / span_s, "provenance": "measured", "scope": "job", "partial": [],
            "components": components,
        },
        "phases": [], "memory": {"peak_rss_bytes": 4 << 30, "gpu_peak_bytes": 120 << 30},
        "carbon": None, "metrics": {"accuracy": 0.9}, "progress": None, "sampler": {"cpu_s": 1.0},
        "performance": {"metric": "accuracy", "value": 0.9}, "missing": [], "warnings": [],
        "recording": {"window_ns": [begin_ns, int(end_s * 1e9)], "outer": None},
    }  # fmt: skip


class Held(NamedTuple):
    """How an estimate did over some draws."""

    covered: float
    times: float  # u over twice the rms error: 1 is right, 2 is twice as wide as need be

    @classmethod
    def of(cls, errors_j: list[float], us_j: list[float]) -> Held:
        errors, us = np.array(errors_j), np.array(us_j)
        inside = float(np.mean(np.abs(errors) <= us))
        return cls(inside, float(np.mean(us) / 2 / np.sqrt(np.mean(errors**2))))


def held(nodes: int, draws: int, lost: float, seed: int) -> tuple[Held, Held | None]:
    """How often the total's ± holds the truth, and that of the estimate where some are lost."""
    from pepr_profiler.study.jobs import JobRecordings

    rng = np.random.default_rng(seed)
    whole: tuple[list[float], list[float]] = ([], [])
    estimate: tuple[list[float], list[float]] = ([], [])
    for _ in range(draws):
        world = drawn(nodes, rng)
        recordings = [JobRecordings.of(summary) for summary in world.summaries]
        energy = JobRecordings().merged_with(*recordings).summary()["energy"]
        whole[0].append(energy["total_j"] - world.truth_j)
        whole[1].append(energy["u_j"])
        gone = round(lost * len(recordings))
        if not gone:
            continue
        kept = rng.permutation(len(recordings))[gone:]
        energy = JobRecordings().merged_with(*(recordings[i] for i in kept)).summary()["energy"]
        estimate[0].append(energy["imputed"]["total_j"] - world.truth_j)
        estimate[1].append(energy["imputed"]["u_j"])
    return Held.of(*whole), Held.of(*estimate) if estimate[0] else None


MERGE = """
import json, resource, sys, time
from pathlib import Path
from pepr_profiler.study.jobs import JobRecordings
began, began_cpu = time.perf_counter(), time.process_time()
parts = []
for path in sorted(Path(sys.argv[1]).iterdir()):
    parts.append(JobRecordings.of(json.loads(path.read_bytes())))
read_s, began = time.perf_counter() - began, time.perf_counter()
summary = JobRecordings().merged_with(*parts).summary()
merge_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
energy = summary["energy"]
print(json.dumps({"read_s": read_s, "merge_s": merge_s, "cpu_s": cpu_s,
                  "peak_mb": peak_kb * 1024 / 1e6, "total_j": energy["total_j"],
                  "u_j": energy["u_j"], "n": len(parts)}))
"""
"""A process of its own: its peak is that of reading and merging, not that of making them up."""


def merged(folder: Path, nodes: int, seed: int) -> dict[str, float]:
    """Reads and merges a job's summaries from files; the truth is added."""
    world = drawn(nodes, np.random.default_rng(seed))
    for summary in world.summaries:
        (folder / f"{summary['run_id']}.json").write_text(json.dumps(summary))
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(folder)], check=True, cwd=ROOT, capture_output=True
    )
    return {**json.loads(done.stdout), "truth_j": world.truth_j}


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--lost", type=float, default=0.05, help="part of the recordings")
    parser.add_argument("--covered", type=int, nargs="*", default=[1, 5, 20], help="nodes of draws")
    parser.add_argument("--seed", type=int, default=20261130)
    given = parser.parse_args()
    header("One summary of a job of many nodes")
    with TemporaryDirectory() as folder:
        result = merged(Path(folder), given.nodes, given.seed)
    what = f"{given.nodes} nodes, {result['n']:,} recordings"
    show(f"{what}: read from files", result["read_s"], "s")
    show(f"{what}: merged", result["merge_s"], "s")
    judge(f"{what}: both, CPU time", result["cpu_s"], "s", most=5)
    judge(f"{what}: peak memory", result["peak_mb"], "MB", most=500)
    off_j = abs(result["total_j"] - result["truth_j"])
    show("its u (k = 2), of the total", result["u_j"] / result["total_j"], "%", scale=100)
    show("its error, over that u", off_j / result["u_j"], "")
    for nodes in given.covered:
        whole, estimate = held(nodes, given.draws, given.lost, given.seed + nodes)
        cases = [("", whole)]
        if estimate is not None:
            cases.append((f", {given.lost:.0%} lost", estimate))
        for case, found in cases:
            name = f"{nodes} nodes, {given.draws} draws{case}: ± holds"
            judge(name, found.covered, "%", scale=100, least=93)
            judge(name, found.covered, "%", scale=100, most=97)
            show(f"{nodes} nodes{case}: u over 2 rms error", found.times, "")


if __name__ == "__main__":
    main(measure)
