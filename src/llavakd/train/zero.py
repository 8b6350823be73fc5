"""ZeRO-2 and ZeRO-3: a module that DeepSpeed holds in shards, its steps, and whole tensors out of the shards and back."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llavakd.errors import UserError

STAGES = {"zero2": 2, "zero3": 3}
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class ZeroAdamW:
    """AdamW in shards: DeepSpeed's `engine` steps, at the rates of `whole`, which knows the weights as a checkpoint does."""

    engine: Any
    whole: torch.optim.AdamW

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of whole weights, with the rate of the next step."""
        return self.whole.param_groups

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Average the gradient over processes and add it to this process's shard; `last` before a step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> Tensor:
        """Clip, update, clear; the gradient's norm from before it was clipped, inf where it is not finite."""
        for group, own in zip(self.engine.optimizer.param_groups, self.param_groups, strict=True):
            group["lr"] = own["lr"]
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device)

    def state_dict(self) -> dict[str, Any]:
        """That of `whole`, in the main process's memory, with empty tensors on others; all processes must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        told, keep = self.whole.state_dict(), self.engine.global_rank == 0
        step = next(self._shards())[1]["step"].cpu()
        for number, weight in enumerate(self._weights()):
            told["state"][number] = {"step": step.clone()}
            for name in _MOMENTS:
                full = safe_get_full_optimizer_state(weight, name)
                told["state"][number][name] = full.cpu() if keep else full.new_empty(0)
        return told

    def load_state_dict(self, told: dict[str, Any]) -> None:
        """Take steps and moments, which reach the shards as weights do: the weights themselves must be loaded afterwards."""
        for name in _MOMENTS:
            for number, weight in enumerate(self._weights()):
                with gathered(weight, written=True):
                    weight.data.copy_(told["state"][number][name])
            self.refresh()
            for shard, state in self._shards():
                state[name].copy_(shard.data)
        for _, state in self._shards():
            state["step"].copy_(told["state"][0]["step"])

    def refresh(self) -> None:
        """Take what was written into the weights for what the next step starts from."""
        self.engine.optimizer.refresh_fp32_params()

    def close(self) -> None:
        """After the last step: take off the hooks, which would keep the models in memory, and make a frozen tower a part again."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, PartitionedParameterCoordinator

        self.engine.destroy()
        FWD_MODULE_STACK.clear()
        for method in vars(PartitionedParameterCoordinator).values():  # behind a decorator, one keeps what it was called with
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()
        inner = self.engine.get_submodule("module.model.model")
        if tower := inner.__dict__.pop("vision_tower", None):
            inner.vision_tower = tower

    def _weights(self) -> Iterator[nn.Parameter]:
        return (weight for group in self.param_groups for weight in group["params"])

    def _shards(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """This process's flat shards of what learns, and AdamW's state of each."""
        inner = self.engine.optimizer
        own = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"  # of ZeRO-2 and ZeRO-3
        shards = next(getattr(inner, name) for name in own if hasattr(inner, name))
        return ((shard, inner.optimizer.state[shard]) for shard in shards)


def shard(module: nn.Module, whole: torch.optim.AdamW, *, sharding: str, max_grad_norm: float) -> ZeroAdamW:
    """Let DeepSpeed hold a float32 module and AdamW over it in shards, all but a frozen tower; UserError without it."""
    try:
        import deepspeed
    except ImportError as error:
        told = f"sharding: {sharding} needs deepspeed; install it: pip install 'llava-kd[deepspeed]'"
        raise UserError(told) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # it calls torch by names of before 2.13
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for CPUs, a compiler would be started
    # Products stay torch's, to the bit; every weight is let go of after use; buckets of 200 MB, in the place of 2 GB.
    zero = {"stage": STAGES[sharding], "memory_efficient_linear": False, "reduce_bucket_size": 50_000_000}
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": max_grad_norm, "zero_optimization": zero}
    inner = module.get_submodule("model.model")
    if not any(weight.requires_grad for weight in inner.get_submodule("vision_tower").parameters()):
        # It runs before the module: a mere attribute, that DeepSpeed does not find.
        inner.__dict__["vision_tower"] = inner._modules.pop("vision_tower")
    ours = torch.optim.AdamW([dict(group) for group in whole.param_groups])
    engine, *_ = deepspeed.initialize(model=module, optimizer=ours, config=config)
    optimizer = ZeroAdamW(engine=engine, whole=whole)
    for part, state in optimizer._shards():  # as its first step would, but before a checkpoint is loaded
        state |= {"step": torch.zeros((), device=part.device)} | {name: torch.zeros_like(part) for name in _MOMENTS}
    return optimizer


def gathered(weight: Tensor, *, written: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Meanwhile a weight of ZeRO-3 is whole on all processes, which must all call; `written` says that it is changed."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([weight], modifier_rank=0 if written else None)
