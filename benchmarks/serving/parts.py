"""Four measurements of the service; each returns rows for the report and figures for the targets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.common.results import Rows, Say
from benchmarks.serving.bodies import FORMS
from benchmarks.serving.clients import Outcome
from benchmarks.serving.figures import Verdict, busy, goodput, heavy_rate, latencies_ms, percentile
from benchmarks.serving.host import Batch, Setup
from benchmarks.serving.processes import LEAD_S, Calling, FailedError, Host, calling, hosting

Found = tuple[Rows, list[Verdict]]

_OK, _BUSY, _FULL = 200, 429, 503
_RATIO, _FLAT, _LOSS_PERCENT = 0.95, 0.95, 2.0
#: Quiet but for what is asked of it: the canary would count as load.
_ALONE = ("watch.canary_every_s=86400", "logs.format=json")


@dataclass(frozen=True)
class Plan:
    """How much is measured; seconds, unless a name says otherwise."""

    full_layers: int | None = None
    full_dtype: str = "bfloat16"
    full_batch_pairs: int = 4
    full_batches: int = 3
    full_rounds: int = 6
    forms: Sequence[str] = tuple(FORMS)
    wire_rounds: int = 5
    wire_requests: int = 3
    loads_percent: Sequence[int] = (20, 40, 60, 80, 100, 110, 120)
    load_s: float = 12.0
    load_settle_s: float = 4.0
    heavies: Sequence[int] = (1, 4)
    window_s: float = 4.0
    windows: int = 12
    light_rate: float = 3.0
    devices: Sequence[str] = ("the miniature", "a device that sleeps 100 ms a batch")


QUICK = Plan(
    full_layers=1,
    full_batches=2,
    full_rounds=2,
    forms=("msgpack, raw", "JSON + base64, PNG", "multipart, PNG"),
    wire_rounds=1,
    wire_requests=1,
    loads_percent=(100, 120),
    load_s=2.0,
    load_settle_s=0.5,
    heavies=(1,),
    window_s=1.0,
    windows=2,
    light_rate=8.0,
)


def saturation(plan: Plan, cores: Sequence[int], say: Say) -> Found:
    """(a) The service at saturation against the engine alone, on the very same batches, alternating."""
    pairs, requests = plan.full_batch_pairs, plan.full_batches
    setup = Setup(
        ["evaluators.hpsv2.enabled=false", "canary=null", f"batch_pairs={pairs}", *_ALONE],
        cores=list(cores),
        full=True,
        layers=plan.full_layers,
        dtype=plan.full_dtype,
    )
    say("(a) building towers of full size")
    rows: Rows = []
    with hosting(setup) as host, calling(host, ["trainer"], cores, pairs=pairs, bodies=requests) as callers:
        for number in range(-1, plan.full_rounds):  # the first one finds the prompts
            say(f"(a) round {number + 1} of {plan.full_rounds}")
            row = _round(host, callers, requests)
            rows += [{"round": number + 1} | row] if number >= 0 else []
    ratios = [row["service ÷ engine"] for row in rows]
    what = f"service ÷ engine, median of {len(ratios)}, {min(ratios):.3g} to {max(ratios):.3g}"
    in_cpu = median(row["the same in CPU time"] for row in rows)
    return rows, [
        Verdict("a", what, median(ratios), _RATIO),
        Verdict("a", "the same in CPU time, which neighbours disturb less", in_cpu, _RATIO),
    ]


def _round(host: Host, callers: Calling, requests: int) -> dict[str, Any]:
    """The service, then the engine alone."""
    cpu_s = [host.cpu().process]
    outcomes = callers.run(in_flight=3, requests=requests)
    _expect_all(outcomes)
    cpu_s.append(host.cpu().process)
    batches = host.batches()
    engine_s = host.again()
    cpu_s.append(host.cpu().process)
    start_s, stop_s = min(each.sent_s for each in outcomes), max(each.ended_s for each in outcomes)
    pairs, service_s = sum(batch.pairs for batch in batches), stop_s - start_s
    return {
        "pairs": pairs,
        "service, pairs/s": round(pairs / service_s, 3),
        "engine, pairs/s": round(pairs / engine_s, 3),
        "service ÷ engine": round(engine_s / service_s, 4),
        "the same in CPU time": round((cpu_s[2] - cpu_s[1]) / (cpu_s[1] - cpu_s[0]), 4),
        "engine busy in the service": round(busy(batches, start_s, stop_s), 4),
    }


def wire(plan: Plan, cores: Sequence[int], say: Say) -> Found:
    """(b) CPU time of the service without the engine's, by form of the request."""
    rows: Rows = []
    say("(b) starting a service")
    with hosting(Setup(list(_ALONE), cores=[cores[-1]])) as host:
        for form in plan.forms:
            say(f"(b) {form}")
            with calling(host, ["trainer"], cores[:1], pairs=64, bodies=1, form=form) as callers:
                _expect_all(callers.run(requests=1))
                costs = [_cost(host, callers, plan.wire_requests) for _ in range(plan.wire_rounds)]
                service = [cost[0] for cost in costs]
                rows.append(
                    {
                        "form": form,
                        "service, µs CPU a pair": round(median(service), 1),
                        "from": round(min(service), 1),
                        "to": round(max(service), 1),
                        "engine, µs CPU a pair": round(median(cost[1] for cost in costs), 1),
                        "KiB a pair": round(callers.body_bytes / 64 / 1024, 1),
                    }
                )
    return rows, []


def _cost(host: Host, callers: Calling, requests: int) -> tuple[float, float]:
    """Microseconds of CPU a pair: the service without its engine, and the engine."""
    before = host.cpu()
    _expect_all(callers.run(requests=requests))
    after = host.cpu()
    pairs = 64 * requests
    engine = after.engine - before.engine
    return 1e6 * (after.process - before.process - engine) / pairs, 1e6 * engine / pairs


def loads(plan: Plan, cores: Sequence[int], say: Say) -> Found:
    """(c) Latency and goodput of requests that come by chance, whatever became of earlier ones."""
    pairs, clients = 4, [f"client-{number}" for number in range(8)]
    say("(c) starting a service")
    setup = Setup(["limits.max_queued_pairs=512", *_ALONE], cores=[cores[-1]])
    rows: Rows = []
    with (
        hosting(setup) as host,
        calling(host, clients, cores[:1], pairs=pairs, bodies=96) as callers,
    ):
        say("(c) what it can do")
        callers.run(in_flight=6, seconds=plan.load_settle_s)
        capacity = _capacity(plan, callers, pairs)
        for percent in plan.loads_percent:
            say(f"(c) {percent} % of {capacity:.0f} pairs/s")
            rate = percent / 100 * capacity
            start_s = time.monotonic() + LEAD_S
            callers.begin(start_s, rate=rate / pairs, seconds=plan.load_s)
            rows.append(_load_row(percent, rate, callers.outcomes(), pairs, start_s, plan))
        after = _capacity(plan, callers, pairs)
    return rows, _load_verdicts(rows, f"capacity {capacity:.0f} pairs/s before, {after:.0f} after")


def _load_verdicts(rows: Rows, capacity: str) -> list[Verdict]:
    best = max(row["goodput, pairs/s"] for row in rows if row["offered, %"] <= 100)
    worst = min(row["goodput, pairs/s"] for row in rows if row["offered, %"] > 100)
    wrong = sum(row["anything else"] for row in rows)
    return [
        Verdict("c", f"least goodput past saturation ÷ best up to it ({capacity})", worst / best, _FLAT),
        Verdict("c", "requests without scores or an orderly 429 or 503", wrong, 0, at_most=True),
    ]


def _capacity(plan: Plan, callers: Calling, pairs: int) -> float:
    """Pairs a second with 48 requests of all callers waiting."""
    start_s = callers.begin(in_flight=6, seconds=plan.load_s)
    outcomes = callers.outcomes()
    return goodput(outcomes, pairs, start_s + plan.load_settle_s, start_s + plan.load_s)


def _load_row(
    percent: int, rate: float, outcomes: Sequence[Outcome], pairs: int, start_s: float, plan: Plan
) -> dict[str, Any]:
    settled = [each for each in outcomes if each.due_s >= start_s + plan.load_settle_s]
    milliseconds = latencies_ms(settled)
    statuses = [each.status for each in settled]
    good = goodput(outcomes, pairs, start_s + plan.load_settle_s, start_s + plan.load_s)
    offered = pairs * len(settled) / (plan.load_s - plan.load_settle_s)
    return {
        "offered, %": percent,
        "asked, pairs/s": round(rate, 1),
        "came, pairs/s": round(offered, 1),
        "goodput, pairs/s": round(good, 1),
        "p50, ms": round(percentile(milliseconds, 50), 1),
        "p99, ms": round(percentile(milliseconds, 99), 1),
        "200": statuses.count(_OK),
        "429": statuses.count(_BUSY),
        "503": statuses.count(_FULL),
        "anything else": sum(not each.in_order for each in outcomes),
        "callers' own delay p99, ms": round(
            percentile([1000 * (each.sent_s - each.due_s) for each in settled], 99), 1
        ),
    }


def sharing(plan: Plan, cores: Sequence[int], say: Say) -> Found:
    """(d) A light caller beside none, one and four heavy ones, and what the heavy ones lose by it."""
    rows: Rows = []
    verdicts: list[Verdict] = []
    for device in plan.devices:
        sleep_s = 0.1 if "sleeps" in device else None
        overrides = list(_ALONE) if sleep_s is None else ["canary=null", *_ALONE]
        say(f"(d) starting {device}")
        with hosting(Setup(overrides, cores=[cores[-1]], sleep_s=sleep_s)) as host:
            found = [_beside(plan, host, cores, number, say) for number in (0, *plan.heavies)]
        rows += [{"device": device} | row for row in found]
        verdicts += _sharing_verdicts(device, found)
    return rows, verdicts


def _sharing_verdicts(device: str, rows: Rows) -> list[Verdict]:
    idle, *beside = rows
    verdicts = []
    for row in beside:
        who = f"{device}, {row['heavy callers']} heavy"
        most = 3 * idle["light p99, ms"] + 2 * row["full batch, ms"]
        p99, loss = row["light p99, ms"], row["heavy loss, %"]
        verdicts += [
            Verdict("d", f"{who}: light p99 in ms", p99, most, at_most=True),
            Verdict("d", f"{who}: heavy loss in %", loss, _LOSS_PERCENT, at_most=True),
        ]
    return verdicts


def _beside(plan: Plan, host: Host, cores: Sequence[int], heavies: int, say: Say) -> dict[str, Any]:
    """The light caller in every second window; the heavy ones, if any, all the time."""
    say(f"(d) a light caller beside {heavies} heavy ones")
    with calling(host, ["light"], cores[:1], pairs=1, bodies=64, seed=10**6) as light:
        if heavies == 0:
            seconds = plan.window_s * plan.windows
            return _row(0, light.run(rate=plan.light_rate, seconds=seconds), [], [], plan)
        names = [f"heavy-{number}" for number in range(heavies)]
        with calling(host, names, cores[:1], pairs=64, bodies=max(6, 3 * heavies)) as heavy:
            host.batches()
            settle_s = max(1.0, plan.window_s / 2)
            start_s = heavy.begin(in_flight=3, seconds=settle_s + 2 * plan.windows * plan.window_s)
            starts = [start_s + settle_s + number * plan.window_s for number in range(2 * plan.windows)]
            outcomes: list[Outcome] = []
            for place, window_s in enumerate(starts):
                if place % 2:
                    light.begin(window_s, rate=plan.light_rate, seconds=plan.window_s)
                    outcomes += light.outcomes()
            _expect_all(heavy.outcomes())
            return _row(heavies, outcomes, host.batches(), starts, plan)


def _row(
    heavies: int, light: Sequence[Outcome], batches: Sequence[Batch], starts: Sequence[float], plan: Plan
) -> dict[str, Any]:
    _expect_all(light)
    milliseconds = latencies_ms(light)
    rates = [heavy_rate(batches, start_s, start_s + plan.window_s) for start_s in starts]
    alone, shared = rates[::2], rates[1::2]
    losses = [100 * (1 - after / before) for before, after in zip(alone, shared, strict=True)]
    full = [1000 * (each.end_s - each.start_s) for each in batches if each.pairs == 64]
    return {
        "heavy callers": heavies,
        "light requests": len(milliseconds),
        "light p50, ms": round(percentile(milliseconds, 50), 1),
        "light p99, ms": round(percentile(milliseconds, 99), 1),
        "full batch, ms": round(median(full), 1) if full else "",
        "heavy alone, pairs/s": round(median(alone), 1) if alone else "",
        "heavy beside light, pairs/s": round(median(shared), 1) if shared else "",
        "heavy loss, %": round(median(losses), 2) if losses else "",
        "windows' losses, %": f"{min(losses):.1f} to {max(losses):.1f}" if losses else "",
    }


def _expect_all(outcomes: Sequence[Outcome]) -> None:
    if failed := [each.status for each in outcomes if each.status != _OK]:
        raise FailedError(
            f"{len(failed)} of {len(outcomes)} requests were not scored; the first got {failed[0]}"
        )
