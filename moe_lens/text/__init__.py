"""Prompts, pairs of prompts, and which of their tokens count."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
