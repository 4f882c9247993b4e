"""The daemon's numbers as metrics, for Prometheus and whatever reads its formats.

Anybody may read a port, so the metrics hold no more than an unprivileged client may see: the
meters read the coarse rings. Each scraper is served by a thread of its own, which asks the daemon's
one thread for its numbers and never touches a lane. So a slow scraper delays nobody else.
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

from pepr_profiler.daemon.lanes import ServedLanes
from pepr_profiler.daemon.meters import STALE_S, Meters
from pepr_profiler.daemon.system import NO_DESCRIPTORS_LEFT
from pepr_profiler.errors import PeprError, UsageError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_MOST_SCRAPERS = 16  # at once
_TIMEOUT_S = 10.0  # from a scraper's connection to the end of its answer
_GRACE_S = 0.25  # of a scraper when all places are taken; one that means it takes some 10 ms
_BACKLOG = 128
_PAUSE_S = 1.0  # when there are no descriptors left


# --- the metrics ----------------------------------------------------------------------------------


def families(
    meters: Meters,
    lanes: ServedLanes,
    *,
    clients: int,
    registered: int,
    refused: Mapping[str, int],
    version: str,
    runs: Iterable[tuple[int, str, float]] | None = None,
) -> list[Metric]:
    """All metrics but the process's own (`process_…`), as families of `prometheus_client`.

    `clients` are connected, `registered` runs, and `refused` are by reason. `runs` has each run's
    number, a kind of device and J. What meters have taken so far is what they show.
    """
    return [
        *_device_families(meters),
        *([] if runs is None else [_run_family(runs)]),
        *_lane_families(lanes, meters),
        *_daemon_families(clients, registered, refused, version),
    ]


def _device_families(meters: Meters) -> list[Metric]:
    """The energy and power of each source.

    What adds up is `pepr_device_…`. What lies inside a device, contains or repeats one is
    `pepr_domain_…`, so that a sum over a metric's labels always means something.
    """
    from prometheus_client import metrics_core

    now_ns = time.monotonic_ns()
    info = metrics_core.InfoMetricFamily(
        "pepr_device", "What a device is, and which sensor measures it.", labels=["device", "kind"]
    )
    found: list[Metric] = [info]
    for prefix, what, adds_up in (
        ("pepr_device", "a device; devices add up", True),
        ("pepr_domain", "what is inside a device, contains or repeats one (why)", False),
    ):
        names = ["device", "kind"] if adds_up else ["device", "kind", "why"]
        energy = metrics_core.CounterMetricFamily(
            f"{prefix}_energy_joules", f"Energy since the daemon's start of {what}.",
            labels=names, unit="joules",
        )  # fmt: skip
        power = metrics_core.GaugeMetricFamily(
            f"{prefix}_power_watts", f"Power now, where there is no energy counter, of {what}.",
            labels=names, unit="watts",
        )  # fmt: skip
        for meter in meters:
            source = meter.source
            if source.in_total != adds_up:
                continue
            facts = {"label": source.label, "source": source.source, "lane": source.lane}
            info.add_metric([source.id, source.kind], facts)
            value = meter.known(now_ns)
            if value is not None:
                labels = [source.id, source.kind, *([] if adds_up else [source.excluded])]
                (energy if source.counter else power).add_metric(labels, value)
        found += [energy, power]
    return found


def _run_family(runs: Iterable[tuple[int, str, float]]) -> Metric:
    from prometheus_client import metrics_core

    energy = metrics_core.CounterMetricFamily(
        "pepr_run_energy_joules", "Energy that is surely a registered run's, some seconds ago.",
        labels=["run", "kind"], unit="joules",
    )  # fmt: skip
    for number, kind, energy_j in runs:
        energy.add_metric([str(number), kind], energy_j)
    return energy


def _lane_families(lanes: ServedLanes, meters: Meters) -> list[Metric]:
    from prometheus_client import metrics_core

    up = metrics_core.GaugeMetricFamily(
        "pepr_lane_up", "Whether a sensor is open and was read lately.", labels=["lane"]
    )
    lost = metrics_core.CounterMetricFamily(
        "pepr_lane_lost_samples", "Samples overwritten before the metrics took them.",
        labels=["lane"],
    )  # fmt: skip
    counters = {
        key: metrics_core.CounterMetricFamily(f"pepr_lane_{name}", help_text, labels=["lane"])
        for name, key, help_text in _LANE_COUNTERS
    }
    for lane in lanes:
        age_s, stats = lane.age_s(), lane.sampler.stats()
        up.add_metric([lane.name], float(age_s is not None and age_s < STALE_S))
        lost.add_metric([lane.name], meters.lost(lane.name))
        for key, counter in counters.items():
            counter.add_metric([lane.name], stats[key])
    return [up, *counters.values(), lost]


def _daemon_families(
    clients: int, registered: int, refused: Mapping[str, int], version: str
) -> list[Metric]:
    from prometheus_client import metrics_core

    refusals = metrics_core.CounterMetricFamily(
        "pepr_daemon_refusals", "Connections and requests that were refused.", labels=["why"]
    )
    for why, count in refused.items():
        refusals.add_metric([why], count)
    return [
        metrics_core.GaugeMetricFamily("pepr_daemon_clients", "Clients connected.", value=clients),
        metrics_core.GaugeMetricFamily("pepr_daemon_runs", "Runs registered.", value=registered),
        refusals,
        metrics_core.InfoMetricFamily("pepr_daemon", "The daemon.", value={"version": version}),
    ]


_LANE_COUNTERS = (
    ("samples", "samples", "Samples taken."),
    ("late_samples", "late", "Samples begun more than half a period late."),
    ("missed_samples", "skipped", "Samples left out because the one before took too long."),
    ("failed_reads", "failed_reads", "Numbers that could not be read."),
    ("cpu_seconds", "cpu_s", "CPU time that sampling took."),
)


# --- serving --------------------------------------------------------------------------------------


def listen(where: str) -> socket.socket:
    """A listener at ADDR:PORT, or at PORT of the loopback interface.

    Raises UsageError for anything else and without prometheus_client, PeprError if the address
    cannot be used.
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
            f"'{where}' is no address for metrics",
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
        listener.listen(_BACKLOG)
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
    """Serves metrics over HTTP. Another thread makes them, by `answer` whenever `wake` is readable.

    Call `start` when no privilege is left, because its threads inherit what there is.
    """

    def __init__(self, listener: socket.socket) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._waiting: SimpleQueue[SimpleQueue[list[Metric] | None]] = SimpleQueue()
        self.wake, self._waker = socket.socketpair()
        for end in (self.wake, self._waker):
            end.setblocking(False)
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        self._server = _HttpServer(listener, registry)
        self._thread = threading.Thread(target=self._server.serve, name="pepr-metrics", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._server.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    @property
    def refused(self) -> int:
        """Scrapers that found no place, went away, or were too slow."""
        return self._server.refused

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.end()
        self._thread.join(_TIMEOUT_S)
        self.wake.close()
        self._waker.close()

    def answer(self, make: Callable[[], list[Metric]]) -> None:
        """Makes the metrics once for all scrapers that wait."""
        try:
            self.wake.recv(4096)
        except BlockingIOError:
            return
        waiting = []
        while not self._waiting.empty():
            waiting.append(self._waiting.get())
        made: list[Metric] | None = None
        try:
            made = make()
        finally:
            for reply in waiting:
                reply.put(made)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry in a scraper's thread. Raises TimeoutError if nobody answers."""
        reply: SimpleQueue[list[Metric] | None] = SimpleQueue()
        self._waiting.put(reply)
        with suppress(BlockingIOError):  # full: so many wait that `wake` is readable anyway
            self._waker.send(b"m")
        try:
            made = reply.get(timeout=_TIMEOUT_S)
        except Empty:
            made = None
        if made is None:
            raise TimeoutError("the daemon did not answer")
        return made


class _HttpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves a bounded number of scrapers at once, each in a thread of its own.

    A scraper is left after _TIMEOUT_S, however often it sends or takes a byte. If all places are
    taken, the next one waits until the oldest has had _GRACE_S, and gets its place.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, registry: Any) -> None:
        from prometheus_client import MetricsHandler

        handler = MetricsHandler.factory(registry)
        handler.timeout = _TIMEOUT_S  # type: ignore[attr-defined]
        super().__init__(listener.getsockname(), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = self.listener = listener
        self.refused = 0
        self._began_s: dict[socket.socket, float] = {}  # the scrapers that are served, oldest first
        self._cut: set[socket.socket] = set()  # those of them that were ended, and counted
        self._changing = threading.Condition()
        self._ended = False

    def serve(self) -> None:
        with self.socket:
            while not self._ended:
                self.timeout = self._end_late()
                self.handle_request()

    def _end_late(self) -> float | None:
        """Ends the scrapers whose time is over; in how many s the next one's is."""
        now_s = time.monotonic()
        with self._changing:
            for request, began_s in self._began_s.items():
                if now_s < began_s + _TIMEOUT_S:
                    return began_s + _TIMEOUT_S - now_s
                self._cut_off(request)
            return _GRACE_S if self._began_s else None  # their threads are about to end

    def _has_place(self) -> bool:
        """Whether one more can be served; waits for the oldest one's place if all are taken."""
        with self._changing:
            while len(self._began_s) >= _MOST_SCRAPERS:
                oldest, began_s = next(iter(self._began_s.items()))
                left_s = began_s + _GRACE_S - time.monotonic()
                if left_s > 0:
                    self._changing.wait(left_s)
                    continue
                self._cut_off(oldest)
                if not self._changing.wait_for(
                    lambda: len(self._began_s) < _MOST_SCRAPERS, _GRACE_S
                ):
                    return False  # its thread waits for the daemon's, as all do
            return True

    def _cut_off(self, request: socket.socket) -> None:
        """Ends both directions of a connection, so that the thread that waits for it goes on."""
        if request not in self._cut:
            self._cut.add(request)
            self.refused += 1
        with suppress(OSError):  # it has gone already
            request.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self._ended = True
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a scraper

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in NO_DESCRIPTORS_LEFT:
                time.sleep(_PAUSE_S)  # the queue stays readable: without a pause this would spin
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._has_place():
            self.refused += 1
            self.shutdown_request(request)
            return
        with self._changing:
            self._began_s[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self._leave(request)
            raise

    def shutdown_request(self, request: Any) -> None:
        self._leave(request)  # before it is closed: nobody else may end it then
        super().shutdown_request(request)

    def _leave(self, request: Any) -> None:
        with self._changing:
            self._began_s.pop(request, None)
            self._cut.discard(request)
            self._changing.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        if request not in self._cut:
            self.refused += 1  # it went away
