"""Figures: a function takes a result and returns a matplotlib Axes; and the routing explorer, a page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
