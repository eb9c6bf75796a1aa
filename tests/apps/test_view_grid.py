"""Picture of images and their views: position of each part."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from inbatch.apps.reports.view_grid import _CELL, _COLOURS, _GAP, grid, save_grid, save_sheet
from inbatch.data.views import Drawn
from inbatch.errors import ConfigError

RED, GREEN = (np.array(ImageColor.getrgb(c)) for c in _COLOURS[:2])
STEP = _CELL + _GAP


def drawn(channels: int = 3) -> Drawn:
    """Draw two views of two 32 pixel images: all white, and mid grey; the first box is the lower right quarter."""
    boxes = torch.tensor([[[16, 16, 16, 16]] * 2, [[0, 0, 8, 32]] * 2])
    images = (torch.full((2, channels, 16, 16), 2.0), torch.zeros(2, channels, 24, 24))
    return Drawn(images, boxes, torch.zeros(2, 2, dtype=torch.bool))


def test_images_boxes_and_views_are_in_their_cells():
    picture = grid(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), drawn(), [0.5] * 3, [0.25] * 3)
    assert picture.dtype == np.uint8 and picture.shape == (2 * STEP + _GAP, 3 * STEP + _GAP, 3)
    for top in (_GAP, _GAP + STEP):
        cell = picture[top : top + _CELL, _GAP : _GAP + _CELL]
        first = np.argwhere((cell == RED).all(-1))
        assert first.min(0).tolist() == [48, 48] and first.max(0).tolist() == [95, 95]
        second = np.argwhere((cell == GREEN).all(-1))
        assert second.min(0).tolist() == [0, 0] and second.max(0).tolist() == [23, 95]
        assert (cell[30, 20] == 0).all()
        views = [picture[top : top + _CELL, _GAP + n * STEP :][:, :_CELL] for n in (1, 2)]
        assert (views[0][0] == RED).all() and (views[1][0] == GREEN).all()
        assert (views[0][48, 48] == 255).all() and (views[1][48, 48] == 128).all()


def test_images_of_several_sizes_and_channels():
    for channels in (1, 2, 5):
        images = [
            torch.full((channels, 40, 20), 90, dtype=torch.uint8),
            torch.zeros(channels, 10, 10, dtype=torch.uint8),
        ]
        picture = grid(images, drawn(channels), [0.5] * channels, [0.25] * channels)
        assert (picture[_GAP + 90, _GAP + 20] == 90).all(), "a tall image keeps its shape"
        assert (picture[_GAP + 90, _GAP + 60] == 255).all()


def test_the_file_holds_the_picture(tmp_path):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    save_grid(tmp_path / "views.png", images, drawn(), [0.5] * 3, [0.25] * 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "views.png")), grid(images, drawn(), [0.5] * 3, [0.25] * 3))


def test_unsupported_file_format_is_refused(tmp_path: Path) -> None:
    """Pillow reads PSD files and writes none."""
    with pytest.raises(ConfigError, match="unknown file extension"):
        save_sheet(tmp_path / "sheet.psd", [[torch.zeros(3, 4, 4, dtype=torch.uint8)]])
    assert not list(tmp_path.iterdir())
