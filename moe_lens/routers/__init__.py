"""What a router decides, as pure functions of its logits, and which Hugging Face router follows which
rule.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
