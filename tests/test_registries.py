"""What has to be listed twice, since one list is read without torch, is listed alike."""

from __future__ import annotations

from llama_adapter.cli.score import TASK_HELP
from llama_adapter.config import CHOICES
from llama_adapter.evaluation.tasks import TASKS
from llama_adapter.model.projection import PROJECTORS


def test_every_projector_is_a_choice() -> None:
    assert set(PROJECTORS) == set(CHOICES["projector"])


def test_the_help_names_every_task() -> None:
    assert TASK_HELP.rstrip(".").replace(" or ", ", ").split(", ") == list(TASKS)
