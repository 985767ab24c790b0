"""Admission control: limits per client and in total, and the room reserved for light clients."""

from __future__ import annotations

import threading

import pytest

from reward_service.config import Limits
from reward_service.protocol import ProblemError
from reward_service.scoring.admission import RESOURCES, Admission
from reward_service.scoring.auth import Client

LIMITS = Limits(
    max_body_bytes=100,
    max_queued_pairs=64,
    max_client_pairs=32,
    max_inflight_bytes=1000,
    max_client_bytes=300,
    max_decoded_bytes=1000,
    max_client_decoded_bytes=600,
)
A, B, C = Client("a"), Client("b"), Client("c")


def refusal(call: object) -> tuple[str, int | None]:
    """Return code and retry time of the problem that the call raises."""
    with pytest.raises(ProblemError) as error:
        call()  # type: ignore[operator]
    return error.value.code, error.value.retry_after_s


@pytest.fixture
def admission() -> Admission:
    return Admission(LIMITS, retry_after_s=lambda: 7)


def test_client_exceeding_its_pairs_is_refused(admission: Admission) -> None:
    """Beyond its own limit a client gets `client_busy` with a retry time; other clients are admitted."""
    first, second = admission.admit(A, 10), admission.admit(A, 10)
    first.set("pairs", 30)
    assert refusal(lambda: second.set("pairs", 3)) == ("client_busy", 7)
    second.set("pairs", 2)
    assert refusal(lambda: admission.admit(A, 10)) == ("client_busy", 7)
    admission.admit(B, 10)
    first.close()
    admission.admit(A, 10)


def test_quota_of_a_key_replaces_the_default(admission: Admission) -> None:
    """The `max_pairs` of a key is used instead of the service's limit per client."""
    small = Client("small", max_pairs=2)
    admission.admit(small, 1)
    admission.admit(small, 1)
    assert refusal(lambda: admission.admit(small, 1))[0] == "client_busy"


def test_single_request_may_exceed_the_pairs(admission: Admission) -> None:
    """With nothing else in progress, a request of any size is admitted: otherwise it never could be."""
    ticket = admission.admit(A, 10)
    ticket.set("pairs", 100)
    assert admission.used["pairs"] == 100
    assert refusal(lambda: admission.admit(B, 10)) == ("queue_full", 7)


def test_unannounced_body_counts_as_the_largest(admission: Admission) -> None:
    """Without Content-Length, the largest body is reserved until the body is read."""
    tickets = [admission.admit(A, None) for _ in range(3)]
    assert refusal(lambda: admission.admit(A, 1))[0] == "client_busy"
    tickets[0].set("body bytes", 5)
    admission.admit(A, 1)


def test_total_body_bytes_are_limited(admission: Admission) -> None:
    """Many clients together cannot exceed the limit, and its last eighth is reserved for light clients."""
    for number in range(8):
        admission.admit(Client(f"c{number}"), 100)
    assert refusal(lambda: admission.admit(Client("one more"), 100)) == ("queue_full", 7)
    small = admission.admit(Client("light"), 60)
    small.close()


def test_light_client_is_admitted_beside_heavy_ones(admission: Admission) -> None:
    """Heavy clients that fill the queue leave room for the single pairs of a light client."""
    for client in (A, B):
        admission.admit(client, 1).set("pairs", 28)
    heavy = admission.admit(C, 1)
    assert refusal(lambda: heavy.set("pairs", 28))[0] == "queue_full"
    for _ in range(4):
        admission.admit(Client("light"), 1)
    assert refusal(lambda: admission.admit(Client("light"), 1))[0] == "queue_full"


def test_decoded_bytes_are_never_exceeded(admission: Admission) -> None:
    """A request that exceeds the limit alone gets no retry time; one that does so with others gets one."""
    one = admission.admit(A, 1)
    assert refusal(lambda: one.reserve("decoded bytes", 601)) == ("pictures_too_large", None)
    one.reserve("decoded bytes", 500)
    two = admission.admit(A, 1)
    assert refusal(lambda: two.reserve("decoded bytes", 200)) == ("client_busy", 7)
    other = admission.admit(B, 1)
    assert refusal(lambda: other.reserve("decoded bytes", 600)) == ("queue_full", 7)


def test_parts_of_a_key_share_its_quota_and_weight(admission: Admission) -> None:
    """Several X-Client-Id values give a key neither more pairs nor a larger share of the device."""
    parts = [Client("a", part, weight=6.0) for part in ("x", "y", "z")]
    tickets = [admission.admit(part, 1) for part in parts]
    assert [ticket.weight for ticket in tickets] == [2.0, 2.0, 2.0]
    tickets[0].set("pairs", 30)
    assert refusal(lambda: tickets[1].set("pairs", 2))[0] == "client_busy"
    tickets[2].close()
    assert tickets[0].weight == 3.0
    anonymous = [admission.admit(Client(part=part), 1) for part in ("x", "y")]
    assert [ticket.weight for ticket in anonymous] == [1.0, 1.0]
    assert anonymous[0].client.account != anonymous[1].client.account


def test_clients_cannot_impersonate_each_other() -> None:
    """An X-Client-Id never shares a queue with a key, nor with a part of another key."""
    clients = [Client("a"), Client(part="a"), Client("a", "b"), Client("b", "a")]
    assert len({client.queue for client in clients}) == len(clients)


def test_closed_ticket_releases_all_resources(admission: Admission) -> None:
    """Nothing stays reserved after an error, nor after closing twice."""
    ticket = admission.admit(A, 50)
    ticket.reserve("decoded bytes", 300)
    assert not admission.idle
    with pytest.raises(ZeroDivisionError), ticket:
        raise ZeroDivisionError
    ticket.close()
    assert admission.idle
    assert admission.used == dict.fromkeys(RESOURCES, 0)
    assert not admission._accounts


def test_closed_ticket_reserves_nothing(admission: Admission) -> None:
    """A decoder that is still running after its client disconnected stops and reserves nothing."""
    ticket = admission.admit(A, 1)
    ticket.close()
    assert refusal(lambda: ticket.reserve("decoded bytes", 1))[0] == "deadline_exceeded"
    ticket.set("body bytes", 0)
    assert admission.used == dict.fromkeys(RESOURCES, 0)


def test_concurrent_requests_respect_the_limits(admission: Admission) -> None:
    """With many threads the limits hold, and nothing stays reserved at the end."""
    highest = 0

    def send_requests(number: int) -> None:
        nonlocal highest
        for _ in range(300):
            try:
                with admission.admit(Client(f"c{number % 4}"), 20) as ticket:
                    ticket.reserve("decoded bytes", 90)
                    highest = max(highest, admission.used["decoded bytes"])
            except ProblemError:
                pass

    threads = [threading.Thread(target=send_requests, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 90 <= highest <= LIMITS.max_decoded_bytes
    assert admission.idle
    assert admission.used == dict.fromkeys(RESOURCES, 0)
