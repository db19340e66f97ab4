"""A pytest plugin for the tests of other packages: what they build gets routing hook points.

The environment's MOE_LENS_ATTACHED says what happens to each model, right after it is built or loaded:

- "no": nothing; the tests run as they are.
- "yes": it is attached.
- "hooked": hooks that change nothing stand on all of its points, too.
"""

import os
from functools import wraps
from typing import Any

import pytest

_WAY = os.environ.get("MOE_LENS_ATTACHED", "no")
attached = {"models": 0}


def _attach(model: Any) -> None:
    from transformers import PreTrainedModel

    from moe_lens import attach, hook_names
    from moe_lens.model.attaching import wrapper_of

    if (isinstance(model, PreTrainedModel) and wrapper_of(model) is not None) or not all(
        map(_is_loaded, model.parameters())
    ):
        return
    wrapper: Any = attach(model)
    attached["models"] += 1
    if _WAY == "hooked":
        from moe_lens.model.registration import allow_training

        vars(model)["_kept_open"] = allow_training(wrapper, True)
        vars(model)["_kept_open"].__enter__()
        for layer in wrapper.moe_layers:
            for point in hook_names.POINTS:
                wrapper.add_hook(hook_names.name(layer, point), lambda value, hook: value)


def _is_loaded(parameter: Any) -> bool:
    """Some tests build models whose weights are whatever the memory holds; `attach` refuses NaN."""
    return not parameter.is_meta and bool(parameter.isfinite().all())


def attach_all_of(cls: Any) -> None:
    """Every model of this class is attached once its outermost `__init__` or `from_pretrained` is done."""
    init, from_pretrained, depth = cls.__init__, cls.from_pretrained.__func__, []

    @wraps(init)
    def attached_init(self: Any, *args: Any, **kwargs: Any) -> None:
        depth.append(self)
        try:
            init(self, *args, **kwargs)
        finally:
            depth.pop()
        if type(self) is cls and not depth:
            _attach(self)

    @wraps(from_pretrained)
    def attached_from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = from_pretrained(cls, *args, **kwargs)
        _attach(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    cls.__init__ = attached_init
    cls.from_pretrained = classmethod(attached_from_pretrained)


def attach_all_of_classes(*classes: Any) -> None:
    if _WAY != "no":
        for cls in classes:
            attach_all_of(cls)


def attach_all_bridges() -> None:
    """Every TransformerBridge around an MoE model is attached once its `__init__` is done."""
    from transformer_lens.model_bridge import TransformerBridge

    from moe_lens import UnsupportedRouterError
    from moe_lens.model.registration import find_routing_layers

    init = TransformerBridge.__init__

    @wraps(init)
    def attached_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        try:
            find_routing_layers(self)
        except UnsupportedRouterError:  # dense models, and stand-ins for models
            return
        _attach(self)

    TransformerBridge.__init__ = attached_init


def pytest_configure(config: pytest.Config) -> None:
    if _WAY != "no" and "MOE_LENS_BRIDGES" in os.environ:
        attach_all_bridges()


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"models attached: {attached['models']} ({_WAY})")
