"""Views: a batch of images becomes V batches of views, on the device, with an own random draw per image."""

from inbatch.data.views.pipeline import Drawn, Views
from inbatch.data.views.presets import PRESETS, make_views
from inbatch.data.views.view import View

__all__ = ["PRESETS", "Drawn", "View", "Views", "make_views"]
