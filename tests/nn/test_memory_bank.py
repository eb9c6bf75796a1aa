"""Memory bank compared with a plain queue."""

import collections

import torch
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from inbatch.nn.memory_bank import MemoryBank


@examples(60)
@given(size=st.integers(1, 9), pushes=st.lists(st.integers(0, 20), max_size=8))
def test_queue_keeps_the_newest(size: int, pushes: list[int]) -> None:
    """For any number of rows at a time, also more than fit: a deque, and a ring written row by row."""
    queue = MemoryBank(size, 1)
    newest = collections.deque(queue.rows.flatten().tolist(), maxlen=size)
    ring, written = list(newest), 0
    for n in pushes:
        rows = [float(written + i) for i in range(n)]
        queue.push(torch.tensor(rows).reshape(n, 1))
        for row in rows:
            newest.append(row)
            ring[written % size] = row
            written += 1
        pointer = written % size
        assert queue.pointer == pointer and queue.filled == min(written, size)
        assert queue.rows.flatten().tolist() == ring
        assert torch.roll(queue.rows.flatten(), -pointer).tolist() == list(newest)


def test_queue_starts_with_random_unit_rows_and_is_saved_whole() -> None:
    queue, other = MemoryBank(50, 8), MemoryBank(50, 8)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(50))
    assert not torch.equal(queue.rows, other.rows)
    queue.push(torch.randn(30, 8))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.push(torch.ones(30, 8))
    assert torch.equal(queue.rows, other.rows) and queue.filled == other.filled == 50
