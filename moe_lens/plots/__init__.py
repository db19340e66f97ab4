"""Figures: a function takes a result and returns a matplotlib Axes. It computes nothing of its own."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
