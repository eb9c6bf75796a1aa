"""Whether continued training has helped, and which weights to use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inbatch.apps.adaptation.gain import Gain
from inbatch.errors import listed, many

HELPED, NOT_SHOWN, NO_HELP = "helped", "not shown", "did not help"


@dataclass(frozen=True)
class Verdict:
    """The figures before and after training, and what follows from them.

    Attributes:
        accuracy: Gains in k-NN ("knn") and linear probe ("linear"); empty without labels.
        measures: Gains in measures without labels.
        collapsed: Numbers of the runs whose outputs have collapsed.
        seeds: Number of seeds.
        images: Number of test images; 0 without labels.
    """

    accuracy: Mapping[str, Gain]
    measures: Mapping[str, Gain]
    collapsed: Sequence[int]
    seeds: int
    images: int = 0

    @property
    def kind(self) -> str:
        """HELPED, NOT_SHOWN or NO_HELP; k-NN decides, and a linear probe that has become worse can object.

        Without labels no measure shows that features are more useful; a collapse shows that they are not.
        """
        if self.collapsed:
            return NO_HELP
        if not self.accuracy:
            return NOT_SHOWN
        knn, linear = self.accuracy["knn"], self.accuracy["linear"]
        if knn.mean <= 0:
            return NO_HELP
        return HELPED if knn.shows(1) and not linear.shows(-1) else NOT_SHOWN

    @property
    def best(self) -> int:
        """Number of the seed whose weights have the highest k-NN, the first of equals; 0 without labels."""
        after = self.accuracy["knn"].after if self.accuracy else (0.0,)
        return after.index(max(after))

    def sentence(self) -> str:
        """Return the verdict in one sentence, without the weights to use."""
        start = {HELPED: "Adaptation helped", NOT_SHOWN: "It is not shown that adaptation helped"}
        return f"{start.get(self.kind, 'Adaptation did not help')}: {self._reason()}"

    def _reason(self) -> str:
        if self.collapsed:
            return f"the outputs of {listed([f'seed {seed}' for seed in self.collapsed])} collapsed"
        if not self.accuracy:
            return "the images have no labels, and no measure without labels can show it"
        knn, linear = self.accuracy["knn"], self.accuracy["linear"]
        means = (sum(values) / len(values) for values in (knn.before, knn.after))
        change = "k-NN changed from {:.1%} to {:.1%}".format(*means)
        text = f"{change} ({described(knn)}; {many(self.seeds, 'seed')}, {many(self.images, 'test image')})"
        if self.kind == NOT_SHOWN and knn.shows(1):
            text += f", but the linear probe became worse ({described(linear)})"
        elif self.kind == NOT_SHOWN:
            why = "one seed has no spread" if knn.low is None else "the interval contains 0"
            text += f"; {why}: more seeds (--seeds) or test images can decide"
        return text

    def json(self) -> dict[str, Any]:
        """Return the content of verdict.json that follows from the figures."""
        return {
            "verdict": self.kind,
            "seeds": self.seeds,
            "test_images": self.images,
            "accuracy": {name: gain.json() for name, gain in self.accuracy.items()},
            "unlabelled": {name: gain.json() for name, gain in self.measures.items()},
            "collapsed": list(self.collapsed),
        }


def described(gain: Gain) -> str:
    """Return a gain in accuracy as text, in points, with its interval."""
    if gain.low is None or gain.high is None:
        return f"{100 * gain.mean:+.1f} points"
    return f"{100 * gain.mean:+.1f} points, 95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
