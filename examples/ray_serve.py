"""Two replicas of the server behind Ray Serve, which restarts one whose engine is dead.

    pip install '.[serve]' 'ray[serve]'
    MODEL=toy serve run examples.ray_serve:app

All routes of `llama-adapter serve` are there, on Ray's port, streams included. Every replica has a
base of its own; Ray sends each request to one of them.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from ray import serve

from llama_adapter.cli.models import load
from llama_adapter.generation.engine import RowEngine
from llama_adapter.serving.app import make_app
from llama_adapter.serving.auth import Keys
from llama_adapter.serving.metrics import set_up_logging
from llama_adapter.serving.service import Service

MODEL = os.environ.get("MODEL", "toy")
KEYS = os.environ.get("API_KEYS")
"""A file of keys; without one, something in front of Ray has to check who asks."""


@functools.cache
def engine() -> RowEngine:
    """This replica's engine."""
    set_up_logging("info")
    return RowEngine(*load(MODEL), name=Path(MODEL).name)


def build() -> Any:
    """This replica's ASGI application."""
    service = Service(engine=engine(), base_name=f"{Path(MODEL).name}-base")
    keys = Keys.read(Path(KEYS)) if KEYS else None
    return make_app(service, keys=keys, is_loopback=False)[0]


# above the service's own bound (64), whose refusal says when to come back
@serve.deployment(num_replicas=2, max_ongoing_requests=128)
@serve.ingress(build)
class Replica:
    """What Ray watches."""

    def check_health(self) -> None:
        """Raise where Ray should put another replica in this one's place."""
        found = engine().health
        if found.state == "dead":
            raise RuntimeError(found.reason)


app = Replica.bind()
