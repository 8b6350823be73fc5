"""ZeRO-2 and ZeRO-3: a module and its AdamW in DeepSpeed's shards, and whole tensors out of them and back."""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from llavakd.errors import optional

STAGES = {"zero2": (2, "single_partition_of_fp32_groups"), "zero3": (3, "fp32_partitioned_groups_flat")}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW(torch.optim.AdamW):
    """AdamW over whole weights, as a checkpoint knows it; `engine`, DeepSpeed's, runs the module, holds shards and steps."""

    def __init__(self, module: nn.Module, inner: torch.optim.AdamW, *, sharding: str, max_grad_norm: float) -> None:
        """`inner` becomes DeepSpeed's, over shards of the same weights; UserError without DeepSpeed."""
        deepspeed = optional("deepspeed", f"sharding: {sharding}", "deepspeed")
        super().__init__([dict(group) for group in inner.param_groups])
        self.weights = [weight for group in self.param_groups for weight in group["params"]]
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # it calls torch by names of before 2.13
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for CPUs, a compiler would be started
        # Products stay torch's, to the bit; every weight is let go of after use; buckets of 200 MB, in the place of 2 GB.
        zero = {"stage": STAGES[sharding][0], "memory_efficient_linear": False, "reduce_bucket_size": 50_000_000}
        kept = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
        zero |= {f"stage3_{what}": 0 for what in kept}
        config = {"gradient_clipping": max_grad_norm, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        config["managed_gradient_accumulation"] = False
        self.parent = module.get_submodule("model.model")
        if not any(weight.requires_grad for weight in self.parent.get_submodule("vision_tower").parameters()):
            # It runs before the module: a mere attribute, that DeepSpeed does not find.
            self.parent.__dict__["vision_tower"] = self.parent._modules.pop("vision_tower")
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=inner, config=config)
        self.shards = inner.state
        for shard in getattr(self.engine.optimizer, STAGES[sharding][1]):  # as its first step would
            moments = {name: torch.zeros_like(shard) for name in _MOMENTS}
            self.shards[shard] = {"step": torch.zeros((), device=shard.device), **moments}

    def step(self, closure: Any = None) -> Any:
        """Clip and update."""
        for group, own in zip(self.engine.optimizer.param_groups, self.param_groups, strict=True):
            group["lr"] = own["lr"]
        self.engine.step()

    def state_dict(self) -> dict[str, Any]:
        """In the main process's memory, with empty tensors on others; all processes must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        told, step = super().state_dict(), next(iter(self.shards.values()))["step"]
        for number, weight in enumerate(self.weights):
            told["state"][number] = {"step": step.clone()}
            for name in _MOMENTS:
                full = safe_get_full_optimizer_state(weight, name)
                told["state"][number][name] = full.cpu() if self.engine.global_rank == 0 else full.new_empty(0)
        return told

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moments reach the shards as weights do, in the place of the weights: read those afterwards, and refresh the shards."""
        for name in _MOMENTS:
            for number, weight in enumerate(self.weights):
                with gathered(weight):
                    weight.data.copy_(state_dict["state"][number][name])
            self.engine.optimizer.refresh_fp32_params()
            for shard, held in self.shards.items():
                held[name].copy_(shard.data)
                held["step"].copy_(state_dict["state"][0]["step"])

    def close(self) -> None:
        """After the last step: let go of the models, and make a frozen tower a part again."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, PartitionedParameterCoordinator

        self.engine.destroy()
        FWD_MODULE_STACK.clear()
        for method in vars(PartitionedParameterCoordinator).values():  # behind a decorator, one remembers its arguments
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()
        if tower := self.parent.__dict__.pop("vision_tower", None):
            self.parent.vision_tower = tower


def gathered(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Meanwhile a weight of ZeRO-3 is whole on all processes, which must all call; what the main one writes stays."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([weight], modifier_rank=0)
