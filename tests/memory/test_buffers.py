"""Lists of buffers: cutting and filling them."""

from __future__ import annotations

import pytest

from ringfence.memory.buffers import scatter, split, total


def buffers(*lengths: int) -> list[memoryview]:
    data = memoryview(bytearray(range(sum(lengths))))
    found = []
    for length in lengths:
        found.append(data[:length])
        data = data[length:]
    return found


@pytest.mark.parametrize("lengths", [(), (5,), (3, 4), (1, 0, 2, 9)])
def test_split(lengths: tuple[int, ...]) -> None:
    whole = b"".join(buffers(*lengths))
    for at in range(len(whole) + 3):
        head, tail = split(buffers(*lengths), at)
        assert (b"".join(head), b"".join(tail)) == (whole[:at], whole[at:])
        assert total(head) == min(at, len(whole))


@pytest.mark.parametrize("lengths", [(), (5,), (3, 4), (1, 0, 2, 9)])
@pytest.mark.parametrize("length", [0, 1, 3, 5, 7, 12, 20])
def test_scatter(lengths: tuple[int, ...], length: int) -> None:
    views = buffers(*lengths)
    before = b"".join(views)
    data = bytes(range(100, 100 + length))
    done = scatter(data, views)
    assert done == min(length, len(before))
    assert b"".join(views) == data[:done] + before[done:]
