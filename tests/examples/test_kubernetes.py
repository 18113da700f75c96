"""The manifests of `examples/kubernetes` start servers that there are, and let them drain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from llama_adapter.cli.app import app

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "kubernetes"


def resources() -> list[dict[str, Any]]:
    names = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {*names, "kustomization.yaml"} == {path.name for path in FOLDER.iterdir()}
    return [part for name in names for part in yaml.safe_load_all((FOLDER / name).read_text())]


def deployment(name: str) -> dict[str, Any]:
    [found] = [
        r for r in resources() if r["kind"] == "Deployment" and r["metadata"]["name"] == name
    ]
    pod: dict[str, Any] = found["spec"]["template"]["spec"]
    return pod


def test_our_server_starts_with_these_options() -> None:
    [server] = deployment("llama-adapter")["containers"]
    program, name = server["command"]
    assert program == "llama-adapter"
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    given = command.make_context(name, list(server["args"]), resilient_parsing=False).params
    assert given["port"] == server["ports"][0]["containerPort"]
    mounted = [mount["mountPath"] for mount in server["volumeMounts"]]
    for path in (given["model"], str(given["api_keys"].parent)):
        assert any(path.startswith(mount) for mount in mounted), path


@pytest.mark.parametrize("name", ["llama-adapter", "llama-adapter-vllm"])
def test_servers_have_time_to_drain(name: str) -> None:
    pod = deployment(name)
    [server] = pod["containers"]
    options = dict(arg.split("=", 1) for arg in server["args"] if "=" in arg)
    drain = options.get("--drain-seconds") or options["--shutdown-timeout"]
    sleep = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > int(drain) + sleep


def test_everything_that_is_mounted_is_there() -> None:
    found = resources()
    claims = {r["metadata"]["name"] for r in found if r["kind"] == "PersistentVolumeClaim"}
    for name in ("llama-adapter", "llama-adapter-vllm"):
        pod = deployment(name)
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
        used = [
            v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v
        ]
        assert {claim["claimName"] for claim in used} <= claims
