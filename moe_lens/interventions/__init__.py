"""Who computes, and what they see: hook lists that edit routes and experts, and what such edits show."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
