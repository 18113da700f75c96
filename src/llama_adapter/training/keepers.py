"""What a run keeps next to its checkpoints: the list of invalid records, and the best adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llama_adapter.data import TrainBatch
from llama_adapter.errors import CheckpointError, TrainingError
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.tensor_files import read_tensors
from llama_adapter.training.parallel import Communicator
from llama_adapter.training.run_directory import INVALID, rows_of_steps


class InvalidRecords:
    """The list of records that turned out unreadable, each once, in broken.jsonl."""

    def __init__(self, directory: Path) -> None:
        self.file = rows_of_steps(directory / INVALID)
        self.listed: set[str] = set()

    def add(self, batches: Iterable[TrainBatch], *, step: int, communicator: Communicator) -> None:
        """List what is new in a step's batches of all processes."""
        own = [record.to_dict() for batch in batches for record in batch.invalid]
        # a sample cut into pieces may turn up twice in one step
        found = {one["where"]: one for of_rank in communicator.gather(own) for one in of_rank}
        new = {where: one for where, one in found.items() if where not in self.listed}
        self.listed.update(new)
        if communicator.rank == 0:
            for one in new.values():
                self.file.append({"step": step, **one})


class BestAdapter:
    """The best value so far of the metric that decides which adapter is kept as `best`."""

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.value: float | None = None

    def improves(self, scores: Mapping[str, float]) -> bool:
        """Whether these scores are the best so far; TrainingError where they lack the metric."""
        if self.metric is None:
            return False
        if self.metric not in scores:
            known = ", ".join(sorted(scores))
            raise TrainingError(
                f"evaluation.best names {self.metric!r}, but the scores are {known}"
            )
        value, before = scores[self.metric], self.value
        lower_is_better = self.metric.endswith(".perplexity")
        if before is not None and not (value < before if lower_is_better else value > before):
            return False
        self.value = value
        return True

    def restore(self, value: float | None, *, metric: str | None) -> None:
        """Go on from a checkpoint's value; of another metric nothing is known yet."""
        if metric == self.metric:
            self.value = value

    def check(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], say: Callable[[str], None]
    ) -> None:
        """Forget the value where the adapter it belongs to is gone, damaged, or another one."""
        if self.value is None:
            return
        weights = directory / ADAPTER_WEIGHTS_NAME
        try:
            found = {name: tuple(tensor.shape) for name, tensor in read_tensors(weights).items()}
        except CheckpointError as error:
            say(f"the best adapter so far cannot be kept, another will be: {error}")
            self.value = None
            return
        if found != shapes:
            say(f"the best adapter so far cannot be kept: {weights} is of another adapter")
            self.value = None
