"""Laws of what was used last."""

from infra.recent import Recent


def test_the_least_recently_used_leaves_first_and_bytes_stay_within_their_bound() -> None:
    recent: Recent[str, int] = Recent(max_bytes=10)
    for number, key in enumerate("abc"):
        recent.keep(key, number, 4)
        assert recent.find("a") == 0  # used again, so it stays
    assert (recent.find("b"), recent.find("c")) == (None, 2)
    recent.keep("a", 5, 7)  # in place of what it was, not beside it
    assert (recent.find("a"), recent.find("c")) == (5, None)
    recent.keep("whole", 1, 11)
    assert (recent.find("whole"), recent.num_bytes) == (None, 0)
