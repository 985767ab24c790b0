"""Four measurements of the service; each returns rows for the report and figures for the targets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.common.results import Log, Rows
from benchmarks.serving.bodies import FORMS
from benchmarks.serving.clients import RequestResult
from benchmarks.serving.figures import (
    Verdict,
    busy_share,
    goodput,
    heavy_pairs_per_s,
    latencies_ms,
    percentile,
)
from benchmarks.serving.host import Batch, Setup
from benchmarks.serving.processes import (
    LEAD_S,
    BenchmarkError,
    ClientProcess,
    ServiceProcess,
    running_clients,
    running_service,
)

PartResult = tuple[Rows, list[Verdict]]

_OK, _BUSY, _FULL = 200, 429, 503
_RATIO, _FLAT, _LOSS_PERCENT = 0.95, 0.95, 2.0
#: The canary would count as load.
_ALONE = ("watch.canary_every_s=86400", "logs.format=json")


@dataclass(frozen=True)
class Plan:
    """Amount of measurement; times are in seconds."""

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


def saturation(plan: Plan, cores: Sequence[int], log: Log) -> PartResult:
    """(a) Measure the service at saturation against the engine alone, alternating on the same batches."""
    pairs, requests = plan.full_batch_pairs, plan.full_batches
    setup = Setup(
        ["evaluators.hpsv2.enabled=false", "canary=null", f"batch_pairs={pairs}", *_ALONE],
        cores=list(cores),
        full=True,
        layers=plan.full_layers,
        dtype=plan.full_dtype,
    )
    log("(a) building towers of full size")
    rows: Rows = []
    with (
        running_service(setup) as service,
        running_clients(service, ["trainer"], cores, pairs=pairs, bodies=requests) as clients,
    ):
        for number in range(-1, plan.full_rounds):  # the first one fills the prompt cache
            log(f"(a) round {number + 1} of {plan.full_rounds}")
            row = _round(service, clients, requests)
            rows += [{"round": number + 1} | row] if number >= 0 else []
    ratios = [row["service ÷ engine"] for row in rows]
    name = f"service ÷ engine, median of {len(ratios)}, {min(ratios):.3g} to {max(ratios):.3g}"
    in_cpu = median(row["the same in CPU time"] for row in rows)
    return rows, [
        Verdict("a", name, median(ratios), _RATIO),
        Verdict("a", "the same in CPU time, less sensitive to other processes", in_cpu, _RATIO),
    ]


def _round(service: ServiceProcess, clients: ClientProcess, requests: int) -> dict[str, Any]:
    """Measure one round of the service, then of the engine alone."""
    cpu_s = [service.cpu().process]
    results = clients.run(in_flight=3, requests=requests)
    _require_scores(results)
    cpu_s.append(service.cpu().process)
    batches = service.batches()
    engine_s = service.rescore()
    cpu_s.append(service.cpu().process)
    start_s, stop_s = min(each.sent_s for each in results), max(each.ended_s for each in results)
    pairs, service_s = sum(batch.pairs for batch in batches), stop_s - start_s
    return {
        "pairs": pairs,
        "service, pairs/s": round(pairs / service_s, 3),
        "engine, pairs/s": round(pairs / engine_s, 3),
        "service ÷ engine": round(engine_s / service_s, 4),
        "the same in CPU time": round((cpu_s[2] - cpu_s[1]) / (cpu_s[1] - cpu_s[0]), 4),
        "engine busy in the service": round(busy_share(batches, start_s, stop_s), 4),
    }


def wire(plan: Plan, cores: Sequence[int], log: Log) -> PartResult:
    """(b) Measure the CPU time of the service without the engine's, by format of the request."""
    rows: Rows = []
    log("(b) starting a service")
    with running_service(Setup(list(_ALONE), cores=[cores[-1]])) as service:
        for form in plan.forms:
            log(f"(b) {form}")
            with running_clients(service, ["trainer"], cores[:1], pairs=64, bodies=1, form=form) as clients:
                _require_scores(clients.run(requests=1))
                costs = [_cost(service, clients, plan.wire_requests) for _ in range(plan.wire_rounds)]
                own = [cost[0] for cost in costs]
                rows.append(
                    {
                        "form": form,
                        "service, µs CPU a pair": round(median(own), 1),
                        "from": round(min(own), 1),
                        "to": round(max(own), 1),
                        "engine, µs CPU a pair": round(median(cost[1] for cost in costs), 1),
                        "KiB a pair": round(clients.body_bytes / 64 / 1024, 1),
                    }
                )
    return rows, []


def _cost(service: ServiceProcess, clients: ClientProcess, requests: int) -> tuple[float, float]:
    """Return microseconds of CPU a pair: the service without its engine, and the engine."""
    before = service.cpu()
    _require_scores(clients.run(requests=requests))
    after = service.cpu()
    pairs = 64 * requests
    engine = after.engine - before.engine
    return 1e6 * (after.process - before.process - engine) / pairs, 1e6 * engine / pairs


def loads(plan: Plan, cores: Sequence[int], log: Log) -> PartResult:
    """(c) Measure latency and goodput under an open-loop (Poisson) load."""
    pairs, names = 4, [f"client-{number}" for number in range(8)]
    log("(c) starting a service")
    setup = Setup(["limits.max_queued_pairs=512", *_ALONE], cores=[cores[-1]])
    rows: Rows = []
    with (
        running_service(setup) as service,
        running_clients(service, names, cores[:1], pairs=pairs, bodies=96) as clients,
    ):
        log("(c) measuring the capacity")
        clients.run(in_flight=6, seconds=plan.load_settle_s)
        capacity = _capacity(plan, clients, pairs)
        for percent in plan.loads_percent:
            log(f"(c) {percent} % of {capacity:.0f} pairs/s")
            rate = percent / 100 * capacity
            start_s = time.monotonic() + LEAD_S
            clients.start(start_s, rate=rate / pairs, seconds=plan.load_s)
            rows.append(_load_row(percent, rate, clients.results(), pairs, start_s, plan))
        after = _capacity(plan, clients, pairs)
    return rows, _load_verdicts(rows, f"capacity {capacity:.0f} pairs/s before, {after:.0f} after")


def _load_verdicts(rows: Rows, capacity: str) -> list[Verdict]:
    best = max(row["goodput, pairs/s"] for row in rows if row["offered, %"] <= 100)
    worst = min(row["goodput, pairs/s"] for row in rows if row["offered, %"] > 100)
    wrong = sum(row["other"] for row in rows)
    return [
        Verdict("c", f"lowest goodput past saturation ÷ highest up to it ({capacity})", worst / best, _FLAT),
        Verdict("c", "outcomes other than scores, or 429/503 with Retry-After", wrong, 0, at_most=True),
    ]


def _capacity(plan: Plan, clients: ClientProcess, pairs: int) -> float:
    """Return the goodput in pairs a second with 48 open requests of all clients together."""
    start_s = clients.start(in_flight=6, seconds=plan.load_s)
    results = clients.results()
    return goodput(results, pairs, start_s + plan.load_settle_s, start_s + plan.load_s)


def _load_row(
    percent: int, rate: float, results: Sequence[RequestResult], pairs: int, start_s: float, plan: Plan
) -> dict[str, Any]:
    settled = [each for each in results if each.due_s >= start_s + plan.load_settle_s]
    milliseconds = latencies_ms(settled)
    statuses = [each.status for each in settled]
    good = goodput(results, pairs, start_s + plan.load_settle_s, start_s + plan.load_s)
    offered = pairs * len(settled) / (plan.load_s - plan.load_settle_s)
    return {
        "offered, %": percent,
        "target, pairs/s": round(rate, 1),
        "sent, pairs/s": round(offered, 1),
        "goodput, pairs/s": round(good, 1),
        "p50, ms": round(percentile(milliseconds, 50), 1),
        "p99, ms": round(percentile(milliseconds, 99), 1),
        "200": statuses.count(_OK),
        "429": statuses.count(_BUSY),
        "503": statuses.count(_FULL),
        "other": sum(not each.accepted for each in results),
        "delay of the clients p99, ms": round(
            percentile([1000 * (each.sent_s - each.due_s) for each in settled], 99), 1
        ),
    }


def sharing(plan: Plan, cores: Sequence[int], log: Log) -> PartResult:
    """(d) Measure a light client beside zero, one and four heavy ones, and the throughput that these lose."""
    rows: Rows = []
    verdicts: list[Verdict] = []
    for device in plan.devices:
        sleep_s = 0.1 if "sleeps" in device else None
        overrides = list(_ALONE) if sleep_s is None else ["canary=null", *_ALONE]
        log(f"(d) starting {device}")
        with running_service(Setup(overrides, cores=[cores[-1]], sleep_s=sleep_s)) as service:
            found = [_measure_sharing(plan, service, cores, number, log) for number in (0, *plan.heavies)]
        rows += [{"device": device} | row for row in found]
        verdicts += _sharing_verdicts(device, found)
    return rows, verdicts


def _sharing_verdicts(device: str, rows: Rows) -> list[Verdict]:
    idle, *beside = rows
    verdicts = []
    for row in beside:
        label = f"{device}, {row['heavy clients']} heavy"
        most = 3 * idle["light p99, ms"] + 2 * row["full batch, ms"]
        p99, loss = row["light p99, ms"], row["heavy loss, %"]
        verdicts += [
            Verdict("d", f"{label}: light p99 in ms", p99, most, at_most=True),
            Verdict("d", f"{label}: heavy loss in %", loss, _LOSS_PERCENT, at_most=True),
        ]
    return verdicts


def _measure_sharing(
    plan: Plan, service: ServiceProcess, cores: Sequence[int], heavies: int, log: Log
) -> dict[str, Any]:
    """Measure the light client in every second window, and the heavy ones, if any, all the time."""
    log(f"(d) a light client beside {heavies} heavy ones")
    with running_clients(service, ["light"], cores[:1], pairs=1, bodies=64, seed=10**6) as light:
        if heavies == 0:
            seconds = plan.window_s * plan.windows
            return _row(0, light.run(rate=plan.light_rate, seconds=seconds), [], [], plan)
        names = [f"heavy-{number}" for number in range(heavies)]
        with running_clients(service, names, cores[:1], pairs=64, bodies=max(6, 3 * heavies)) as heavy:
            service.batches()
            settle_s = max(1.0, plan.window_s / 2)
            start_s = heavy.start(in_flight=3, seconds=settle_s + 2 * plan.windows * plan.window_s)
            starts = [start_s + settle_s + number * plan.window_s for number in range(2 * plan.windows)]
            results: list[RequestResult] = []
            for place, window_s in enumerate(starts):
                if place % 2:
                    light.start(window_s, rate=plan.light_rate, seconds=plan.window_s)
                    results += light.results()
            _require_scores(heavy.results())
            return _row(heavies, results, service.batches(), starts, plan)


def _row(
    heavies: int,
    light: Sequence[RequestResult],
    batches: Sequence[Batch],
    starts: Sequence[float],
    plan: Plan,
) -> dict[str, Any]:
    _require_scores(light)
    milliseconds = latencies_ms(light)
    rates = [heavy_pairs_per_s(batches, start_s, start_s + plan.window_s) for start_s in starts]
    alone, shared = rates[::2], rates[1::2]
    losses = [100 * (1 - after / before) for before, after in zip(alone, shared, strict=True)]
    full = [1000 * (each.end_s - each.start_s) for each in batches if each.pairs == 64]
    return {
        "heavy clients": heavies,
        "light requests": len(milliseconds),
        "light p50, ms": round(percentile(milliseconds, 50), 1),
        "light p99, ms": round(percentile(milliseconds, 99), 1),
        "full batch, ms": round(median(full), 1) if full else "",
        "heavy alone, pairs/s": round(median(alone), 1) if alone else "",
        "heavy beside light, pairs/s": round(median(shared), 1) if shared else "",
        "heavy loss, %": round(median(losses), 2) if losses else "",
        "windows' losses, %": f"{min(losses):.1f} to {max(losses):.1f}" if losses else "",
    }


def _require_scores(results: Sequence[RequestResult]) -> None:
    if failed := [each.status for each in results if each.status != _OK]:
        raise BenchmarkError(
            f"{len(failed)} of {len(results)} requests were not scored; the first got {failed[0]}"
        )
