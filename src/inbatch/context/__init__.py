"""Plug-ins by which the samples of a context group interact before the loss, independent of the method."""
