"""Hook points on routing: `RoutedModel` on a Hugging Face model as it is, `HookedMoE` in the TransformerLens
bridge around one.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
