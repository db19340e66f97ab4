"""Steering and counting inside vLLM: a plan for each request, checked before anything is served.

`register` is vLLM's entry point, and runs in vLLM's own environment; the rest is for whoever sends requests,
and needs no vLLM: `plan_args` and `stats_args` write what a request carries, `check_server` and `check_llm`
make sure that somebody reads it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
