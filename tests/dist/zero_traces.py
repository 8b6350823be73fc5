"""One of two processes of a run: what DeepSpeed leaves behind, in torch's settings and in memory; run as `llava-kd` is."""

import gc
import json
import random
import signal
import sys
import weakref
from typing import Any

import torch

from llavakd import cli
from llavakd.train import placement, zero


def settings() -> dict[str, str]:
    """Of torch and of the process."""
    configs = {"dynamo": torch._dynamo.config, "inductor": torch._inductor.config}
    found: dict[str, Any] = {name: config.get_config_copy() for name, config in configs.items()}
    found |= {"torch's random state": torch.get_rng_state().tolist(), "python's": random.getstate()}
    found |= {"dtype": torch.get_default_dtype(), "linear": torch.nn.functional.linear}
    found |= {"deterministic": torch.are_deterministic_algorithms_enabled(), "gradients": torch.is_grad_enabled()}
    found |= {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
    found |= {"signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]}
    return {name: repr(value) for name, value in found.items()}


def main() -> None:
    """The run's own output, and then one line of JSON."""
    modules, changed, whole = [], set(), [0]

    class Watched(zero.ZeroAdamW):
        def __init__(self, module: torch.nn.Module, *args: Any, **options: Any) -> None:
            before = settings()
            modules.append(weakref.ref(module))
            super().__init__(module, *args, **options)
            after = settings()
            changed.update(name for name in before if before[name] != after[name])
            module.register_forward_hook(self.look)

        def look(self, module: torch.nn.Module, *_: Any) -> None:
            held = [weight.numel() > 0 for weight in module.parameters() if hasattr(weight, "ds_id")]
            whole.append(sum(held))

    placement.ZeroAdamW = Watched
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
    gc.collect()
    kept = sum(module() is not None for module in modules)
    print(json.dumps({"changed": sorted(changed), "stages": len(modules), "kept": kept, "whole": max(whole)}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
