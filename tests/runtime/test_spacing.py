"""Evenly spaced positions, which stay inside lists of any length."""

import torch

from inbatch.data.source import Source
from inbatch.data.sources.arrays import Pixels
from inbatch.runtime.spacing import spaced
from inbatch.training.image_size import natural_size


class Many(Source):
    """More images than float32 can count."""

    def __init__(self) -> None:
        super().__init__("many", 3, torch.tensor(-1).expand(16_777_220), ())

    def open(self, i: int) -> Pixels:
        assert i < len(self)
        return Pixels(torch.zeros(3, 8, 8, dtype=torch.uint8))

    def identity(self, i: int) -> str:
        return str(i)


def test_the_last_of_many_images_is_the_last_position() -> None:
    assert natural_size(Many()) == 8
    for length in (2**24, 2**24 + 1, len(Many()), 2**24 + 5, 10**9):
        for most in (16, 256, 2048):
            places = spaced(length, most)
            steps = places.diff()
            assert places[0] == 0 and places[-1] == length - 1 and len(places) == most
            assert steps.max() - steps.min() <= 2
    assert spaced(len(Many()), 1).tolist() == [0]


def test_positions_in_short_lists_are_those_of_recorded_figures() -> None:
    for length, most in ((0, 16), (1, 16), (7, 16), (596, 256), (10_000, 2048), (1_281_167, 256)):
        assert torch.equal(spaced(length, most), torch.linspace(0, length - 1, min(most, length)).long())
