"""What runs are shown to have taken: never more than there was, whatever anybody claims."""

from __future__ import annotations

import json
import random
from array import array
from typing import Any

import pytest

from pepr_profiler.daemon.claims import MOST_S
from pepr_profiler.daemon.ledger import SETTLED_S, Ledger, fair
from pepr_profiler.daemon.meters import Meter
from pepr_profiler.daemon_client.client import DaemonClient
from pepr_profiler.daemon_client.protocol import VERSION, parse
from pepr_profiler.energy.sources import Source
from pepr_profiler.units import NS_PER_S as S

ALICE, BOB, MALLORY = 1000, 1001, 1002


def meter(watts: float, seconds: int, *, kind: str = "cpu", number: int = 0) -> Meter:
    """A counter that was read 50 times a second from second 100 on."""
    ident = f"{kind}:{number}"
    source = Source(ident, kind, ident, "l", 0, "test", counter=True)
    made = Meter(source)
    times = [100 * S + n * S // 50 - 7_000_000 for n in range(50 * seconds + 2)]
    made.take(array("q", times), array("d", [1e4 + watts * t / S for t in times]))
    return made


def joules(ledger: Ledger, uid: int, run: str) -> float:
    number = ledger.number(uid, run)
    return sum(energy_j for other, _, energy_j in ledger if other == number)


def settled(meters: list[Meter], *claims: tuple[int, str, int, list[float]]) -> Ledger:
    """A ledger after those claims (user, run, first second, shares of "cpu")."""
    ledger = Ledger()
    ledger.settle(meters, 101.0)  # it knows its devices
    for uid, run in dict.fromkeys(claim[:2] for claim in claims):
        assert ledger.enter(uid, run)
    for uid, run, first_s, shares in claims:
        ledger.claim(uid, run, first_s, {"cpu": shares}, 111.0)
    ledger.settle(meters, 112.0 + SETTLED_S)
    return ledger


@pytest.mark.parametrize(
    ("claims", "granted"),
    [
        ({1: 0.3, 2: 0.6}, {1: 0.3, 2: 0.6}),
        ({1: 0.3, 2: 1.0}, {1: 0.3, 2: 0.7}),
        ({1: 0.9, 2: 1.0}, {1: 0.5, 2: 0.5}),
        ({1: 0.2, 2: 0.9, 3: 0.9}, {1: 0.2, 2: 0.4, 3: 0.4}),
        ({1: 0.0, 2: 1.0}, {1: 0.0, 2: 1.0}),
        ({}, {}),
    ],
)
def test_who_claims_least_is_served_first(
    claims: dict[int, float], granted: dict[int, float]
) -> None:
    assert fair(claims) == pytest.approx(granted)


def test_no_claims_together_are_granted_more_than_there_is_and_a_fair_one_is_granted() -> None:
    draw = random.Random(5)
    for _ in range(2000):
        claims = {
            user: draw.choice([0.0, draw.random(), 1.0]) for user in range(draw.randint(1, 9))
        }
        granted = fair(claims)
        assert sum(granted.values()) <= 1 + 1e-12
        for user, claim in claims.items():
            assert 0 <= granted[user] <= claim
            if claim <= 1 / len(claims) or sum(claims.values()) <= 1:
                assert granted[user] == pytest.approx(claim)


def test_a_run_has_its_parts_of_what_every_device_took() -> None:
    meters = [meter(100, 12), meter(10, 12, kind="dram"), meter(300, 12, kind="gpu")]
    ledger = settled(meters, (ALICE, "a", 102, [0.5, 1.0, 0.25]), (BOB, "b", 103, [0.0, 0.75]))
    energies_j = {(number, kind): energy_j for number, kind, energy_j in ledger}
    alice, bob = ledger.number(ALICE, "a"), ledger.number(BOB, "b")
    # given 100 W and 10 W: 1.75 s and 0.75 s of them; nobody has claimed the GPU
    assert energies_j == pytest.approx(
        {(alice, "cpu"): 175.0, (alice, "dram"): 17.5, (bob, "cpu"): 75.0, (bob, "dram"): 7.5}
    )


def test_parts_of_a_device_that_is_inside_another_are_nobodys() -> None:
    inside = Source("cpu:x", "cpu", "x", "l", 0, "test", counter=True, in_total=False)
    watts = Source("gpu:x", "gpu", "x", "l", 0, "test", counter=False)
    meters = [Meter(inside), Meter(watts)]
    times = [100 * S + n * S // 50 for n in range(600)]
    for each in meters:
        each.take(array("q", times), array("d", [float(n) + 1 for n in range(600)]))
    ledger = settled(meters, (ALICE, "a", 102, [1.0, 1.0]))
    assert list(ledger) == []


def test_a_liar_has_at_most_the_device_and_costs_nobody_a_fair_part() -> None:
    device = meter(100, 12)
    lies = [(MALLORY, f"m{n}", 101, [1.0] * 10) for n in range(20)]
    ledger = settled([device], (ALICE, "a", 101, [0.4] * 10), *lies, *lies)
    assert joules(ledger, ALICE, "a") == pytest.approx(400.0)
    stolen_j = sum(joules(ledger, MALLORY, f"m{n}") for n in range(20))
    assert stolen_j == pytest.approx(600.0)
    # what is all: never more than the device
    assert sum(energy_j for _, _, energy_j in ledger) == pytest.approx(1000.0)


def test_what_has_not_been_or_is_settled_cannot_be_claimed() -> None:
    ledger = settled([meter(100, 40)])
    ledger.enter(ALICE, "a")
    for first_s in (100, 110, 111):  # 112 is the first that is not settled
        ledger.claim(ALICE, "a", first_s, {"cpu": [1.0]}, 122.0)
    for first_s in (122, 123, 10**9, 2**53):
        ledger.claim(ALICE, "a", first_s, {"cpu": [1.0]}, 122.0)
    ledger.claim(ALICE, "a", 113, {"gpu:none": [1.0], "x": [1.0]}, 122.0)
    ledger.claim(BOB, "never entered", 113, {"cpu": [1.0]}, 122.0)
    ledger.settle([meter(100, 40)], 139.0)
    assert list(ledger) == []
    assert ledger.enter(BOB, "b")
    ledger.claim(BOB, "b", 129, {"cpu": [1.0]}, 139.0)
    ledger.settle([meter(100, 60)], 131.0 + SETTLED_S)
    assert joules(ledger, BOB, "b") == pytest.approx(100.0)


def test_figures_never_fall_whatever_is_claimed() -> None:
    draw, device, ledger = random.Random(9), meter(100, 30), Ledger()
    ledger.settle([device], 101.0)
    runs = [(uid, f"r{n}") for uid in (ALICE, BOB, MALLORY) for n in range(3)]
    for uid, run in runs:
        ledger.enter(uid, run)
    before = dict.fromkeys(runs, 0.0)
    for now_s in range(102, 131):
        for uid, run in draw.sample(runs, 5):
            shares = {"cpu": [draw.random() for _ in range(draw.randint(1, 16))]}
            ledger.claim(uid, run, draw.randint(now_s - 15, now_s + 3), shares, float(now_s))
        ledger.settle([device], float(now_s))
        after = {key: joules(ledger, *key) for key in runs}
        assert all(after[key] >= before[key] for key in runs)
        assert sum(after.values()) <= 100.0 * (now_s - 100)
        before = after
    assert min(before.values()) > 0


def test_a_second_whose_energy_is_unknown_is_nobodys() -> None:
    device = meter(100, 12)
    del device.at_seconds_j[104]
    ledger = settled([device], (ALICE, "a", 102, [1.0] * 6))  # 103 and 104 are not known
    assert joules(ledger, ALICE, "a") == pytest.approx(400.0)


def test_a_meter_knows_whole_seconds_between_rows_and_not_for_ever() -> None:
    device = meter(100, 50)
    assert device.in_second_j(99) is None
    assert device.in_second_j(148) == pytest.approx(100.0)
    assert device.in_second_j(110) is None  # long ago
    # a gap of 5 s: in it power is what it was on average
    device.take(array("q", [156 * S]), array("d", [device.value + 100 * 5.973]))
    assert device.in_second_j(153) == pytest.approx(100.0, rel=0.01)
    assert len(device.at_seconds_j) <= 32


def test_names_are_bounded_however_many_runs_come_and_go() -> None:
    ledger, seen = Ledger(most=20, most_per_user=6), set()
    now_s = 100.0
    for step in range(3000):
        now_s += 0.5
        run = f"run {step}"
        if ledger.enter(MALLORY, run):
            seen.add(ledger.number(MALLORY, run))
            ledger.leave(MALLORY, run, now_s)
        else:
            assert ledger.number(MALLORY, run) is None
        kept = sum(ledger.number(MALLORY, f"run {n}") is not None for n in range(step + 1)[-200:])
        assert kept <= 6
        # and others have their places
        assert ledger.enter(BOB, "b") and ledger.number(BOB, "b") is not None
        ledger.leave(BOB, "b", now_s)
        ledger.settle([], now_s)
    assert seen <= set(range(20))


def test_a_run_that_has_ended_is_shown_for_a_minute_and_its_number_is_then_free() -> None:
    ledger = Ledger(most=1)
    assert ledger.enter(ALICE, "a")
    assert not ledger.enter(BOB, "b")
    ledger.leave(ALICE, "a", 200.0)
    ledger.settle([], 259.0)
    assert ledger.number(ALICE, "a") == 0
    assert not ledger.enter(BOB, "b")
    # who comes back, as after a restart of a lane, goes on
    assert ledger.enter(ALICE, "a")
    ledger.settle([], 300.0)
    ledger.leave(ALICE, "a", 300.0)
    ledger.settle([], 360.0)
    assert ledger.number(ALICE, "a") is None
    assert ledger.enter(BOB, "b") and ledger.number(BOB, "b") == 0


def test_the_claims_of_many_gpus_are_requests_that_the_daemon_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[bytes] = []

    class Connection:
        def ask(self, operation: str, **fields: Any) -> None:
            sent.append(json.dumps({"v": VERSION, "op": operation, **fields}).encode())

    node = DaemonClient()
    monkeypatch.setattr(node, "_connection", Connection())
    monkeypatch.setattr(node, "_run", "x" * 128)
    node.claim(2**40, {"cpu": [1.0]})
    assert sent == []  # nobody wants them
    node.wants_claims = True
    shares = {f"gpu:GPU-{n:08}-0000-4000-8000-000000000000": [0.999999] * MOST_S for n in range(70)}
    node.claim(2**40, shares)
    requests = [parse(message) for message in sent]  # none is too long
    claimed = {device: list(parts) for r in requests for device, parts in r.shares.items()}
    assert claimed == shares
