"""Parameters of one view; those named after an operation alone (`flip`, `jitter`, ...) are probabilities."""

from dataclasses import dataclass, replace
from typing import Literal

from inbatch.errors import ConfigError

Interpolation = Literal["bilinear", "bicubic"]
Range = tuple[float, float]


@dataclass(frozen=True)
class View:
    """Parameters of one view of an image.

    The operations are applied in this order: crop, flip, affine map, colour jitter, greyscale, blur, solarise, exposure
    (gain and offset), noise. An operation with default values is not applied.

    Attributes:
        size: Side of the square view in pixels.
        scale: Range of the area of the random resized crop as a fraction of the image (Szegedy et al. 2015, drawn as in
            torchvision). None: no random crop but the largest centred square, times `centre`.
        ratio: Range of width / height of the random resized crop.
        centre: Fraction of the largest centred square, if `scale` is None.
        interpolation: "bilinear" or "bicubic".
        flip: Probability of a left-to-right flip.
        jitter: Probability of the colour jitter.
        brightness, contrast, saturation, hue: Strengths as in torchvision, applied in random order; hue in turns.
        grey: Probability of greyscale.
        blur: Probability of the blur.
        kernel: Width of the blur in pixels, odd; 0: a tenth of `size`, made odd (SimCLR, appendix A).
        sigma: Range of the blur's standard deviation in pixels.
        solarise: Probability of solarisation.
        threshold: Solarise inverts the values from here on (values are in [0, 1]).
        zoom: Range of the zoom factor of the affine map about the centre.
        aspect: Largest factor between width and height.
        rotation, shear: Largest angles in degrees, in both directions.
        shift: Largest shift as a fraction of the side, in both directions.
        padding: Pixels outside the image after the affine map: "zeros" or "border".
        gain, offset: Ranges of x -> gain x + offset.
        noise: Standard deviation of additive noise.

    Raises:
        ConfigError: If a value is invalid.
    """

    size: int
    scale: Range | None = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    centre: float = 1.0
    interpolation: Interpolation = "bilinear"
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    kernel: int = 0
    sigma: Range = (0.1, 2.0)
    solarise: float = 0.0
    threshold: float = 0.5
    zoom: Range = (1.0, 1.0)
    aspect: float = 1.0
    rotation: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    padding: Literal["zeros", "border"] = "zeros"
    gain: Range = (1.0, 1.0)
    offset: Range = (0.0, 0.0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            _require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} is not a probability in [0, 1]")
        for name in ("scale", "ratio", "sigma", "zoom", "gain", "offset"):
            low, high = getattr(self, name) or (1, 1)
            positive = low > 0 or name in ("gain", "offset")
            _require(low <= high and positive, f"{name}=({low}, {high}) is not a range from low to high above 0")
        for name in ("brightness", "contrast", "saturation", "noise", "shift"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is below 0")
        _require(self.size >= 1, f"size={self.size} is not a number of pixels")
        _require(self.scale is None or self.scale[1] <= 1, f"scale={self.scale} exceeds the whole image")
        _require(0 < self.centre <= 1, f"centre={self.centre} is not a share of the image in (0, 1]")
        _require(self.aspect >= 1, f"aspect={self.aspect} is below 1")
        _require(0 <= self.hue <= 0.5, f"hue={self.hue} is not in [0, 0.5] turns")
        _require(0 <= self.shear < 90, f"shear={self.shear} is not in [0, 90) degrees")
        _require(self.interpolation in ("bilinear", "bicubic"), f"interpolation={self.interpolation!r} is unknown")
        _require(self.padding in ("zeros", "border"), f"padding={self.padding!r} is unknown")
        if self.blur:
            fits = 3 <= self.taps < 2 * self.size and self.taps % 2 == 1
            _require(fits, f"a blur {self.taps} pixels wide needs an odd width >= 3 and a view of more than half of it")

    @property
    def taps(self) -> int:
        """Return the width of the blur's kernel in pixels."""
        return self.kernel or int(0.1 * self.size) // 2 * 2 + 1

    @property
    def needs_colour(self) -> bool:
        """Return whether the view is only defined for red, green and blue."""
        return bool(self.grey or (self.jitter and (self.saturation or self.hue)))

    def without_colour(self) -> "View":
        """Return the view without the operations that need red, green and blue."""
        return replace(self, saturation=0.0, hue=0.0, grey=0.0)


def _require(true: bool, fault: str) -> None:
    if not true:
        raise ConfigError(f"A view cannot be drawn: {fault}. Change this value of the view or preset.")
