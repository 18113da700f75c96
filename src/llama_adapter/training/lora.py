"""LoRA that trains together with the adapter (the recipe's `lora`); counted and saved apart.

A frozen LoRA that was on the base before is `model/peft_base.py`.

It goes in before the adapter wraps the base's linears, learns with LANGUAGE, and is stored as a
peft adapter of the plain base: `PeftModel.from_pretrained(base, run / "adapter/lora")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.errors import CheckpointError, ConfigError, MissingDependencyError
from llama_adapter.model.persistence import LORA_FOLDER
from llama_adapter.model.tensor_files import read_tensors

if TYPE_CHECKING:
    from llama_adapter.training.recipe import LoraSection

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The factors that were put into a base, and peft's description of them."""

    config: Any
    factors: Mapping[str, nn.Module]
    """The modules that hold a factor as `weight`, by peft's name for that tensor."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """As they stand now: sharding makes other objects of them."""
        return {name: module.weight for name, module in self.factors.items()}  # type: ignore[misc]

    def read(self, directory: Path) -> dict[str, Tensor]:
        """What an adapter directory holds of it; CheckpointError where that is damaged."""
        return read_tensors(directory / LORA_FOLDER / _WEIGHTS)

    @torch.no_grad()
    def take_over(self, directory: Path) -> None:
        """Set the factors to those of a directory; CheckpointError where it has another LoRA."""
        stored, own = self.read(directory), self.named_parameters()
        found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        expected = {name: tuple(parameter.shape) for name, parameter in own.items()}
        other = sorted(n for n in found | expected if found.get(n) != expected.get(n))
        if other:
            name = other[0]
            raise CheckpointError(
                f"{directory / LORA_FOLDER} holds another LoRA than the recipe asks for: {name} "
                f"is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            )
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def add_lora(language_model: PreTrainedModel, section: LoraSection, *, seed: int) -> Lora:
    """Put LoRA into a base; it changes nothing yet, for the second factor is zero.

    Raises ConfigError where the base has none of the targets.
    """
    config = _peft().LoraConfig(
        r=section.rank,
        lora_alpha=2 * section.rank if section.alpha is None else section.alpha,
        target_modules=(
            section.targets if isinstance(section.targets, str) else list(section.targets)
        ),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(language_model.name_or_path),
    )
    try:
        return _inject(config, language_model, seed=seed)
    except ValueError as error:
        raise ConfigError(f"lora.targets {section.targets!r}: {error}") from error


def continue_lora(
    language_model: PreTrainedModel, start: Path, *, section: LoraSection | None, seed: int
) -> Lora:
    """Put the LoRA of an adapter directory into its base, with the weights it has there.

    Raises ConfigError where `section` asks for another one than that, and CheckpointError where
    it is damaged or does not fit the base.
    """
    folder = start / LORA_FOLDER
    if not (folder / _CONFIG).is_file():  # peft would ask the hub for it
        raise CheckpointError(f"{folder / _CONFIG} is missing")
    try:
        stored = _peft().LoraConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / _CONFIG} cannot be read: {error}") from error
    if section is None:
        try:
            lora = _inject(stored, language_model, seed=seed)
        except ValueError as error:
            raise CheckpointError(f"{folder} does not fit the base: {error}") from error
    else:
        lora = add_lora(language_model, section, seed=seed)
        for name, asked, found in (
            ("rank", section.rank, stored.r),
            ("alpha", lora.config.lora_alpha, stored.lora_alpha),
        ):
            if asked != found:
                raise ConfigError(
                    f"lora.{name} is {asked}, but adapter.start has LoRA of {name} {found} in "
                    f"{folder}; leave lora out to go on with that"
                )
    lora.take_over(start)
    return lora


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", extra="train", purpose="LoRA on the base") from error
    return peft


def _inject(config: Any, language_model: PreTrainedModel, *, seed: int) -> Lora:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(config, language_model)
    factors = {}
    for name, module in language_model.named_modules():
        parent, _, last = name.rpartition(".")
        if last == "default" and parent.endswith((".lora_A", ".lora_B")):
            module.float()  # small steps would vanish in half types
            factors[f"{_PEFT_PREFIX}{parent}.weight"] = module
    return Lora(config=config, factors=factors)
