"""A training run: steps, what they measured, checkpoints, and going on after a kill.

What a step computes depends on the recipe, the step's number and the state of the checkpoint it
follows, and on nothing else: a run that was killed and resumed in one process ends with the
same losses and weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.data import Batches, Kind, TrainBatch
from llama_adapter.errors import CheckpointError, TrainingError
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.processing.processor import LlamaAdapterProcessor
from llama_adapter.training.build import Built
from llama_adapter.training.callbacks import Callbacks
from llama_adapter.training.checkpointing import Checkpointer
from llama_adapter.training.device import autocast_dtype
from llama_adapter.training.interruption import SIGNALS, Interruption, leave, noticed
from llama_adapter.training.joint import JointTrainer, StepReport, moved_by
from llama_adapter.training.keepers import BestAdapter, InvalidRecords
from llama_adapter.training.metrics import Row, gate_sizes, row_of
from llama_adapter.training.micro_batches import drop_channels, split_by_length, with_features
from llama_adapter.training.parallel import Engine, on_rank_0
from llama_adapter.training.recipe import Recipe
from llama_adapter.training.run_directory import (
    ADAPTER,
    BEST,
    METRICS,
    RunDirectory,
    check_checksums,
    rows_of_steps,
    step_of,
)
from llama_adapter.training.schedule import StepBudget, kinds_of

MOST_BAD_STEPS = 3
"""So many steps in a row whose loss is not finite end the run."""
_SHOWN_IDS = 12

Evaluate = Callable[[Callable[[], bool]], Mapping[str, float] | None]
"""Scores held-out samples, by names such as `alpaca.perplexity`.

Asks all processes together, now and then, whether to end early, and is None where it did.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """How a run ended."""

    steps: int
    adapter: Path
    checksum: str
    """SHA-256 of the final adapter's tensors file."""
    started_at: int
    """The step that this process began with: 0, or that of the checkpoint."""
    invalid: int
    """Records that could not be learned from, over the whole run."""
    trained: dict[str, int]
    """How many parameters were trained: `adapter`, and `lora` where the recipe has it."""


class TrainingRun:
    """One run of a recipe; `run` continues from what its directory holds to the end."""

    def __init__(
        self,
        recipe: Recipe,
        built: Built,
        *,
        processor: LlamaAdapterProcessor,
        streams: Mapping[Kind, Batches],
        engine: Engine,
        callbacks: Callbacks | None = None,
        evaluate: Evaluate | None = None,
        budget: StepBudget | None = None,
    ) -> None:
        self.recipe = recipe
        self.built = built
        self.processor = processor
        self.streams = streams
        self.engine = engine
        self.callbacks = callbacks or Callbacks()
        self.directory = RunDirectory(recipe.out)
        self.metrics = rows_of_steps(recipe.out / METRICS)
        self.invalid = InvalidRecords(recipe.out)
        self.budget = budget or StepBudget(
            recipe.streams, steps=recipe.steps, minutes=recipe.minutes
        )
        self.trainer = JointTrainer(
            built.model,
            recipe.optimizer,
            steps=self.budget.steps,
            autocast_dtype=autocast_dtype(recipe.compute, built.model.device),
            engine=engine,
            lora=None if built.lora is None else built.lora.named_parameters(),
            lora_lr=None if recipe.lora is None else recipe.lora.lr,
        )
        self.checkpointer = Checkpointer(self.trainer, built, processor)
        self._evaluate = evaluate
        self.track: Callable[[Row, int], None] | None = None
        """Where rows go in addition to metrics.jsonl."""
        self._interruption = Interruption()
        self._ended_by: int | None = None
        """The signal that interrupted any of the processes."""
        self._bad_steps = 0
        self._unscored: Row | None = None
        """The row of the last step, where its evaluation was interrupted."""
        self.best = BestAdapter(None if recipe.evaluation is None else recipe.evaluation.best)

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train to the last step and write the final adapter.

        Ctrl-C and SIGTERM end it after the step that they interrupt, with a checkpoint, as
        KeyboardInterrupt and SystemExit. An evaluation they interrupt is made when the run resumes.

        Raises TrainingError where the loss stays not finite, DataError where too many records are
        invalid, and CheckpointError where a checkpoint cannot be written or read.
        """
        began = self._restore() if resume else 0
        if not self._unscored and not self._is_over():
            self.budget.begin()
        with noticed(self._tell) as self._interruption:
            self._to_the_end(began)
            return self._finish(began)

    def _to_the_end(self, began: int) -> None:
        with torch.random.fork_rng():
            while self._unscored or not self._is_over():
                row = self._unscored or self._step()
                step = self.trainer.step_count
                self._unscored = None
                if self._due(step, self._every_evaluation):
                    with self._timed():
                        self._score(row)
                    self._agree()  # a signal after its last batch need not wait for another step
                if not self._unscored:
                    self._write(row)
                is_left = self._unscored or not self._is_over()
                is_due = self._due(step, self.recipe.checkpoint_every)
                # the one that this process began with stays as it is: it leads to the same
                if step > began and (is_due or (is_left and self._ended_by)):
                    with self._timed(saving=True):
                        self._save()
                    self._agree()
                if is_left and (interrupted := self._ended_by):
                    with suppress(OSError):  # the terminal may be gone
                        self._tell(
                            f"interrupted after step {step}, which is kept: --resume goes on"
                        )
                    leave(interrupted)

    def _is_over(self) -> bool:
        """Whether all steps are made; processes agree on how many they are."""
        if self.recipe.minutes is not None:
            self.budget.steps = self.engine.gather(self.budget.steps)[0]
        self.trainer.steps = self.budget.steps
        return self.trainer.step_count >= self.budget.steps

    @contextmanager
    def _timed(self, *, saving: bool = False) -> Iterator[None]:
        began = self.budget.clock()
        yield
        self.budget.took_between(self.budget.clock() - began, saving=saving)

    # --- one step -----------------------------------------------------------------------------

    def _step(self) -> Row:
        step = self.trainer.step_count
        began = self.budget.clock()
        batches: dict[Kind, list[TrainBatch]] = {}
        for kind in kinds_of(step, self.budget.steps, self.recipe.streams):
            number = self.recipe.streams[kind].accumulation
            batches[kind] = [next(self.streams[kind]) for _ in range(number)]
        waited = self.budget.clock() - began
        torch.manual_seed(self._seed_of(step))
        inputs = {
            kind: [part for batch in some for part in self._passes(batch.inputs)]
            for kind, some in batches.items()
        }
        report = self.trainer.step(**inputs)
        every = [batch for some in batches.values() for batch in some]
        tokens, invalid = self._sums(every)
        row = row_of(report, step=step + 1)
        seconds = self.budget.clock() - began
        row |= {"tokens": tokens, "seconds": round(seconds, 4), "waited": round(waited, 4)}
        if self.recipe.minutes is not None:
            row["steps"] = self.budget.steps
        self.budget.took(seconds, step=step)
        if self._due(step + 1, self.recipe.logging.every):
            row |= gate_sizes(self.trainer)
        if invalid:
            self.invalid.add(every, step=step + 1, communicator=self.engine)
            for kind in batches:
                self.streams[kind].share_invalid(self.engine.gather)
        self._watch_losses(row, report, every)
        return row

    def _passes(self, inputs: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """A micro-batch as it is passed through the model, in one part or two."""
        section = self.recipe.vision
        if section is not None and section.feature_dropout:
            device, dtype = self.built.model.device.type, self.trainer.autocast_dtype
            with torch.autocast(device, dtype, enabled=dtype is not None):
                inputs = with_features(inputs, self.built.model)
            inputs = drop_channels(inputs, section.feature_dropout)
        # several processes must pass equally often
        if self.recipe.data.split_by_length and self.engine.world_size == 1:
            return [*split_by_length(inputs)]
        return [inputs]

    def _seed_of(self, step: int) -> int:
        """Of what a step draws, such as dropout: a function of the step, so nothing is stored."""
        text = f"{self.recipe.seed} {step} {self.engine.rank}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def _sums(self, batches: Sequence[TrainBatch]) -> list[int]:
        return self._agree(sum(b.tokens for b in batches), sum(len(b.invalid) for b in batches))

    def _agree(self, *counts: int) -> list[int]:
        """Sums over all processes, which learn on the way whether one of them is to end."""
        asked = [self._interruption.asked == number for number in SIGNALS]
        values = torch.tensor([*asked, *counts], dtype=torch.int64)
        sums = self.engine.all_reduce(values).tolist()
        self._ended_by = next((n for n, any_ in zip(SIGNALS, sums, strict=False) if any_), None)
        return list(sums[len(SIGNALS) :])

    def _is_ended(self) -> bool:
        self._agree()
        return self._ended_by is not None

    def _watch_losses(self, row: Row, report: StepReport, batches: Sequence[TrainBatch]) -> None:
        """Count steps that moved nothing; the third in a row ends the run."""
        self._bad_steps = self._bad_steps + 1 if report.skipped else 0
        if not report.skipped:
            return
        own = [sample for batch in batches for sample in batch.sample_ids]
        samples = [one for of_rank in self.engine.gather(own) for one in of_rank]
        row["samples"] = samples
        what = ", ".join(report.not_finite())
        self._tell(f"step {row['step']}: {what} not finite; the step is skipped")
        if self._bad_steps >= MOST_BAD_STEPS:
            self._write(row)
            shown = ", ".join(samples[:_SHOWN_IDS])
            more = f" and {len(samples) - _SHOWN_IDS} more" if len(samples) > _SHOWN_IDS else ""
            raise TrainingError(
                f"step {row['step']}: {what} not finite {MOST_BAD_STEPS} times in a row; "
                f"samples of this step: {shown}{more} (those of all: {METRICS})"
            )

    # --- what is written ----------------------------------------------------------------------

    @staticmethod
    def _due(step: int, every: int | None) -> bool:
        return every is not None and step % every == 0

    @property
    def _every_evaluation(self) -> int | None:
        section = self.recipe.evaluation
        return None if section is None or self._evaluate is None else section.every

    def _write(self, row: Row) -> None:
        if self.engine.rank == 0:
            self.metrics.append(row)
            with suppress(OSError) if self._ended_by else nullcontext():  # the terminal may be gone
                self.callbacks.step(row)
        if self.track is not None and self._due(row["step"], self.recipe.logging.every):
            self.track(row, row["step"])

    def _score(self, row: Row) -> None:
        """Score held-out samples, and keep the adapter if it is the best one so far."""
        assert self._evaluate is not None
        scores = self._evaluate(self._is_ended)
        if scores is None:
            self._unscored = row
            return
        row |= {f"held_out/{name}": value for name, value in scores.items()}
        if self.best.improves(scores):
            self._publish(BEST)

    def _save(self) -> None:
        own = {
            "streams": {kind: stream.state_dict() for kind, stream in self.streams.items()},
            "world_size": self.engine.world_size,
            "bad_steps": self._bad_steps,
            "listed": sorted(self.invalid.listed),
            "best": self.best.value,
            "best_of": self.best.metric,
            "budget": None if self.recipe.minutes is None else self.budget.state_dict(),
            "unscored": self._unscored,
        }
        write = self.checkpointer.checkpoint_writer(own)
        keep = self.recipe.keep_checkpoints
        step = self.trainer.step_count
        on_rank_0(self.engine, lambda: self.directory.save(step, write, keep=keep))

    def _publish(self, name: str) -> None:
        write = self.checkpointer.adapter_writer()
        on_rank_0(self.engine, lambda: self.directory.publish(name, write))

    def _restore(self) -> int:
        """Go on from the newest whole checkpoint, if there is one; the step that is.

        CheckpointError where there are some and all are damaged.
        """
        saved = self.directory.saved()
        step = self._newest_whole(saved) if saved else 0
        self._tell(
            f"resumed at step {step}" if saved else "no checkpoint yet: starting at the beginning"
        )
        factors = {} if self.built.lora is None else self.built.lora.factors
        named = [pair for some in self.trainer.named.values() for pair in some.items()]
        shapes = {name: tuple(p.shape) for name, p in named if name not in factors}
        self.best.check(self.directory.path / BEST, shapes, self._tell)
        # behind the last step nothing depends on the evaluation but its row, which may be there
        if self._unscored and self._is_over() and self._has_row(step):
            self._unscored = None
        on_rank_0(self.engine, lambda: self._truncate_after(step))
        return step

    def _has_row(self, step: int) -> bool:
        """Whether the step's row is written, as the first process finds."""
        found = self.engine.rank == 0 and any(r["step"] == step for r in self.metrics.rows())
        return bool(self.engine.gather(found)[0])

    def _newest_whole(self, saved: Sequence[Path]) -> int:
        damaged: list[Path] = []
        for checkpoint in reversed(saved):
            try:
                on_rank_0(self.engine, partial(check_checksums, checkpoint))
                self._load(checkpoint)
            except CheckpointError as error:
                if checkpoint == saved[0]:
                    raise CheckpointError(
                        f"cannot resume, no checkpoint of {self.directory.path} is whole: {error}"
                    ) from error
                self._tell(f"{checkpoint.name} is left out: {error}")
                damaged.append(checkpoint)
                continue
            for one in damaged:
                on_rank_0(self.engine, partial(self.directory.set_aside, one))
            return step_of(checkpoint)
        raise AssertionError("there is at least one")

    def _load(self, checkpoint: Path) -> None:
        """Take a checkpoint over; CheckpointError in all processes where one cannot."""
        failure: CheckpointError | None = None
        try:
            self._take(self.checkpointer.load(checkpoint))
        except CheckpointError as error:
            failure = error
        failures = [one for one in self.engine.gather(failure) if one is not None]
        if failures:
            raise failures[0]

    def _truncate_after(self, step: int) -> None:
        # a row that lacks its scores is written when it has them
        last_row = step - 1 if self._unscored else step
        for file, last in ((self.metrics, last_row), (self.invalid.file, step)):
            file.keep(partial(_is_up_to, last))
            if file.invalid:
                self._tell(f"{file.path}: {file.invalid} lines are not rows and are left out")

    def _take(self, own: Mapping[str, Any]) -> None:
        for kind, stream in self.streams.items():
            if kind not in own["streams"]:
                raise CheckpointError(f"the checkpoint has no position in {kind} data")
            stream.load_state_dict(own["streams"][kind])
        self._bad_steps = own["bad_steps"]
        self._unscored = own.get("unscored")
        self.invalid.listed = set(own.get("listed", ()))
        self.best.restore(own["best"], metric=own.get("best_of", self.best.metric))
        if (budget := own.get("budget")) is not None:
            self.budget.load_state_dict(budget)
        if own["world_size"] != self.engine.world_size:
            self._tell(
                f"the checkpoint is of {own['world_size']} process(es), this run has "
                f"{self.engine.world_size}: the same samples in the same order, but sums are "
                "rounded in another order and dropout draws other values, so the result is not bit "
                "for bit the same"
            )

    def _finish(self, began: int) -> TrainingResult:
        step = self.trainer.step_count
        if began < step and not self._due(step, self.recipe.checkpoint_every):
            self._save()
        self._publish(ADAPTER)  # also of a run that was over: it may have been damaged since
        adapter = self.recipe.out / ADAPTER
        content = (adapter / ADAPTER_WEIGHTS_NAME).read_bytes()
        return TrainingResult(
            steps=self.trainer.step_count,
            adapter=adapter,
            checksum=hashlib.sha256(content).hexdigest(),
            started_at=began,
            invalid=len(self.invalid.listed),
            trained=self.trained(),
        )

    def trained(self) -> dict[str, int]:
        """How many parameters the recipe's kinds of data move, LoRA counted separately."""
        counts = {"adapter": 0}
        factors = {} if self.built.lora is None else self.built.lora.factors
        moving = moved_by(self.recipe.streams, self.recipe.optimizer)
        for named in (self.trainer.named[group] for group in moving):
            for name, parameter in named.items():
                part = "lora" if name in factors else "adapter"
                counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    def _tell(self, message: str) -> None:
        if self.engine.rank == 0:
            self.callbacks.message(message)


def _is_up_to(step: int, row: Row) -> bool:
    return bool(row["step"] <= step)
