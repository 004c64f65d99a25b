"""Places that users hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostimaged.bus.limits import Slots
from hostimaged.errors import LimitsExceeded


def test_a_user_has_so_many_places_and_no_more() -> None:
    slots = Slots("questions", per_uid=2, total=10)
    slots.take(1000)
    slots.take(1000)
    with pytest.raises(
        LimitsExceeded, match=r"too many questions of this user are waiting \(the limit is 2\)"
    ):
        slots.take(1000)
    slots.take(1001)
    slots.free(1000)
    slots.take(1000)


def test_all_together_have_so_many_places_and_root_some_more() -> None:
    slots = Slots("questions", per_uid=2, total=3, reserve=2)
    for uid in (1000, 1000, 1001):
        slots.take(uid)
    with pytest.raises(LimitsExceeded, match="too many questions are waiting"):
        slots.take(1002)
    slots.take(0)
    slots.take(0)
    with pytest.raises(LimitsExceeded):
        slots.take(0)


def test_root_is_not_counted_per_user() -> None:
    slots = Slots("questions", per_uid=1, total=3)
    for _ in range(3):
        slots.take(0)


def test_a_place_is_given_back_when_the_work_fails() -> None:
    slots = Slots("questions", per_uid=1, total=1)
    with pytest.raises(ZeroDivisionError), slots.held(1000):
        _ = slots.taken // (slots.taken - 1)
    assert slots.taken == 0
    with slots.held(1000), pytest.raises(LimitsExceeded), slots.held(1000):
        pass
    assert slots.taken == 0


@given(st.lists(st.tuples(st.sampled_from([0, 1000, 1001, 1002]), st.booleans()), max_size=60))
def test_limits_hold_and_nothing_is_kept_of_users_who_hold_nothing(steps: list[tuple[int, bool]]) -> None:
    slots = Slots("questions", per_uid=2, total=4, reserve=1)
    held: list[int] = []
    for uid, take in steps:
        if take:
            others = held.count(uid) if uid else 0
            allowed = others < 2 and len(held) < (5 if uid == 0 else 4)
            if allowed:
                slots.take(uid)
                held.append(uid)
            else:
                with pytest.raises(LimitsExceeded):
                    slots.take(uid)
        elif uid in held:
            slots.free(uid)
            held.remove(uid)
        assert slots.taken == len(held)
        assert set(slots._taken) == set(held)
