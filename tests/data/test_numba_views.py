"""Compiled kernel against torch and torchvision; and the path of accelerators, which never synchronises."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_views import CLOSE, batch, per_image, photos
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as tv

from inbatch import rng
from inbatch.batch import Batch
from inbatch.data.views import PRESETS, View, Views, numba_backend, operation, pipeline
from inbatch.errors import DataError

MEAN, STD = [0.4, 0.5, 0.6, 0.5, 0.5], [0.2, 0.25, 0.3, 0.2, 0.2]
JITTER = dict(jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
EVERYTHING = View(32, **JITTER, grey=0.2, blur=0.5, kernel=5, solarise=0.2)
DOES = [
    name
    for name, preset in PRESETS.items()
    if all(numba_backend.supports([step for step, _ in pipeline.operations(view)]) for view in preset())
]


def both(views, b: Batch, channels: int = 3) -> tuple:
    """Draw views by the kernel, and by torch."""
    return tuple(Views(views, MEAN[:channels], STD[:channels], fused=how)(b) for how in (None, False))


def assert_same(ours, theirs, solarised: bool = False) -> None:
    """Compare views; rounding may put a pixel on the other side of the threshold of solarise."""
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.flipped, theirs.flipped)
    for x, y in zip(ours.images, theirs.images, strict=True):
        assert x.shape == y.shape and x.is_contiguous()
        error = (x - y).abs() * min(STD)
        assert error.median() < 1e-6
        assert (error > 1e-5).float().mean() < 1e-4 if solarised else error.max() < 1e-5


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """Return a list that gets one entry for each call of the kernel."""
    calls, real = [], numba_backend.draw_views

    def counted(view, *rest):
        calls.append(view.size)
        return real(view, *rest)

    monkeypatch.setattr(numba_backend, "draw_views", counted)
    return calls


def test_kernel_draws_the_presets_that_it_supports(used):
    assert set(PRESETS) - set(DOES) == {"digits", "digits_colour"}
    Views(PRESETS["digits"](), MEAN[:1], STD[:1])(batch(photos(2, 1)))
    assert not used
    Views([View(8), View(16), View(8, noise=0.1)], MEAN[:3], STD[:3])(batch(photos(2)))
    assert used == [8, 16]


@pytest.mark.grid(10)
@pytest.mark.parametrize("name", DOES)
@pytest.mark.parametrize("layout", ["canvas", "crops"])
def test_presets_equal_torchs(name, layout, used):
    views, index = PRESETS[name](), torch.arange(5)
    if layout == "canvas":
        size = torch.tensor([[250, 180], [33, 40], [100, 250], [250, 250], [64, 64]])
        b = batch(photos(5, h=250, w=250), size=size)
    else:
        crops = tuple(photos(5, h=v.size, w=v.size).roll(i, 3) for i, v in enumerate(views))
        b = Batch(index, index, seed=3, crops=crops, boxes=torch.zeros(len(views), 5, 4, dtype=torch.long))
    ours, theirs = both(views, b)
    assert used
    assert_same(ours, theirs, solarised=any(v.solarise for v in views))


@pytest.mark.parametrize("size", [1, 7, 13, 32, 50])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_every_size_of_image_and_view(size, how):
    """Lines shorter than a vector, with and without a remainder, enlarged, reduced and unchanged."""
    sizes = [[1, 1], [1, 50], [60, 2], [size, size], [7, 9], [33, 31], [200, 300], [300, 65]]
    view = View(size, interpolation=how, scale=(0.3, 1.0), **JITTER, grey=0.2)
    images = photos(len(sizes) * 2, h=300, w=300)
    b = batch(images, size=torch.tensor(sizes).repeat(2, 1))
    assert_same(*both([view, View(size, scale=None, flip=1.0)], b))


@pytest.mark.parametrize("size, taps", [(2, 3), (12, 23), (20, 5), (41, 11)])
def test_every_size_of_blur(size, taps):
    assert_same(*both([View(size, blur=0.9, kernel=taps, sigma=(0.1, 4.0))], batch(photos(12))))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_kernel_draws_any_number_of_channels(channels, used):
    view = View(24, jitter=1.0, brightness=0.4, contrast=0.4, blur=0.5, kernel=3)
    assert_same(*both([view], batch(photos(16, channels)), channels))
    assert used


def test_single_operations_equal_torchvisions():
    """On finished crops, so that only the one operation applies; the settings are those that were drawn."""
    photo, index = photos(16), torch.arange(16)
    x, boxes = photo.float() / 255, torch.zeros(1, 16, 4, dtype=torch.long)
    u = rng.uniform(3, 0, index, 0, pipeline.COLUMNS)
    for setting, function in (
        (dict(jitter=1.0, brightness=0.8), tv.adjust_brightness),
        (dict(jitter=1.0, contrast=0.8), tv.adjust_contrast),
        (dict(jitter=1.0, saturation=0.8), tv.adjust_saturation),
        (dict(jitter=1.0, hue=0.5), tv.adjust_hue),
        (dict(grey=1.0), lambda image: tv.rgb_to_grayscale(image, 3)),
        (dict(blur=1.0), lambda image, sigma: tv.gaussian_blur(image, [3, 3], [sigma, sigma])),
        (dict(solarise=1.0), lambda image: tv.solarize(image, 0.5)),
        (dict(flip=1.0), tv.horizontal_flip),
        (dict(), lambda image: image),
    ):
        view = View(32, **{"flip": 0.0, **setting})
        settings = [step.settings_of(u[:, columns]) for step, columns in pipeline.operations(view)]
        drawn = []
        if "jitter" in setting:
            _, factors, turns, _ = settings[0]
            names = ["brightness", "contrast", "saturation"]
            drawn = [(turns if "hue" in setting else factors[:, names.index(list(setting)[1])]).tolist()]
        elif "blur" in setting:
            drawn = [settings[0][1].tolist()]
        ours = Views([view], [0.0] * 3, [1.0] * 3)(Batch(index, index, 3, crops=(photo,), boxes=boxes)).images[0]
        torch.testing.assert_close(ours, per_image(function, x, *drawn), **CLOSE, msg=str(setting))


def test_threads_pieces_and_neighbours_change_no_bit(monkeypatch):
    monkeypatch.setattr(numba_backend, "_MIN_THREADED", 0)
    views = Views([EVERYTHING, replace(EVERYTHING, size=20)], MEAN[:3], STD[:3])
    b = batch(photos(37, h=60, w=48))
    whole, before = views(b), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for size in (37, 10, 1) if threads < 5 else (37,):
                pieces = [views(part) for part in b.split(size)]
                for v, x in enumerate(whole.images):
                    assert torch.equal(torch.cat([piece.images[v] for piece in pieces]), x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(numba_backend, "_MIN_THREADED", 0)
    views, b = Views([View(8, **JITTER)], MEAN[:3], STD[:3]), batch(photos(8, h=12, w=12))
    torch.set_num_threads(2)
    try:
        first = views(b).images[0]
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(views(b).images[0], first) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


def test_images_with_other_strides_are_read_and_not_changed():
    """`at` indexes the images of a data set; a canvas with other strides; attempts."""
    images = photos(9, h=40, w=36)
    kept, at, index = images.clone(), torch.tensor([8, 0, 3, 3]), torch.tensor([5, 6, 7, 8])
    views = Views([EVERYTHING], MEAN[:3], STD[:3])
    lying = views(batch(images, index=index, at=at)).images[0]
    assert torch.equal(lying, views(batch(images[at], index=index)).images[0])
    assert torch.equal(images, kept)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(lying, views(batch(strided, index=index, at=at)).images[0])
    assert torch.equal(lying, views(batch(images.mT.contiguous().mT, index=index, at=at)).images[0])
    tried = batch(images, attempt=torch.arange(9) % 3)
    assert_same(*both([EVERYTHING], tried), solarised=True)
    once = views(replace(tried, attempt=torch.ones(9, dtype=torch.long))).images[0]
    assert torch.equal(views(tried).images[0][1::3], once[1::3]) and not torch.equal(views(tried).images[0], once)
    assert views(batch(images[:0])).images[0].shape == (0, 3, 32, 32)


def test_boxes_outside_of_an_image_are_refused():
    views, images = Views([View(8)], MEAN[:3], STD[:3]), photos(3)
    with pytest.raises(DataError, match="sizes and places"):
        views(batch(images, size=torch.full((3, 2), 400)))
    with pytest.raises(DataError, match="image 3"):
        views(batch(images, at=torch.tensor([0, 1, 3])))


def test_torch_draws_if_numba_is_missing(monkeypatch, used):
    monkeypatch.setattr(numba_backend, "available", lambda: False)
    ours, theirs = both([EVERYTHING], batch(photos()))
    assert torch.equal(ours.images[0], theirs.images[0]) and not used


@pytest.mark.slow
def test_numba_waits_for_the_first_view():
    script = "import inbatch.data.views, inbatch.api, sys; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_kernel_is_compiled_without_a_cache_folder(monkeypatch):
    from inbatch.data.views import numba_kernel

    def njit(signature=None, cache=False, **rest):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(numba_kernel.numba, "njit", njit)
    assert numba_kernel._compiled() is numba_kernel._draw


# Accelerators


class Asked(TorchDispatchMode):
    """Record operations that make the program wait for their result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ("local_scalar_dense", "nonzero", "masked_select", "unique", "is_all_true")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["simclr_cifar", "byol_cifar", "swav_cifar", "digits_colour"])
def test_an_accelerator_is_never_waited_for(monkeypatch, name):
    monkeypatch.setattr(operation, "can_branch", lambda x: False)
    views, b = Views(PRESETS[name](), MEAN[:3], STD[:3]), batch(photos(6), attempt=torch.arange(6) % 3)
    with Asked() as asked:
        views(b)
        assert not asked.names
        bool(b.index.any())
        assert asked.names  # an example of a synchronising operation


def test_an_attempt_of_each_sample_is_that_attempt():
    attempt = torch.tensor([0, 3, 1, 0, 700])
    u = rng.uniform(2**62, 5, torch.arange(5), 2, 4, attempt)
    for i, n in enumerate(attempt.tolist()):
        assert torch.equal(u[i], rng.uniform(2**62, 5, torch.arange(5), 2, 4, n)[i])


COMPILED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from test_views import batch, photos
from torch._dynamo.utils import counters
from inbatch.data.views import View, Views, operation
operation.can_branch = lambda x: False
view = View(16, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5, kernel=3,
            solarise=0.2, gain=(0.9, 1.1), noise=0.1, shift=0.1)
views, b = Views([view, view, View(12)], [0.5] * 3, [0.25] * 3), batch(photos(8))
steps = [b, replace(b, epoch=1), replace(b, epoch=2, seed=9)]
expected = [views(step) for step in steps]
views.compile(backend="eager", fullgraph=True)
for step, theirs in zip(steps, expected, strict=True):
    ours = views(step)
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.flipped, theirs.flipped)
    for mine, plain in zip(ours.images, theirs.images, strict=True):  # equal with torch 2.15; 2.11 rounds once more
        assert (mine - plain).abs().max() < 5e-6
assert counters["stats"]["unique_graphs"] == 1, counters
"""


@pytest.mark.slow
def test_one_graph_for_all_epochs():
    """In its own process: in this one shapes in signatures are checked, which a graph cannot contain."""
    done = subprocess.run([sys.executable, "-c", COMPILED, os.path.dirname(__file__)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
