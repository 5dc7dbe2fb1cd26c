"""Things in groups."""

from __future__ import annotations

from sdrpc.grouping import grouped


def test_as_many_together_as_fit() -> None:
    def groups(*sizes: int) -> list[list[int]]:
        return list(grouped(sizes, int, lambda count, size: count <= 3 and size <= 10))

    assert groups() == []
    assert groups(1, 1, 1, 1, 1, 1, 1) == [[1, 1, 1], [1, 1, 1], [1]]
    assert groups(5, 5, 1, 9, 1) == [[5, 5], [1, 9], [1]]
    assert groups(11, 0, 10, 12, 13) == [[11], [0, 10], [12], [13]], "what is too much is alone"
