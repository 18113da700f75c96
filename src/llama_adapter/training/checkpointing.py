"""What a checkpoint holds: a loadable adapter, and everything else that changes during training."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from llama_adapter.checkpoints.torch_files import read_torch_file
from llama_adapter.errors import CheckpointError
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.tensor_files import read_tensors
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.build import Built
from llama_adapter.training.joint import JointTrainer
from llama_adapter.training.run_directory import ADAPTER, STATE, step_of


class _Position(BaseModel):
    """The position of a stream; its other values are compared with the data."""

    model_config = ConfigDict(strict=True)

    epoch: NonNegativeInt
    row: NonNegativeInt
    broken: list[Annotated[tuple[NonNegativeInt, str, str], Field(strict=False)]] = []


class _Budget(BaseModel):
    """Of a run with `minutes`: its steps, the seconds spent, and the pace."""

    model_config = ConfigDict(strict=True)

    steps: PositiveInt
    spent: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    paces: dict[str, list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]]
    saving: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Extra(BaseModel):
    """The plain values of a checkpoint; those with defaults were added later."""

    model_config = ConfigDict(strict=True)

    streams: dict[str, _Position]
    world_size: PositiveInt
    bad_steps: NonNegativeInt
    listed: list[str] = []
    best: float | None
    best_of: str | None = None
    budget: _Budget | None = None
    unscored: dict[str, int | float | str | list[str] | None] | None = None


class _State(BaseModel):
    model_config = ConfigDict(strict=True)

    trainer: dict[str, Any]
    extra: _Extra


class Checkpointer:
    """Writes and reads the state of one trainer.

    Writers are made by all processes together, since tensors may be spread over them, and called
    by one. Nothing in a checkpoint depends on the number of processes.
    """

    def __init__(
        self, trainer: JointTrainer, built: Built, processor: LlamaAdapterProcessor
    ) -> None:
        self.trainer = trainer
        self.built = built
        self.processor = processor

    def adapter_writer(self) -> Callable[[Path], None]:
        """What writes the adapter as it is now, with its processor and LoRA."""
        state = self.trainer.parameter_state()

        def write(directory: Path) -> None:
            self.built.model.save_pretrained(directory, state_dict=state)
            self.processor.save_pretrained(directory)

        return write

    def checkpoint_writer(self, extra: Mapping[str, Any]) -> Callable[[Path], None]:
        """What writes the adapter, the optimizer, and the plain values `extra`."""
        write_adapter = self.adapter_writer()
        state = {"trainer": self.trainer.state_dict(), "extra": dict(extra)}

        def write(directory: Path) -> None:
            write_adapter(directory / ADAPTER)
            # in memory first: an error of the disk then is one of Python's
            buffer = io.BytesIO()
            torch.save(state, buffer)
            (directory / STATE).write_bytes(buffer.getbuffer())

        return write

    def load(self, checkpoint: Path) -> Mapping[str, Any]:
        """Restore everything; returns the `extra` values that were written.

        Raises CheckpointError for a checkpoint that is damaged or of another adapter.
        """
        path = checkpoint / STATE
        state = read_torch_file(path)
        if isinstance(state, dict) and "beside" in state:  # its name up to version 0.2
            state["extra"] = state.pop("beside")
        try:
            _State.model_validate(state)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            raise CheckpointError(f"{path} is damaged: {place}: {first['msg']}") from error
        tensors = read_tensors(checkpoint / ADAPTER / ADAPTER_WEIGHTS_NAME)
        if self.built.lora is not None:
            tensors |= self.built.lora.read(checkpoint / ADAPTER)
        self.trainer.load_parameter_state(tensors)
        self.trainer.load_state_dict(state["trainer"])
        if self.trainer.step_count != step_of(checkpoint):
            raise CheckpointError(
                f"{path} is of step {self.trainer.step_count}, not of {checkpoint.name}"
            )
        extra: Mapping[str, Any] = state["extra"]
        return extra
