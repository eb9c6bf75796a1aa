"""Continued training of existing weights on other images, with a verdict."""
