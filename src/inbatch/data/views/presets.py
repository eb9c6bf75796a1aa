"""View presets of the papers, by name.

The signature of a preset is its schema. The values are those of the authors' code, named above each preset. If the code
does not say otherwise, resizing is bilinear and blur is a Gaussian with a width of a tenth of the view (the TensorFlow
code of SimCLR resizes bicubically; MoCo and SwAV blur with Pillow's approximation).
"""

from collections.abc import Callable, Mapping
from typing import Any

from inbatch.data.views.own_views import own_views, placeholders
from inbatch.data.views.view import View


def _jitter(brightness: float, contrast: float, saturation: float, hue: float, p: float = 0.8) -> dict[str, Any]:
    return dict(jitter=p, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


# google-research/simclr data_util.py, ImageNet.
def simclr(
    size: int = 224,
    strength: float = 1.0,
    blur: float = 0.5,
    grey: float = 0.2,
    min_scale: float = 0.08,
    num_views: int = 2,
) -> tuple[View, ...]:
    """Create the views of SimCLR on ImageNet.

    Args:
        size: Side of the views in pixels.
        strength: Strength of the colour jitter.
        blur: Probability of the blur.
        grey: Probability of greyscale.
        min_scale: Smallest area of a crop as a fraction of the image.
        num_views: Number of views.
    """
    s = strength
    colour = _jitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    return (View(size, scale=(min_scale, 1.0), **colour, grey=grey, blur=blur),) * num_views


# google-research/simclr README.md, CIFAR-10: half the colour, no blur.
def simclr_cifar(
    size: int = 32,
    strength: float = 0.5,
    blur: float = 0.0,
    grey: float = 0.2,
    min_scale: float = 0.08,
    num_views: int = 2,
) -> tuple[View, ...]:
    """Create the views of SimCLR on CIFAR-10: half the colour jitter, no blur."""
    return simclr(size, strength, blur, grey, min_scale, num_views)


# moco@7397dfe main_moco.py. (There, greyscale precedes the jitter; here it follows it.)
def mocov1(size: int = 224, min_scale: float = 0.2, num_views: int = 2) -> tuple[View, ...]:
    """Create the views of MoCo v1: jitter on every image, no blur."""
    return (View(size, scale=(min_scale, 1.0), **_jitter(0.4, 0.4, 0.4, 0.4, p=1.0), grey=0.2),) * num_views


# moco main_moco.py --aug-plus; SimSiam and PCL v2 use the same.
def mocov2(size: int = 224, min_scale: float = 0.2, blur: float = 0.5, num_views: int = 2) -> tuple[View, ...]:
    """Create the views of MoCo v2, SimSiam and PCL v2."""
    return (View(size, scale=(min_scale, 1.0), **_jitter(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=blur),) * num_views


# moco branch colab-notebook, moco_cifar10_demo.ipynb.
def moco_cifar(size: int = 32, min_scale: float = 0.08, num_views: int = 2) -> tuple[View, ...]:
    """Create the views of MoCo's CIFAR-10 demo: no blur."""
    return mocov2(size, min_scale, 0.0, num_views)


# deepmind-research byol/utils/augmentations.py; Barlow Twins and VICReg main*.py; MoCo v3 with min_scale 0.2 (ResNet).
def byol(
    size: int = 224,
    min_scale: float = 0.08,
    blur: float = 1.0,
    blur_second: float = 0.1,
    solarise: float = 0.0,
    solarise_second: float = 0.2,
) -> tuple[View, ...]:
    """Create the asymmetric pair of BYOL, Barlow Twins, VICReg and (min_scale 0.2) MoCo v3, bicubic."""
    shared: dict[str, Any] = dict(
        scale=(min_scale, 1.0), interpolation="bicubic", **_jitter(0.4, 0.4, 0.2, 0.1), grey=0.2
    )
    first = View(size, blur=blur, solarise=solarise, **shared)
    return first, View(size, blur=blur_second, solarise=solarise_second, **shared)


# solo-learn augmentations/asymmetric.yaml, for CIFAR.
def byol_cifar(size: int = 32, min_scale: float = 0.08, solarise_second: float = 0.2) -> tuple[View, ...]:
    """Create the asymmetric pair at 32 pixels: no blur."""
    return byol(size, min_scale, 0.0, 0.0, 0.0, solarise_second)


# SupContrast main_supcon.py.
def supcon(size: int = 32, min_scale: float = 0.2, num_views: int = 2) -> tuple[View, ...]:
    """Create the views of SupCon on CIFAR."""
    return (View(size, scale=(min_scale, 1.0), **_jitter(0.4, 0.4, 0.4, 0.1), grey=0.2),) * num_views


# swav scripts/swav_800ep_pretrain.sh, src/multicropdataset.py.
def swav(
    size: int = 224,
    small_size: int = 96,
    num_large_crops: int = 2,
    num_small_crops: int = 6,
    cut: float = 0.14,
    min_scale: float = 0.05,
    strength: float = 1.0,
    blur: float = 0.5,
) -> tuple[View, ...]:
    """Create SwAV's multi-crop: large views of areas (cut, 1.0), small ones of areas (min_scale, cut)."""
    s = strength
    shared: dict[str, Any] = dict(**_jitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s), grey=0.2, blur=blur)
    views = (View(size, scale=(cut, 1.0), **shared),) * num_large_crops
    return views + (View(small_size, scale=(min_scale, cut), **shared),) * num_small_crops


# SwAV has no CIFAR code; these are its areas, with sizes and SimCLR's CIFAR colours chosen here.
def swav_cifar(
    size: int = 32,
    small_size: int = 16,
    num_large_crops: int = 2,
    num_small_crops: int = 4,
    cut: float = 0.14,
    min_scale: float = 0.05,
) -> tuple[View, ...]:
    """Create multi-crop views of 32-pixel images: half the colour jitter, no blur."""
    return swav(size, small_size, num_large_crops, num_small_crops, cut, min_scale, strength=0.5, blur=0.0)


# dino main_dino.py, DataAugmentationDINO.
def dino(
    size: int = 224, small_size: int = 96, num_small_crops: int = 8, cut: float = 0.4, min_scale: float = 0.05
) -> tuple[View, ...]:
    """Create DINO's multi-crop: BYOL's pair of areas (cut, 1.0), small views of areas (min_scale, cut), bicubic."""
    shared: dict[str, Any] = dict(interpolation="bicubic", **_jitter(0.4, 0.4, 0.2, 0.1), grey=0.2)
    return byol(size, cut) + (View(small_size, scale=(min_scale, cut), **shared, blur=0.5),) * num_small_crops


# CC config/config.yaml, modules/transform.py: s = 0.5, blur for ImageNet-10 and ImageNet-dogs only.
def cc(size: int = 224, strength: float = 0.5, blur: float = 0.0, num_views: int = 2) -> tuple[View, ...]:
    """Create the views of Contrastive Clustering: CIFAR-10 enlarged to 224 pixels."""
    return simclr(size, strength, blur, num_views=num_views)


# htdt/self-supervised cfg.py.
def wmse(size: int = 32, min_scale: float = 0.2, grey: float = 0.1, num_views: int = 2) -> tuple[View, ...]:
    """Create the views of W-MSE on CIFAR: bicubic, grey 0.1. Two or four views."""
    colour = _jitter(0.4, 0.4, 0.4, 0.1)
    return (View(size, scale=(min_scale, 1.0), interpolation="bicubic", **colour, grey=grey),) * num_views


def _handwriting(size: int, strength: float) -> dict[str, Any]:
    s = strength
    return dict(
        size=size,
        scale=None,
        flip=0.0,
        zoom=(1 - 0.25 * s, 1 + 0.35 * s),
        aspect=1 + 0.2 * s,
        rotation=15.0 * s,
        shear=15.0 * s,
        shift=0.35 * s,
        noise=0.05 * s,
    )


# Chosen here: zoom 0.75 to 1.35 and shift 0.35 of the side, from a trial on the embedded digits.
def digits(size: int = 20, strength: float = 1.0, num_views: int = 2) -> tuple[View, ...]:
    """Create views of the embedded digits, one channel: affine map, gain and offset, noise; no mirroring."""
    s = strength
    light: dict[str, Any] = dict(gain=(1 - 0.4 * s, 1 + 0.4 * s), offset=(-0.15 * s, 0.15 * s))
    return (View(**_handwriting(size, s), **light),) * num_views


# Chosen here.
def digits_colour(size: int = 32, strength: float = 1.0, num_views: int = 2) -> tuple[View, ...]:
    """Create views of the embedded digits in colour: affine map, SimCLR's CIFAR colour jitter and greyscale, noise."""
    colour = _jitter(0.4, 0.4, 0.4, 0.1)
    return (View(**_handwriting(size, strength), padding="border", **colour, grey=0.2),) * num_views


def supervised(size: int = 224, min_scale: float = 0.08) -> tuple[View, ...]:
    """Create one view: random resized crop and flip."""
    return (View(size, scale=(min_scale, 1.0)),)


def plain(size: int = 224, centre: float = 1.0) -> tuple[View, ...]:
    """Create one deterministic view: the largest centred square (times `centre`, 0.875 for 256 / 224), resized."""
    return (View(size, scale=None, centre=centre, flip=0.0),)


PRESETS: dict[str, Callable[..., tuple[View, ...]]] = {
    "simclr": simclr,
    "simclr_cifar": simclr_cifar,
    "mocov1": mocov1,
    "mocov2": mocov2,
    "moco_cifar": moco_cifar,
    "byol": byol,
    "byol_cifar": byol_cifar,
    "barlow": byol,
    "vicreg": byol,
    "supcon": supcon,
    "swav": swav,
    "swav_cifar": swav_cifar,
    "dino": dino,
    "cc": cc,
    "wmse": wmse,
    "digits": digits,
    "digits_colour": digits_colour,
    "supervised": supervised,
    "plain": plain,
}
"""Name -> factory of the views of one batch."""


def make_views(name: str, options: Mapping[str, Any], channels: int) -> tuple[View, ...]:
    """Create the views of a name; without saturation, hue and greyscale unless `channels` is three.

    Of views by the user's own transforms only the sides are of use (`own_views.TransformedViews` draws them).
    """
    if name in PRESETS:
        views = PRESETS[name](**options)
    else:
        own = own_views(name, options)
        if not all(isinstance(view, View) for view in own):
            return placeholders(options["sizes"])
        views = own
    return views if channels == 3 else tuple(view.without_colour() for view in views)
