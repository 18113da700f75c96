"""The benchmarks. A task is data and a few small functions; none has a loop of its own."""

from __future__ import annotations

from collections.abc import Iterable

from llama_adapter.config import not_one_of
from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.tasks.base import Task
from llama_adapter.evaluation.tasks.coco import COCO_CAPTION
from llama_adapter.evaluation.tasks.infimm import INFIMM_EVAL
from llama_adapter.evaluation.tasks.mme import MME
from llama_adapter.evaluation.tasks.scienceqa import SCIENCEQA
from llama_adapter.evaluation.tasks.vicuna import VICUNA_80
from llama_adapter.evaluation.tasks.video_qa import ACTIVITYNET_QA, MSRVTT_QA, MSVD_QA
from llama_adapter.evaluation.tasks.videoinstruct import VIDEOINSTRUCT
from llama_adapter.evaluation.tasks.vqa import VQA
from llama_adapter.evaluation.tasks.vqav2 import VQAV2

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        MSVD_QA,
        MSRVTT_QA,
        ACTIVITYNET_QA,
        VIDEOINSTRUCT,
        INFIMM_EVAL,
        COCO_CAPTION,
        SCIENCEQA,
        MME,
        VICUNA_80,
        VQA,
        VQAV2,
    )
}
"""Every task by its name on the command line."""


def find_task(name: str, *, others: Iterable[str] = ()) -> Task:
    """The task of that name; `others` are names that the caller knows besides."""
    if name not in TASKS:
        raise EvaluationError(not_one_of("task", name, [*TASKS, *others]))
    return TASKS[name]


__all__ = ["TASKS", "Task", "find_task"]
