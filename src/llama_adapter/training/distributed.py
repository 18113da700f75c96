"""Several processes that share every step: replicas (DDP) or a sharded model (FSDP2).

Accelerate reads what `torchrun` or `accelerate launch` say and sets up the processes; replicas
are its too. A sharded model goes to torch's `fully_shard` directly: on a CPU Accelerate would
quietly make replicas of it, or processes that know nothing of each other.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llama_adapter.errors import TrainingError
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.training.parallel import Engine, SingleProcess

STRATEGIES = ("auto", "ddp", "fsdp2")
"""`auto` shards where `accelerate launch --use_fsdp` asks for it, and replicates otherwise."""


def start_processes(
    *, cpu: bool, trackers: tuple[str, ...] = (), log_dir: str | None = None
) -> Accelerator:
    """Join the other processes of this run, if there are any.

    Raises TrainingError where a launcher's word and what came of it differ.
    """
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",  # ours: parameters stay float32, autocast is the trainer's
        log_with=list(trackers) or None,
        project_dir=log_dir,
        kwargs_handlers=[
            # a pass moves one group: the other's parameters are unused in it
            DistributedDataParallelKwargs(find_unused_parameters=True)
        ],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    found = dist.get_world_size() if dist.is_initialized() else 1
    if found != expected or accelerator.num_processes != expected:
        raise TrainingError(
            f"the launcher started {expected} processes, but this one sees {found}; "
            "on CPUs use torchrun, `accelerate launch --cpu` starts only one"
        )
    return accelerator


def engine_for(
    model: LlamaAdapterForConditionalGeneration, accelerator: Accelerator, *, strategy: str
) -> Engine:
    """How this model trains in these processes; parameters may be other objects afterwards."""
    if accelerator.num_processes == 1:
        return SingleProcess(model)
    if is_sharded(strategy, accelerator):
        return FSDP(model, accelerator.device)
    return DDP(model, accelerator)


def is_sharded(strategy: str, accelerator: Accelerator) -> bool:
    """Whether the model is spread over the processes."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    wanted = strategy == "fsdp2" or (strategy == "auto" and asked)
    return wanted and accelerator.num_processes > 1


class ProcessGroup:
    """The processes of this run; there may be only one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of every process's values."""
        summed = values.detach().clone().to(self.device)
        if self.world_size > 1:
            dist.all_reduce(summed)
        return summed

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


class DDP(ProcessGroup):
    """Every process holds the whole model; gradients are averaged (DDP)."""

    def __init__(
        self, model: LlamaAdapterForConditionalGeneration, accelerator: Accelerator
    ) -> None:
        super().__init__(accelerator.device)
        self.module: nn.Module = accelerator.prepare_model(model)
        if not isinstance(self.module, nn.parallel.DistributedDataParallel):
            raise TrainingError(
                f"{self.world_size} processes were started, but Accelerate made no replicas "
                f"({accelerator.distributed_type})"
            )

    def sync_gradients(self, is_last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.module, nn.parallel.DistributedDataParallel)
        return nullcontext() if is_last else self.module.no_sync()

    def unshard_root(self) -> None:
        pass

    def full_tensor(self, tensor: Tensor) -> Tensor:
        return tensor

    def local_shard(self, full: Tensor, like: Tensor) -> Tensor:
        return full.to(like.device)


class FSDP(ProcessGroup):
    """Every decoder layer is spread over the processes and gathered where it computes (FSDP2).

    The vision encoder stays whole: no gradient passes it, and not every pass has images.
    """

    def __init__(self, model: LlamaAdapterForConditionalGeneration, device: torch.device) -> None:
        super().__init__(device)
        quantization = getattr(model.language_model, "quantization_method", None)
        if quantization is not None:
            raise TrainingError(
                f"a base quantized by {quantization} cannot be sharded; train replicas: "
                "compute.strategy=ddp"
            )
        mesh = init_device_mesh(device.type, (self.world_size,))
        ignored = set() if model.vision is None else set(model.vision.parameters())
        if model.vision is not None:
            model.vision.to(device)
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        # the same object, of another class
        self.sharded = fully_shard(model, mesh=mesh, ignored_params=ignored)
        self.module: nn.Module = model
        self._warm_up(model)

    @torch.no_grad()
    def _warm_up(self, model: LlamaAdapterForConditionalGeneration) -> None:
        """One pass in which everything may learn: a first pass fixes what FSDP2 believes of it."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        model(input_ids=ids, use_cache=False)
        # what is not in a layer stays gathered after a forward pass; the trainer wants the shards
        self.sharded.reshard()

    def sync_gradients(self, is_last: bool) -> AbstractContextManager[Any]:
        # what a pass without gradients left gathered would learn as it did before that pass
        self.sharded.reshard()
        self.sharded.set_requires_gradient_sync(is_last)
        return nullcontext()

    def unshard_root(self) -> None:
        self.sharded.unshard()

    def full_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def local_shard(self, full: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return full.to(like.device)
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)


def decoder_layers(model: LlamaAdapterForConditionalGeneration) -> list[nn.Module]:
    """The decoder's layers, in order."""
    layers = model.language_model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def finish(accelerator: Accelerator) -> None:
    """Leave together: a process that leaves early can abort the others after success."""
    accelerator.wait_for_everyone()
    # Replicas first: the last of them would end the group while it holds Python's lock, and wait
    # for a thread of the group that waits for this lock.
    accelerator.free_memory()
    accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()
