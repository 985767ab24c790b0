"""What is let in: bounds for a client and for all, and what a light caller keeps."""

from __future__ import annotations

import threading

import pytest

from reward_service.config import Limits
from reward_service.protocol import ProblemError
from reward_service.scoring.admission import KINDS, Admission
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


def refusal(work: object) -> tuple[str, int | None]:
    with pytest.raises(ProblemError) as error:
        work()  # type: ignore[operator]
    return error.value.code, error.value.retry_after_s


@pytest.fixture
def admission() -> Admission:
    return Admission(LIMITS, retry_after_s=lambda: 7)


def test_a_clients_pairs_are_bounded(admission: Admission) -> None:
    """Beyond its own bound a client is 429, told when to come back; others are let in."""
    first, second = admission.enter(A, 10), admission.enter(A, 10)
    first.set("pairs", 30)
    assert refusal(lambda: second.set("pairs", 3)) == ("client_busy", 7)
    second.set("pairs", 2)
    assert refusal(lambda: admission.enter(A, 10)) == ("client_busy", 7)
    admission.enter(B, 10)
    first.close()
    admission.enter(A, 10)


def test_a_key_may_have_its_own_quota(admission: Admission) -> None:
    """The number beside the key replaces the service's."""
    small = Client("small", max_pairs=2)
    admission.enter(small, 1)
    admission.enter(small, 1)
    assert refusal(lambda: admission.enter(small, 1))[0] == "client_busy"


def test_one_request_may_exceed_the_pairs(admission: Admission) -> None:
    """With nothing else under way a request is let in however many pairs it has, or it never would be."""
    ticket = admission.enter(A, 10)
    ticket.set("pairs", 100)
    assert admission.used["pairs"] == 100
    assert refusal(lambda: admission.enter(B, 10)) == ("queue_full", 7)


def test_an_unannounced_body_counts_as_the_longest(admission: Admission) -> None:
    """Where Content-Length is missing the limit is reserved until the body is read."""
    tickets = [admission.enter(A, None) for _ in range(3)]
    assert refusal(lambda: admission.enter(A, 1))[0] == "client_busy"
    tickets[0].set("body bytes", 5)
    admission.enter(A, 1)


def test_all_bodies_together_are_bounded(admission: Admission) -> None:
    """Many clients cannot hold more bytes than the service takes, and the last eighth is for small ones."""
    for number in range(8):
        admission.enter(Client(f"c{number}"), 100)
    assert refusal(lambda: admission.enter(Client("one more"), 100)) == ("queue_full", 7)
    small = admission.enter(Client("light"), 60)
    small.close()


def test_a_light_client_gets_in_beside_heavy_ones(admission: Admission) -> None:
    """Heavy clients that fill the queue leave room for somebody's single pairs."""
    for client in (A, B):
        admission.enter(client, 1).set("pairs", 28)
    heavy = admission.enter(C, 1)
    assert refusal(lambda: heavy.set("pairs", 28))[0] == "queue_full"
    for _ in range(4):
        admission.enter(Client("light"), 1)
    assert refusal(lambda: admission.enter(Client("light"), 1))[0] == "queue_full"


def test_decoded_bytes_are_never_exceeded(admission: Admission) -> None:
    """A request that alone would exceed them need not try again; one that would with others has to wait."""
    one = admission.enter(A, 1)
    assert refusal(lambda: one.grow("decoded bytes", 601)) == ("pictures_too_large", None)
    one.grow("decoded bytes", 500)
    two = admission.enter(A, 1)
    assert refusal(lambda: two.grow("decoded bytes", 200)) == ("client_busy", 7)
    other = admission.enter(B, 1)
    assert refusal(lambda: other.grow("decoded bytes", 600)) == ("queue_full", 7)


def test_parts_of_a_key_share_its_quota_and_weight(admission: Admission) -> None:
    """Naming parts with X-Client-Id gets a key neither more pairs nor more of the device."""
    parts = [Client("a", part, weight=6.0) for part in ("x", "y", "z")]
    tickets = [admission.enter(part, 1) for part in parts]
    assert [ticket.weight for ticket in tickets] == [2.0, 2.0, 2.0]
    tickets[0].set("pairs", 30)
    assert refusal(lambda: tickets[1].set("pairs", 2))[0] == "client_busy"
    tickets[2].close()
    assert tickets[0].weight == 3.0
    anonymous = [admission.enter(Client(part=part), 1) for part in ("x", "y")]
    assert [ticket.weight for ticket in anonymous] == [1.0, 1.0]
    assert anonymous[0].client.account != anonymous[1].client.account


def test_a_name_cannot_pass_for_another(admission: Admission) -> None:
    """An anonymous caller cannot take a key's place by its X-Client-Id, nor a key another's."""
    clients = [Client("a"), Client(part="a"), Client("a", "b"), Client("b", "a")]
    assert len({client.queue for client in clients}) == len(clients)


def test_everything_is_given_back(admission: Admission) -> None:
    """After its requests nothing of a client is left, also when they ended in an error or twice."""
    ticket = admission.enter(A, 50)
    ticket.grow("decoded bytes", 300)
    assert not admission.idle
    with pytest.raises(ZeroDivisionError), ticket:
        raise ZeroDivisionError
    ticket.close()
    assert admission.idle
    assert admission.used == dict.fromkeys(KINDS, 0)
    assert not admission._accounts


def test_nothing_is_counted_for_a_request_that_is_over(admission: Admission) -> None:
    """A decoder that is still at work when its caller has left stops, and takes nothing."""
    ticket = admission.enter(A, 1)
    ticket.close()
    assert refusal(lambda: ticket.grow("decoded bytes", 1))[0] == "deadline_exceeded"
    ticket.set("body bytes", 0)
    assert admission.used == dict.fromkeys(KINDS, 0)


def test_many_threads_count_right(admission: Admission) -> None:
    """However threads take turns, the bounds hold and nothing is left at the end."""
    highest = 0

    def come_and_go(number: int) -> None:
        nonlocal highest
        for _ in range(300):
            try:
                with admission.enter(Client(f"c{number % 4}"), 20) as ticket:
                    ticket.grow("decoded bytes", 90)
                    highest = max(highest, admission.used["decoded bytes"])
            except ProblemError:
                pass

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 90 <= highest <= LIMITS.max_decoded_bytes
    assert admission.idle
    assert admission.used == dict.fromkeys(KINDS, 0)
