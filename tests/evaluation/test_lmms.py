"""The lmms-eval plugin: announced always; run where lmms-eval is installed (it is no dependency:
it requires torchvision and an old PyAV)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

TASK = """\
task: toy_colors
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function colors.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
process_results: !function colors.process_results
metric_list:
  - metric: words
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["path"])]

def process_results(doc, results):
    return {"words": float(len(results[0].split()))}
"""


def test_the_entry_point_is_announced() -> None:
    found = [e for e in entry_points(group="lmms_eval.models") if e.name == "llama_adapter"]
    assert {e.value for e in found} == {"llama_adapter.evaluation.lmms:manifests"}
    assert callable(found[0].load())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_it_runs_a_local_task(tmp_path: Path, adapter_dir: Path) -> None:
    lines = []
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        path = str(tmp_path / f"{i}.png")
        lines.append({"path": path, "question": "What color is it?", "answer": "red"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "toy_colors.yaml").write_text(TASK.format(data=data))
    (tasks / "colors.py").write_text(FUNCTIONS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "llama_adapter"]
    command += ["--model_args", f"pretrained={adapter_dir}", "--tasks", "toy_colors"]
    command += ["--include_path", str(tasks), "--batch_size", "2", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, env={**os.environ, **home}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").glob("**/*_results.json")
    assert "toy_colors" in json.loads(results.read_text())["results"]
    (samples,) = (tmp_path / "out").glob("**/*_samples_toy_colors.jsonl")
    assert len(samples.read_text().splitlines()) == 3
