"""The daemon's numbers as metrics, for Prometheus and what understands its formats.

Whoever can reach a port is nobody in particular, so it is told what unprivileged clients are: the
meter reads the coarse rings. Scrapers are served by threads of their own, which ask the daemon's
one thread for its numbers and never touch a lane: how slow a scraper is, is its own affair.
"""

from __future__ import annotations

import errno
import os
import socket
import socketserver
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import isnan, nan
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from pepr_profiler import _core
from pepr_profiler.daemon.lanes import Lanes
from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.sources import Source, fallen_j, find_sources
from pepr_profiler.trace import Lane

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_STALE_S = 5.0  # a number that is unknown for longer is not told any more
_SECOND_NS, _SECONDS_KEPT = 1_000_000_000, 32
_SCRAPERS = 16  # at once; a stuck one keeps its place for _PATIENCE_S
_PATIENCE_S = 10.0
_PAUSE_S = 1.0  # when descriptors are short


# --- what is measured -----------------------------------------------------------------------------


@dataclass
class Meter:
    """One source, from the rows of its lane: joules since the daemon began, or watts now."""

    source: Source
    energy_j: float = 0.0
    value: float = nan  # the last one that was known, in J or W
    t_ns: int = 0
    at_seconds_j: dict[int, float] = field(default_factory=dict)  # of CLOCK_MONOTONIC, the latest

    def take(self, t_ns: array[int], values: array[float]) -> None:
        """Goes on through rows, times in ns and values as they were read."""
        source = self.source
        for at_ns, raw in zip(t_ns, values, strict=True):
            # A GPU that is asked too fast answers 0, as its counter and as its power.
            if isnan(raw) or (raw <= 0 and (not source.counter or source.source == "nvml-energy")):
                continue
            value = raw * source.scale
            if source.counter and self.t_ns:
                step_j, span_s = value - self.value, (at_ns - self.t_ns) * 1e-9
                range_j = source.modulus * source.scale
                step_j = step_j if step_j >= 0 else fallen_j(step_j, value, range_j, span_s)
                if self.t_ns // _SECOND_NS != at_ns // _SECOND_NS:
                    self._pass_seconds(at_ns, step_j)
                self.energy_j += step_j
            self.value, self.t_ns = value, at_ns

    def in_second_j(self, second: int) -> float | None:
        """What was counted in a whole second; None if it is not known, or long ago."""
        ends = self.at_seconds_j.get(second), self.at_seconds_j.get(second + 1)
        return None if ends[0] is None or ends[1] is None else ends[1] - ends[0]

    def _pass_seconds(self, at_ns: int, step_j: float) -> None:
        """Between two rows power is what it is on average."""
        seconds = range(self.t_ns // _SECOND_NS + 1, at_ns // _SECOND_NS + 1)
        for second in seconds[-_SECONDS_KEPT:]:
            part = (second * _SECOND_NS - self.t_ns) / (at_ns - self.t_ns)
            self.at_seconds_j[second] = self.energy_j + part * step_j
        for second in [s for s in self.at_seconds_j if s <= seconds[-1] - _SECONDS_KEPT]:
            del self.at_seconds_j[second]

    def known(self, now_ns: int) -> float | None:
        """Joules, or watts; None while unknown."""
        if not self.t_ns or now_ns - self.t_ns > _STALE_S * 1e9:
            return None
        return self.energy_j if self.source.counter else self.value


@dataclass
class _Feed:
    """Where a lane's rows come from: its ring for all, which a successor's replaces."""

    sampler: _core.Sampler
    rows: _core.RingReader
    lane: Lane


class Meters:
    """Every source of all lanes. Called by the daemon's thread only."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._feeds: dict[str, _Feed] = {}
        self._meters: dict[str, Meter] = {}  # of what is there
        self._known: dict[str, Meter] = {}  # and of what was

    def update(self) -> None:
        """Takes the rows since the last time; more seldom than a ring is full costs nothing else.

        A counter of a lane that was opened again goes on where it was.
        """
        changed = False
        for lane in self._lanes:
            feed = self._feeds.get(lane.name)
            if not lane.ready or (feed is not None and feed.sampler is lane.sampler):
                continue
            if feed is not None:
                self._take(feed)
            try:
                descriptor = lane.sampler.share(lane.closed)
            except RuntimeError:
                continue  # descriptors are short: its numbers are unknown until the next time
            try:
                rows = _core.RingReader(descriptor, (feed and self._newest_ns(lane.name)) or 0)
            finally:
                os.close(descriptor)
            facts = Lane(lane.name, lane.spec, lane.period_ns, lane.channels)
            self._feeds[lane.name] = _Feed(lane.sampler, rows, facts)
            changed = True
        if changed:
            self._find()
        for feed in self._feeds.values():
            self._take(feed)

    def __iter__(self) -> Iterator[Meter]:
        return iter(self._meters.values())

    def lost(self, lane: str) -> int:
        """Rows of a lane that were overwritten unread; no counter loses a joule by it."""
        feed = self._feeds.get(lane)
        return feed.rows.lost if feed is not None else 0

    # --- parts ---

    def _find(self) -> None:
        """The sources of all lanes that are there, each with what it has counted so far."""
        lanes = [self._feeds[lane.name].lane for lane in self._lanes if lane.name in self._feeds]
        self._meters = {}
        for source in find_sources(lanes):
            meter = self._known.setdefault(source.id, Meter(source))
            if meter.source.lane != source.lane:
                meter.t_ns = 0  # another driver's counter begins elsewhere
            meter.source = source
            self._meters[source.id] = meter

    def _newest_ns(self, lane: str) -> int:
        return max((m.t_ns for m in self._meters.values() if m.source.lane == lane), default=0)

    def _take(self, feed: _Feed) -> None:
        while (rows := feed.rows.read()) is not None:
            t_ns = array("q", rows[1])
            for meter in self._meters.values():
                if meter.source.lane == feed.lane.name:
                    meter.take(t_ns, array("d", rows[3][meter.source.channel]))


# --- what it is called ----------------------------------------------------------------------------


def families(
    meters: Meters,
    lanes: Lanes,
    *,
    facts: Mapping[str, float],
    refused: Mapping[str, int],
    version: str,
    runs: Iterable[tuple[int, str, float]] | None = None,
) -> list[Metric]:
    """All that is served, as families of `prometheus_client`, but the process's own (`process_…`).

    Meters tell what they have taken so far. What adds up is `pepr_device_…`; what lies inside a
    device, around it or repeats it has another name, so that a sum over a metric's labels always
    means something.
    """
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
    )

    now_ns = time.monotonic_ns()
    told: list[Metric] = []
    device = InfoMetricFamily(
        "pepr_device", "What a device is and what tells of it.", labels=["device", "kind"]
    )
    told.append(device)
    for prefix, about, added in (
        ("pepr_device", "a device; devices add up", True),
        ("pepr_domain", "a part of a device, what contains or what repeats one (why)", False),
    ):
        names = ["device", "kind"] if added else ["device", "kind", "why"]
        energy = CounterMetricFamily(
            f"{prefix}_energy_joules", f"Energy since the daemon's start of {about}.",
            labels=names, unit="joules",
        )  # fmt: skip
        power = GaugeMetricFamily(
            f"{prefix}_power_watts", f"Power now, where there is no energy counter, of {about}.",
            labels=names, unit="watts",
        )  # fmt: skip
        for meter in meters:
            source = meter.source
            if source.in_total != added:
                continue
            facts_of = {"label": source.label, "source": source.source, "lane": source.lane}
            device.add_metric([source.id, source.kind], facts_of)
            value = meter.known(now_ns)
            if value is not None:
                labels = [source.id, source.kind, *([] if added else [source.excluded])]
                (energy if source.counter else power).add_metric(labels, value)
        told += [energy, power]
    if runs is not None:
        of_runs = CounterMetricFamily(
            "pepr_run_energy_joules", "Energy that is surely a registered run's, some seconds ago.",
            labels=["run", "kind"], unit="joules",
        )  # fmt: skip
        for number, kind, energy_j in runs:
            of_runs.add_metric([str(number), kind], energy_j)
        told.append(of_runs)
    up = GaugeMetricFamily(
        "pepr_lane_up", "Whether a sensor is open and was read lately.", labels=["lane"]
    )
    told.append(up)
    for lane in lanes:
        age_s = lane.age_s()
        up.add_metric([lane.name], float(age_s is not None and age_s < _STALE_S))
    for name, key, help_text in _LANE_COUNTERS:
        counter = CounterMetricFamily(f"pepr_lane_{name}", help_text, labels=["lane"])
        for lane in lanes:
            counter.add_metric([lane.name], lane.sampler.stats()[key])
        told.append(counter)
    lost = CounterMetricFamily(
        "pepr_lane_lost_samples", "Samples overwritten before the metrics took them.",
        labels=["lane"],
    )  # fmt: skip
    for lane in lanes:
        lost.add_metric([lane.name], meters.lost(lane.name))
    told.append(lost)
    for name, value in facts.items():
        told.append(GaugeMetricFamily(f"pepr_daemon_{name}", _DAEMON_GAUGES[name], value=value))
    refusals = CounterMetricFamily(
        "pepr_daemon_refusals", "Connections and requests that were refused.", labels=["why"]
    )
    for why, count in refused.items():
        refusals.add_metric([why], count)
    told.append(refusals)
    told.append(InfoMetricFamily("pepr_daemon", "The daemon.", value={"version": version}))
    return told


_LANE_COUNTERS = (
    ("samples", "samples", "Samples taken."),
    ("late_samples", "late", "Samples begun more than half a period late."),
    ("missed_samples", "skipped", "Samples left out because the one before took too long."),
    ("failed_reads", "failed_reads", "Numbers that could not be read."),
    ("cpu_seconds", "cpu_s", "CPU time that sampling took."),
)
_DAEMON_GAUGES = {
    "clients": "Clients connected.",
    "runs": "Runs registered.",
}


# --- serving --------------------------------------------------------------------------------------


def listen(where: str) -> socket.socket:
    """A listener at ADDR:PORT, or at PORT of the loopback interface.

    Raises UsageError for anything else or without prometheus_client, PeprError where it cannot.
    """
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise UsageError(
            "metrics cannot be served",
            why="prometheus_client is not installed",
            fix="pip install 'pepr-profiler[metrics]'",
        ) from None
    host, _, port = where.rpartition(":") if ":" in where else ("127.0.0.1", "", where)
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not host or (":" in host and not bracketed) or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"'{where}' is no place to serve metrics at",
            why="it is neither PORT nor ADDR:PORT",
            fix="--metrics 9187 for this machine alone, --metrics 0.0.0.0:9187 for all others too",
        )
    listener: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_SCRAPERS)
    except OSError as error:
        if listener is not None:
            listener.close()
        forbidden = error.errno == errno.EAFNOSUPPORT
        raise PeprError(
            f"metrics cannot be served at {where}",
            why=error.strerror or str(error),
            fix="the unit forbids networks: see 'Metrics' in docs/daemon.md"
            if forbidden
            else "give an address of this machine and a port that is free",
        ) from None
    return listener


class Exporter:
    """Serves families that somebody else's thread makes; `wake` is readable when it is asked to.

    That thread calls `answer` then. `start` is called when no privilege is left: threads inherit.
    """

    def __init__(self, listener: socket.socket) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._asked: SimpleQueue[SimpleQueue[list[Metric] | None]] = SimpleQueue()
        self.wake, self._waker = socket.socketpair()
        for end in (self.wake, self._waker):
            end.setblocking(False)
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        self._server = _Scrapers(listener, registry)
        self._thread = threading.Thread(target=self._server.serve, name="pepr-metrics", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._server.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    @property
    def refused(self) -> int:
        """Scrapers that were turned away, went away, or were too slow."""
        return self._server.refused

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.end()
        self._thread.join(_PATIENCE_S)
        self.wake.close()
        self._waker.close()

    def answer(self, make: Callable[[], list[Metric]]) -> None:
        """Makes the families for everybody who waits for them, once."""
        try:
            self.wake.recv(4096)
        except BlockingIOError:
            return
        waiting = []
        while not self._asked.empty():
            waiting.append(self._asked.get())
        made: list[Metric] | None = None
        try:
            made = make()
        finally:
            for reply in waiting:
                reply.put(made)

    def collect(self) -> Iterable[Metric]:
        """For the registry, in a scraper's thread. Raises TimeoutError if nobody answers."""
        reply: SimpleQueue[list[Metric] | None] = SimpleQueue()
        self._asked.put(reply)
        with suppress(BlockingIOError):  # so many wait that it is awake
            self._waker.send(b"m")
        try:
            made = reply.get(timeout=_PATIENCE_S)
        except Empty:
            made = None
        if made is None:
            raise TimeoutError("the daemon did not answer")
        return made


class _Scrapers(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """HTTP for a bounded number at once, each in a thread that waits for its own peer only."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, registry: Any) -> None:
        from prometheus_client import MetricsHandler

        handler = MetricsHandler.factory(registry)
        handler.timeout = _PATIENCE_S  # type: ignore[attr-defined]
        super().__init__(listener.getsockname(), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = self.listener = listener
        self.refused = 0
        self._places = threading.BoundedSemaphore(_SCRAPERS)
        self._ended = False

    def serve(self) -> None:
        with self.socket:
            while not self._ended:
                self.handle_request()

    def end(self) -> None:
        self._ended = True
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes who waits in it

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(_PAUSE_S)  # who waits keeps it readable: looking at once would be a loop
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.refused += 1
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        self.refused += 1  # it went away, or was too slow; the count is served
