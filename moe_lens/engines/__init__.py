"""moe_lens inside other programs: benchmarks of lm-evaluation-harness, groups of processes, vLLM."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
