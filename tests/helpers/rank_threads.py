"""Ranks as threads of one process, each with its own rows: to test equations without processes."""

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inbatch.nn.tiles import using


class Board:
    """Values that threads exchange at successive points of their programs."""

    def __init__(self, world: int) -> None:
        self.barrier, self.shown = threading.Barrier(world), [None] * world

    def show(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all threads."""
        self.shown[rank] = value
        self.barrier.wait(30)
        values = list(self.shown)
        self.barrier.wait(30)
        return values


class ThreadPeers:
    """`nn.tiles.Peers` among threads; counts the numbers that it sends to other ranks by kind."""

    def __init__(self, board: Board, rank: int, world: int) -> None:
        self.board, self.rank, self.world, self.sent = board, rank, world, {"add": 0, "gather": 0, "exchange": 0}

    def add(self, x: Tensor) -> None:
        self.sent["add"] += x.numel()
        x.copy_(torch.stack(self.board.show(self.rank, x.clone())).sum(0))

    def largest(self, x: Tensor) -> None:
        x.copy_(torch.stack(self.board.show(self.rank, x.clone())).amax(0))

    def sizes(self, x: Tensor) -> list[int]:
        return self.board.show(self.rank, len(x))

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        self.sent["gather"] += x.numel()
        return torch.cat(self.board.show(self.rank, x.detach().clone()))

    def exchange(self, tensors: Sequence[Tensor], offset: int, rows: int) -> Callable[[], list[Tensor]]:
        self.sent["exchange"] += sum(x.numel() for x in tensors)
        every = self.board.show(self.rank, [x.detach().clone() for x in tensors])
        arrived = every[(self.rank - offset) % self.world]
        assert all(len(x) == rows for x in arrived)
        return lambda: arrived


def on_threads(world: int, function: Callable[..., Any], *args: Any, **plan: Any) -> list[Any]:
    """Return the result of `function(rank, *args)` of each of `world` threads with their own rows."""
    board, results, errors = Board(world), [None] * world, []

    def run(rank: int) -> None:
        try:
            with using(peers=ThreadPeers(board, rank, world), **plan):
                results[rank] = function(rank, *args)
        except BaseException as error:
            errors.append(error)
            board.barrier.abort()

    context = contextvars.copy_context
    threads = [threading.Thread(target=context().run, args=(run, rank)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors, errors
    return results
