"""Where weights live: whole on every process (DDP) or in shards (FSDP2, ZeRO), and how tensors go from the one to the other."""

from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from llavakd.config import StageConfig
from llavakd.train.step import build_optimizer
from llavakd.train.zero import STAGES, ZeroAdamW, gathered


def place(
    accelerator: Accelerator, module: nn.Module, teacher: nn.Module | None, stage: StageConfig, sharding: str
) -> tuple[nn.Module, Optimizer]:
    """Bring the student's module and the teacher to the device, as `sharding` says; a process alone holds both whole.

    Returns the module that is to be called, and its AdamW.
    Shards are float32 under autocast, as in DDP: a policy of FSDP's would round the weights of norms, for other losses.
    """
    device, shards = accelerator.device, sharding != "none" and accelerator.num_processes > 1
    if shards:
        module = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)  # autocast, no DDP
        tower, decoder = (module.get_submodule(f"model.model.{part}") for part in ("vision_tower", "language_model"))
        tower.to(device)
        if sharding not in STAGES:
            _shard(module, decoder, device.type, kept=tower)  # where it is frozen, it runs before the module
    if shards and teacher and sharding == "both":
        decoder = teacher.get_submodule("model.language_model")
        _shard(decoder, decoder, device.type, kept=decoder)  # its embedding, perhaps the head, is used outside of it
    if teacher:
        teacher.to(device)
    module = module if shards else accelerator.prepare(module)
    optimizer = build_optimizer(module, stage)
    if shards and sharding in STAGES:
        zero = ZeroAdamW(module, optimizer, sharding=sharding, max_grad_norm=stage.max_grad_norm)
        return zero.engine, zero
    return module, accelerator.prepare(optimizer)


def _shard(root: nn.Module, decoder: nn.Module, device: str, *, kept: nn.Module) -> None:
    """Shard a decoder's layers, gathered one by one, and below `root` the rest but what is frozen of `kept`."""
    mesh = distributed.init_device_mesh(device, (distributed.get_world_size(),))
    for layer in decoder.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh, ignored_params={weight for weight in kept.parameters() if not weight.requires_grad})


def joined(tensor: Tensor, *, keep: bool) -> Tensor:
    """A tensor from its shards on all processes, which must all call; in the host's memory, or empty if not to be kept."""
    with gathered(tensor):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().cpu() if keep else full.new_empty(0)


def join(module: nn.Module, optimizer: Optimizer, *, keep: bool) -> None:
    """After the last step, where they are kept, put `joined` weights in the place of the module's; tied ones must be tied again."""
    if isinstance(optimizer, ZeroAdamW):
        optimizer.close()
    for name, weight in list(module.named_parameters()):
        (place, _, own), full = name.rpartition("."), joined(weight, keep=keep)
        if keep:
            module.get_submodule(place).register_parameter(own, nn.Parameter(full))


def like(tensor: Tensor, placed: Tensor) -> Tensor:
    """A tensor that every process has whole, sharded as another one of its shape."""
    how = (placed.device_mesh, placed.placements) if isinstance(placed, DTensor) else None
    return distribute_tensor(tensor.to(placed.device), *how, src_data_rank=None) if how else tensor
