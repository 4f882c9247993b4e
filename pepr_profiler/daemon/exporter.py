"""The daemon's numbers as metrics, for Prometheus and what understands its formats.

Whoever can reach a port is nobody in particular, so it is told what unprivileged clients are: the
meter reads the coarse rings. Scrapers are served by threads of their own, which ask the daemon's
one thread for its numbers and never touch a lane: how slow a scraper is, is its own affair.
"""

from __future__ import annotations

import errno
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from pepr_profiler.daemon.lanes import Lanes
from pepr_profiler.daemon.meters import _STALE_S, Meters
from pepr_profiler.errors import PeprError, UsageError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_SCRAPERS = 16  # at once; a stuck one keeps its place for _PATIENCE_S
_PATIENCE_S = 10.0
_PAUSE_S = 1.0  # when descriptors are short


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
