"""`pepr-profile daemon`: read privileged counters once, for all users of this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pepr_profiler.commands import complain, say
from pepr_profiler.errors import PeprError, UsageError
from pepr_profiler.units import format_duration, format_quantity, parse_overhead

if TYPE_CHECKING:
    from pepr_profiler.daemon.clients import Quotas
    from pepr_profiler.daemon.server import Waits

_OWN_DESCRIPTORS = 256  # of the daemon, besides one a client


@click.group(invoke_without_command=True)
@click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    envvar="PEPR_DAEMON",
    metavar="FILE",
    help="Listen there [/run/pepr-profiler/daemon.sock for root, else below XDG_RUNTIME_DIR].",
)
@click.option("--sensor", "sensors", multiple=True, metavar="KIND[:WHERE]", help="Read this one.")
@click.option(
    "--period",
    metavar="TIME",
    help="Read every sensor this often [when refreshed]: 10ms. What is not energy of a GPU is "
    "read 5 times a second at most.",
)
@click.option(
    "--overhead", default="1%", metavar="SHARE", help="CPU time that reading may take [1%]."
)
@click.option("--group", metavar="NAME", help="Only this group may connect [everybody, if root].")
@click.option("--admin-group", metavar="NAME", help="Its members are trusted as root is.")
@click.option(
    "--user", metavar="NAME", help="The user to become, if root [pepr-profiler, else nobody]."
)
@click.option(
    "--coarse-period",
    default="10ms",
    metavar="TIME",
    help="Users other than root and --admin-group get RAPL's energy at most this often [10ms].",
)
@click.option(
    "--coarse-quantum",
    default=0.1,
    type=click.FloatRange(min=1e-9, max=1e9),
    metavar="J",
    help="Their energy is rounded down to multiples of this many joules [0.1].",
)
@click.option(
    "--metrics",
    metavar="[ADDR:]PORT",
    help="Serve metrics for Prometheus there [no metrics; ADDR: 127.0.0.1].",
)
@click.option(
    "--metrics-runs",
    is_flag=True,
    help="Show each registered run's energy in the metrics, under a number, to all who can read "
    "the port.",
)
@click.pass_context
def daemon(ctx: click.Context, /, *, path: Path | None, **options: Any) -> int | None:
    """Serve this machine's counters, in the foreground, to users who may not read them."""
    ctx.obj = path = None if path == Path("off") else path  # for clients it means: no daemon
    return None if ctx.invoked_subcommand else _serve(path, **options)


def _serve(
    path: Path | None,
    *,
    sensors: tuple[str, ...],
    period: str | None,
    overhead: str,
    group: str | None,
    admin_group: str | None,
    user: str | None,
    coarse_period: str,
    coarse_quantum: float,
    metrics: str | None,
    metrics_runs: bool,
    quotas: Quotas | None = None,
    waits: Waits | None = None,
) -> int:
    from dataclasses import replace

    from pepr_profiler import _core
    from pepr_profiler.daemon import exporter, system
    from pepr_profiler.daemon.clients import Quotas
    from pepr_profiler.daemon.lanes import SamplingOptions, ServedLanes
    from pepr_profiler.daemon.ledger import Ledger
    from pepr_profiler.daemon.server import Policy, Server, Waits, raise_descriptor_limit
    from pepr_profiler.recording.options import period_ns
    from pepr_profiler.sensors.detect import detect_lasting

    quotas, waits = quotas or Quotas(), waits or Waits()
    root = os.geteuid() == 0
    sampling = SamplingOptions(
        period_ns=None if period is None else period_ns(period),
        overhead=parse_overhead(overhead),
        coarse_period_ns=period_ns(coarse_period),
        coarse_quantum_j=coarse_quantum,
    )
    if user is not None and not root:
        raise UsageError("--user is for root", why="only root can become somebody else", fix="sudo")
    if metrics_runs and metrics is None:
        raise UsageError(
            "--metrics-runs is about metrics", why="none are served", fix="give --metrics 9187 too"
        )
    become = system.account(user) if root else None
    gid = -1 if group is None else system.group_id(group)
    admin_gid = None if admin_group is None else system.group_id(admin_group)
    metrics_listener = None if metrics is None else exporter.listen(metrics)
    inherited = system.inherited_socket()
    # With systemd's socket or --group it serves many. A user's own serves that user alone.
    shared = root or inherited is not None or group is not None
    mode = 0o660 if group else 0o666 if shared else 0o600
    where = path or system.default_path() if inherited is None else inherited.getsockname()
    listener = inherited or system.listen(Path(where), mode=mode, gid=gid)
    policy = Policy(owner=os.getuid(), single_user=not shared, admin_gid=admin_gid)
    manager = system.ServiceManager()
    lanes = ServedLanes(sensors or detect_lasting(), sampling, lost_s=waits.lost_s)
    descriptors = raise_descriptor_limit(quotas.clients + _OWN_DESCRIPTORS)
    spare = min(_OWN_DESCRIPTORS, descriptors // 2)
    quotas = replace(quotas, clients=min(quotas.clients, descriptors - spare))
    had_privileges = system.confine(become)
    try:
        lanes.open_privileged()
        _core.keep_capabilities(0)  # this thread's; each sampling thread drops its own
        lanes.open_rest(dropped_privileges=had_privileges)
        for lane in lanes:
            if lane.why and lane.sampler.state == "failed":
                complain(f"{lane.spec}: {lane.why}")
        metrics_server = None if metrics_listener is None else exporter.Exporter(metrics_listener)
        server = Server(
            listener,
            lanes,
            policy=policy,
            manager=manager,
            quotas=quotas,
            check_s=waits.check_s,
            exporter=metrics_server,
            ledger=Ledger(settled_s=waits.settled_s) if metrics_runs else None,
            log=complain,
        )
        complain(f"serving {where} as user {os.geteuid()}")
        if metrics_server is not None:
            complain(f"serving {metrics_server.url}")
        return server.serve()
    finally:
        listener.close()
        lanes.stop()


@daemon.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
@click.pass_obj
def status(path: Path | None, /, *, as_json: bool) -> None:
    """Show what the daemon reads, at what cost, and for whom."""
    where, facts = _ask(path, "status")
    if as_json:
        click.echo(json.dumps({"socket": str(where), **facts}, indent=1))
        return
    up_s, cpu_s = facts["up_s"], facts["cpu_s"]
    say(f"daemon {facts['version']} at {where}, process {facts['pid']}")
    say(
        f"  up {format_duration(up_s)}, {cpu_s / max(up_s, 1e-9):.2%} of a core, "
        f"{format_quantity(facts['rss_bytes'], 'B')}"
    )
    whose = "" if facts["fine"] else " of yours"
    refused = ", ".join(f"{count} ({why})" for why, count in facts.get("refused", {}).items())
    if refused:
        say(f"  refused so far: {refused}")
    if facts["metrics"]:
        say(f"  metrics at {facts['metrics']}")
    say(f"  {facts['clients']} client(s){whose}, {len(facts['runs'])} run(s){whose}")
    for lane in facts["lanes"]:
        coarse = ", coarse for you" if lane["coarse"] else ""
        state = f"{len(lane['channels'])} channels{coarse}" if not lane["why"] else lane["why"]
        say(f"  {lane['name']:<10} {state}")
    for run in facts["runs"]:
        label = "" if run["number"] is None else f', in the metrics run="{run["number"]}"'
        say(f"  run {run['run']}, process {run['pid']} of user {run['uid']}{label}")


@daemon.command()
@click.pass_obj
def stop(path: Path | None, /) -> None:
    """End the daemon. Runs that go on read its counters again when it is back."""
    where, _ = _ask(path, "stop")
    complain(f"the daemon at {where} ends")


def _ask(path: Path | None, operation: str) -> tuple[Path, dict[str, Any]]:
    """The answer of the daemon at `path`, or of the first one that is there."""
    from pepr_profiler.daemon_client.address import socket_paths, sockets_there
    from pepr_profiler.daemon_client.client import Connection
    from pepr_profiler.daemon_client.protocol import close_all

    paths = [path] if path else sockets_there()
    if not paths:
        places = ", ".join(map(str, socket_paths())) or "anywhere: PEPR_DAEMON is off"
        raise PeprError(
            "no daemon is here", why=f"nothing at {places}", fix="sudo pepr-profile daemon"
        )
    connection = Connection(paths[0])
    try:
        reply, descriptors = connection.ask(operation)
        close_all(descriptors)
        while reply.get("more"):  # runs that did not fit into the answer
            runs = reply["runs"]
            reply, _ = connection.ask(operation, skip=len(runs))
            if not reply["runs"]:  # they have ended meanwhile
                reply["more"] = 0
            reply["runs"] = runs + reply["runs"]
    finally:
        connection.close()
    return paths[0], reply
