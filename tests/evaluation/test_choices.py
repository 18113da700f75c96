"""What a user may choose for a run: which records, how answers end, what judging costs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter import LlamaAdapterConfig, LlamaAdapterForConditionalGeneration
from llama_adapter import LlamaAdapterProcessor as Processor
from llama_adapter.conversation import Conversation
from llama_adapter.errors import EvaluationError
from llama_adapter.evaluation.answering import LocalAnswerer
from llama_adapter.evaluation.costs import Prices, judge_usage
from llama_adapter.evaluation.running import Selection
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Generation, Inputs

from .byheart import learn
from .servers import serving


def test_answers_end_where_the_template_says(tmp_path: Path, bytes_tokenizer: Any) -> None:
    said = " yes###no"
    folder = learn(bytes_tokenizer, tmp_path / "base", after="###Assistant:", say=said)
    config = LlamaAdapterConfig.preset("v2-chat")
    model = LlamaAdapterForConditionalGeneration.from_base(str(folder), vision=None, config=config)
    generation = Generation(max_new_tokens=12)
    asked = [Conversation.ask("so?"), Conversation.ask("and what else of all of this?")]
    processor = Processor(tokenizer=bytes_tokenizer, template="human-assistant")
    answerer = LocalAnswerer(model, processor, directory=tmp_path)
    answers = answerer.answer(asked, generation, seed=0)
    assert [answer.text for answer in answers] == ["yes", "yes"]


@pytest.fixture
def bench(write: Callable[[str, Any], Path]) -> Path:
    for part, count in (("generic", 20), ("temporal", 5), ("consistency", 5)):
        item = {"Q": "?", "Q1": "?", "Q2": "?", "A": "x", "video_name": "v"}
        path = write(f"bench/{part}_qa.json", [item] * count)
    return path.parent


@pytest.mark.parametrize("limit", [1, 3, 10, 18, 30, 99])
def test_a_limit_takes_as_many_of_each_part(bench: Path, limit: int) -> None:
    task = find_task("videoinstruct")
    records = task.read(Inputs(data=bench))
    chosen = Selection(limit=limit).of(task, records)
    assert len(chosen) == min(limit, 30)
    counts = Counter(record.metadata["part"] for record in chosen)
    assert counts["generic"] - counts["temporal"] <= max(1, limit - 15)
    # in the benchmark's order, and the first ones of each part
    places = [records.index(record) for record in chosen]
    assert places == sorted(places)
    assert {record.id for record in chosen} >= {"generic-0"}


def test_shards_of_a_limit_are_a_partition_of_it(bench: Path) -> None:
    task = find_task("videoinstruct")
    records = task.read(Inputs(data=bench))
    whole = [record.id for record in Selection(limit=12).of(task, records)]
    parts = [
        record.id
        for i in (1, 2, 3)
        for record in Selection(limit=12, shard=(i, 3)).of(task, records)
    ]
    assert sorted(parts) == sorted(whole)


@pytest.mark.parametrize(
    ("option", "value"),
    [("limit", 0), ("frames", 0), ("batch-size", 0), ("max-new-tokens", -1), ("temperature", -0.1),
     ("beams", 0), ("judge-price-in", 1.0)],
)  # fmt: skip
def test_numbers_that_make_no_sense(
    cli: Any, write: Any, tmp_path: Path, option: str, value: float
) -> None:
    data = write("questions.jsonl", [{"question": "what?", "answer": "x"}])
    common = ("eval", "vqa", "--data", data, "--model", "toy", "--out", tmp_path / "out")
    done = cli(*common, f"--{option}", value)
    assert done.status == 2
    assert option.partition("-")[0] in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_judging_took_stands_in_the_result(
    cli: Any, write: Any, tmp_path: Path, adapter_dir: Path
) -> None:
    pytest.importorskip("openai")
    data = write("questions.jsonl", [{"question": f"what {i}?", "answer": "x"} for i in range(3)])
    out = tmp_path / "out"
    common = ("eval", "vqa", "--data", data, "--model", adapter_dir, "--out", out)

    def judge(prompt: str, before: int) -> str:
        return "Yes, score: 3" if before or "what 1?" not in prompt else "Hm."

    with serving(judge) as served:
        judged = ("--judge-url", served.url, "--judge-model", "m", "--max-new-tokens", 2)
        prices = ("--judge-price-in", 1000, "--judge-price-out", 2000, "--json")
        first = json.loads(cli(*common, *judged, *prices).stdout)
        again = json.loads(cli(*common, *judged, *prices).stdout)
        tokens_only = json.loads(cli(*common, *judged, "--json").stdout)
    assert len(served.bodies) == 4
    assert first == again
    took = first["judging"]
    assert (took["unreadable"], took["unavailable"]) == ([], [])
    # three replies and one that was asked for again, 10 + 3 tokens each
    assert (took["replies"], took["prompt_tokens"], took["completion_tokens"]) == (4, 40, 12)
    assert took["cost"] == pytest.approx((40 * 1000 + 12 * 2000) / 1e6)
    assert "cost" not in tokens_only["judging"]
    assert json.loads((out / "score.json").read_text())["judging"] == tokens_only["judging"]


def test_stored_answers_are_judged_as_the_note_says(cli: Any, write: Any, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    said = [{"question_id": f"v{i}", "pred": "a dog", "question": "what?"} for i in range(3)]
    reference = [{"question_id": f"v{i}", "answer": "dog", "question": "what?"} for i in range(3)]
    data = write("test_qa.json", [{**item, "video_name": "x"} for item in reference])
    given = ("eval", "msvd-qa", "--predictions", write("answers.json", said))
    out = tmp_path / "out"
    with serving(lambda *_: "Yes, score: 4") as served:
        judge = ("--judge-url", served.url, "--judge-model", "m", "--json")
        bare = cli(*given, "--out", out, *judge)
        assert (bare.status, out.exists()) == (2, False)
        assert "give --data" in bare.stderr
        first = json.loads(cli(*given, "--data", data, "--out", out, *judge).stdout)
        again = json.loads(
            cli("eval", "msvd-qa", "--predictions", out, "--out", out, *judge).stdout
        )
    assert (first["metrics"]["accuracy"], first["metrics"]["score"]) == (100, 4)
    assert again == first
    assert len(served.bodies) == 3
    other = cli("eval", "msvd-qa", "--predictions", data, "--data", data, "--out", out)
    assert other.status == 2
    assert "holds other answers" in other.stderr


def test_prices() -> None:
    assert Prices().cost(prompt_tokens=1, completion_tokens=1) is None
    with pytest.raises(EvaluationError, match="needed for both"):
        Prices(prompt=1.0)
    with pytest.raises(EvaluationError, match="at least 0"):
        Prices(prompt=-1.0, completion=1.0)


def test_words_cost_nothing(tmp_path: Path) -> None:
    assert judge_usage(tmp_path) is None
    line = {"task": "vqa", "judge": "exact-match", "id": "1", "aspect": "answer", "verdict": {}}
    (tmp_path / "judgements.jsonl").write_text(json.dumps(line) + "\n")
    assert judge_usage(tmp_path) is None
