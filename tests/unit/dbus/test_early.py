"""Calls before the service is ready: one user's do not keep out another's."""

from __future__ import annotations

from hostimage_dbus.early import IN_ALL, PER_NAME, PER_UID, REMEMBERED, ROOT_RESERVE, UNKNOWN, EarlyCalls


class Bench:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.calls: EarlyCalls[str] = EarlyCalls(self.asked.append, self.refused.append)

    def add(self, name: str, count: int) -> None:
        for number in range(count):
            self.calls.add(name, f"{name}/{number}")

    def taken(self) -> list[str]:
        return list(self.calls.take())


def test_in_order() -> None:
    bench = Bench()
    bench.add("a", 2)
    bench.add("b", 1)
    bench.calls.answered("b", 2)
    bench.calls.answered("a", 1)
    bench.add("a", 1)
    assert bench.asked == ["a", "b"]
    assert bench.taken() == ["b/0", "a/0", "a/1", "a/0"]
    assert len(bench.calls) == 0


def test_a_connection_of_nobody_known() -> None:
    bench = Bench()
    bench.add("a", PER_NAME + 3)
    assert len(bench.refused) == 3
    assert bench.asked == ["a"]
    assert len(bench.taken()) == PER_NAME


def test_one_who_left_is_not_answered() -> None:
    bench = Bench()
    bench.add("a", 3)
    bench.calls.answered("a", None)
    assert (bench.taken(), bench.refused) == ([], [])


def test_a_user_with_all_connections_the_bus_allows_keeps_nobody_out() -> None:
    bench = Bench()
    for number in range(256):
        bench.add(f"flood{number}", 100)
    bench.add("other", 1)
    assert "other/0" not in bench.refused
    for number in range(256):
        bench.calls.answered(f"flood{number}", 1000)
    bench.calls.answered("other", 1001)
    taken = bench.taken()
    assert "other/0" in taken
    assert len(taken) == PER_UID + 1


def test_many_users_keep_root_not_out() -> None:
    bench = Bench()
    for uid in range(1, 1 + IN_ALL // PER_UID):
        bench.add(f"user{uid}", 1)
        bench.calls.answered(f"user{uid}", uid)
        bench.add(f"user{uid}", PER_UID)
    assert len(bench.calls) == IN_ALL
    bench.add("more", 1)
    bench.calls.answered("more", 4000)
    assert bench.refused[-1] == "more/0"
    bench.add("root", 1)
    bench.calls.answered("root", 0)
    bench.add("root", ROOT_RESERVE)
    assert bench.refused[-1] == f"root/{ROOT_RESERVE - 1}"
    assert sum(call.startswith("root") for call in bench.taken()) == ROOT_RESERVE


def test_memory_is_bounded() -> None:
    bench = Bench()
    for number in range(UNKNOWN * 2):
        bench.add(f"n{number}", 1)
    assert len(bench.calls) == UNKNOWN
    assert len(bench.refused) == UNKNOWN
    assert len(bench.asked) == UNKNOWN
    for number in range(UNKNOWN):
        bench.calls.answered(f"n{number}", number)
    assert len(bench.calls._uids) == REMEMBERED
    bench.calls.clear()
    assert bench.taken() == []
