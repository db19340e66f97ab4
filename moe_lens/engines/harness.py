"""The command of lm-evaluation-harness, with a model that carries out a plan.

    python -m moe_lens.engines.harness run --model moe_lens \\
        --model_args pretrained=FOLDER,plan=plan.json --tasks arc_easy --output_path results
    ... --model_args pretrained=FOLDER,plan=plan.json,random=0,layer_matched=True    # a random control
    python -m torch.distributed.run --nproc_per_node 2 -m moe_lens.engines.harness run ...

Everything else is as with the harness' own command `lm-eval`, whose model "hf" this one is. What was steered
is written into the results file, under "config".
"""

import sys
from dataclasses import replace
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

import moe_lens
from moe_lens.engines.harness_model import AnyHFLM
from moe_lens.errors import MoELensError, PlanError, warn
from moe_lens.model.routed_model import RoutedModel
from moe_lens.shape import MoEShape
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan


class SteeredLM(AnyHFLM):
    """The harness' Hugging Face model under a steering plan; registered as "moe_lens" by importing this file.

    Args:
        pretrained: folder or name on the hub.
        plan: file of a plan; without one nothing is steered.
        random: seed of a random plan of the same size, which is carried out instead: the control.
        layer_matched: whether the random plan has as many experts in each layer.
        strength: of the soft form; see `steer_hooks`.
        others: of the harness' `HFLM` (dtype, add_bos_token, peft, parallelize, ...). The device is given
            to the command, not here.

    Raises:
        PlanError: a plan that cannot be read or is for a model of another shape.
        UnsupportedRouterError: a model without a router that moe_lens knows.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str | None = None,
        random: int | None = None,
        layer_matched: bool = False,
        strength: float | None = None,
        **kwargs: Any,
    ) -> None:
        if plan is None and (random is not None or layer_matched or strength is not None):
            raise PlanError("random, layer_matched and strength say how a plan is used; give plan=FILE, too.")
        if layer_matched and random is None:
            raise PlanError("layer_matched=True is about a random plan; give its seed, too: random=0.")
        self._wish = (None if plan is None else SteeringPlan.load(plan), random, layer_matched, strength)
        self.steering: dict[str, Any] = {"version": moe_lens.__version__, "plan": plan}
        super().__init__(pretrained=str(pretrained), **kwargs)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:  # on CPUs the harness leaves each process with all documents
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        self._model.eval()
        self.moe = RoutedModel(self._model, self.tokenizer)
        plan, seed, layer_matched, strength = self._wish
        if plan is None:
            return
        given, plan = plan, _for_model(plan, self.moe.moe_shape)
        if seed is not None:
            plan = plan.random_like(seed=seed, layer_matched=layer_matched, model=self.moe)
        for name, hook in steer_hooks(plan, strength=strength):
            self.moe.add_hook(name, hook)
        self.steering |= {
            "plan_digest": given.digest,
            "random": seed,
            "layer_matched": layer_matched,
            "strength": strength,
            "steered_digest": plan.digest,
            "steered": plan.to_json(),
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model, and what was steered."""
        return {**super().get_model_info(), "moe_lens": self.steering}


register_model("moe_lens")(SteeredLM)


def _for_model(plan: SteeringPlan, shape: MoEShape) -> SteeringPlan:
    """The plan for a model of this shape; a checkpoint may have moved to a folder of another name."""
    made_for = plan.shape
    if made_for is not None and made_for.misfits(shape):
        renamed = replace(made_for, model=shape.model)
        if not renamed.misfits(shape):
            warn(f"The plan was made for {made_for.model}, and runs on {shape.model}, of the same shape.")
            return plan.made_for(shape)
    plan.check_fits(shape)
    return plan


def main() -> int:
    """The harness' command; the exit status is 1 after an error that the user can mend."""
    try:
        cli_evaluate()
    except MoELensError as error:
        print(f"moe_lens: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
