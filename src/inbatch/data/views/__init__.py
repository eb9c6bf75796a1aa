"""Augmented views: each image of a batch is drawn V times on its device, with independent random numbers."""

from inbatch.data.views.module import ViewTransform
from inbatch.data.views.own_views import AnyViews, TransformedViews, own_views, sizes_of
from inbatch.data.views.pipeline import Drawn, Views
from inbatch.data.views.presets import PRESETS, make_views
from inbatch.data.views.view import View

__all__ = [
    "PRESETS",
    "AnyViews",
    "Drawn",
    "TransformedViews",
    "View",
    "ViewTransform",
    "Views",
    "make_views",
    "own_views",
    "sizes_of",
]
