"""What the schema describes, sent in random variations: no answer is a fault of the server's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from llama_adapter.serving.gate import GENERATING, ROUTES, UNDER


def test_every_route_is_known_to_the_gate(server: Any) -> None:
    """An unknown one would be logged as `other`, and could answer without admission."""
    described = server.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        known = path in ROUTES or any(path.startswith(f"{root}/") for root in UNDER)
        assert known, path
        body = methods.get("post", {}).get("requestBody", {})
        schema = str(body.get("content", {}).get("application/json", {}).get("schema", ""))
        name = schema.rpartition("/")[2].rstrip("'}")
        fields = described["components"]["schemas"].get(name, {}).get("properties", {})
        assert (path in GENERATING) == ("temperature" in fields), path


def test_no_request_breaks_the_server(server: Any) -> None:
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/chat/completions", "/tokenize"}
    for operation in operations:
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=8, suppress_health_check=list(HealthCheck))
            def check(case: Any) -> None:
                answer = case.call(timeout=60)
                assert answer.status_code < 500 or case.path == "/ready"
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            with suppress(Unsatisfiable):  # a route that takes nothing cannot be asked wrongly
                check()
    assert server.is_idle()
    assert server.get("/health").status_code == 200
