"""All faults of the suite, in the order of their numbers."""

from . import files, images, numbers, stops, surroundings
from .stage import Injection

INJECTIONS: list[Injection] = sorted(
    [*files.INJECTIONS, *images.INJECTIONS, *numbers.INJECTIONS, *stops.INJECTIONS, *surroundings.INJECTIONS],
    key=lambda d: d.number,
)
