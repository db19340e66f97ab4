"""`HookedMoE`: hook points on routing, inside a Hugging Face model and the TransformerLens bridge
around it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
