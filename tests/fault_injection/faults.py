"""All faults of the suite, in the order of their numbers."""

from . import files, images, numbers, stops, surroundings
from .stage import Drill

DRILLS: list[Drill] = sorted(
    [*files.DRILLS, *images.DRILLS, *numbers.DRILLS, *stops.DRILLS, *surroundings.DRILLS], key=lambda d: d.number
)
