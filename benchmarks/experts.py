"""What experts are worth: signs read, captions, texts unharmed, receipts, and what asking costs.

python -m benchmarks.experts                              # all that needs no files of yours
python -m benchmarks.experts receipts --receipts DIR      # folders with ground_truth.json
python -m benchmarks.experts signs --scenes 200 --model runs/mine/v2 --caption runs/mine/caption
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.measuring import report
from benchmarks.receipts import measure_receipts
from llama_adapter.chat import ChatSession
from llama_adapter.conversation import Conversation
from llama_adapter.experts import (
    ExpertContext,
    ExpertInfo,
    ExpertPool,
    Finding,
    Report,
    Request,
    make_experts,
    report_text,
)
from llama_adapter.experts.cache import ReportCache
from llama_adapter.generation import GenerationSettings
from llama_adapter.miniature.bundled import bundled_adapter
from llama_adapter.miniature.questions import ask
from llama_adapter.miniature.rendering import SceneImage
from llama_adapter.miniature.scenes import SIGN_WORDS, Scene, Split, scene_stream
from llama_adapter.miniature.task import HeldOutScenes, Score, answer_questions
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.processor import LlamaAdapterProcessor

Loaded = tuple[LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor]

OCR = "ocr,languages=en,wording=a sign says {}."
"""The toy decoder knows signs by this sentence."""
CHANCE = 0.5 / len(SIGN_WORDS) + 0.5 / 100
"""Half of the signs hold one of the words, half a number below 100."""


def draw(scene: Scene, *, seed: int, index: int, size: int = 64) -> Image.Image:
    return SceneImage(scene=scene, seed=seed, index=index, size=size)()


def load(directory: Path) -> Loaded:
    model = LlamaAdapterForConditionalGeneration.from_pretrained(directory)
    model.prepare_for_inference()
    return model, LlamaAdapterProcessor.from_pretrained(directory)


def answers(loaded: Loaded, conversations: Sequence[Conversation], *, batch: int = 25) -> list[str]:
    """Greedy answers."""
    model, processor = loaded
    out: list[str] = []
    for start in range(0, len(conversations), batch):
        inputs = processor(list(conversations[start : start + batch]))
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        out += [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]
    return out


def measure_signs(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """Questions about the written word or number, without and with OCR."""
    stream = scene_stream(options.seed, split=Split.TEST, sign_probability=1.0)
    scenes = list(itertools.islice(stream, options.scenes))
    rng = random.Random(options.seed)
    images = [
        draw(scene, seed=options.seed, index=i, size=options.size) for i, scene in enumerate(scenes)
    ]
    asked = [ask(scene, rng, "sign") for scene in scenes]
    questions = [(a.question, a.answer) for a in asked if a is not None]
    pool = ExpertPool(make_experts([OCR]), timeout=120)
    seconds, texts, right_text = 0.0, [], 0
    for scene, image, (question, _) in zip(scenes, images, questions, strict=True):
        started = time.perf_counter()
        found = pool.consult([image], question)
        seconds += time.perf_counter() - started
        texts.append("\n".join(map(report_text, found)))
        right_text += [f.text.lower() for r in found for f in r.findings] == [scene.sign]
    result: dict[str, Any] = {"chance": round(CHANCE, 4), "pixels": options.size}
    context = ExpertContext(model=loaded[0])
    captioner = ExpertPool(make_experts([f"caption={options.caption}"], context), timeout=600)
    captions = captions_of(captioner, scenes, seed=options.seed)
    ways: dict[str, Sequence[str | None]] = {
        "without": [None] * len(scenes),
        "with_ocr": texts,
        "with_caption_and_ocr": [f"{c}\n{t}" for c, t in zip(captions, texts, strict=True)],
        "with_ocr_image_hidden": texts,
    }
    for name, contexts in ways.items():
        given = answers(
            loaded,
            [
                Conversation.ask(
                    question, images=[] if "hidden" in name else [image], context=context
                )
                for (question, _), image, context in zip(questions, images, contexts, strict=True)
            ],
        )
        right = sum(a == b for a, (_, b) in zip(given, questions, strict=True))
        result[name] = Score(right=right, total=len(scenes)).to_dict()
    result["sign_read_to_the_letter"] = Score(right=right_text, total=len(scenes)).to_dict()
    result["ocr_seconds_per_image"] = round(seconds / len(scenes), 3)
    return with_target(result, result["with_ocr"]["value"], at_least=0.95)


def measure_captions(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """Visual questions and text questions, without and with the caption expert, seed by seed."""
    context = ExpertContext(model=loaded[0])
    pool = ExpertPool(make_experts([f"caption={options.caption}"], context), timeout=600)
    seeds: dict[str, Any] = {}
    for seed in options.seeds:
        test = HeldOutScenes.draw(
            images=options.images,
            questions=options.questions,
            seed=9_000 + seed,
            question_seed=seed,
        )
        captions = captions_of(pool, test.scenes, seed=9_000 + seed)
        seeds[str(seed)] = _take(loaded, test, captions, pool)
    gains = [s["gain"] for s in seeds.values()]
    harm = [
        s["text_alone_with_experts"]["value"] - s["text_alone"]["value"] for s in seeds.values()
    ]
    return {
        "seeds": seeds,
        "gain_mean": round(sum(gains) / len(gains), 4),
        "gain_range": [min(gains), max(gains)],
        "text_alone_change": with_target({"points": harm}, min(harm), at_least=-0.01),
    }


def captions_of(
    pool: ExpertPool, scenes: Sequence[Scene], *, seed: int, batch: int = 40
) -> list[str]:
    """What the expert says of each scene's image."""
    [expert] = pool.experts
    captions: list[str] = []
    for start in range(0, len(scenes), batch):
        part = range(start, min(start + batch, len(scenes)))
        images = [draw(scenes[i], seed=seed, index=i) for i in part]
        captions += [finding.text for finding in expert.consult(Request(images=images)).findings]
    return captions


def _take(
    loaded: Loaded, test: HeldOutScenes, captions: Sequence[str], pool: ExpertPool
) -> dict[str, Any]:
    def without_image(question: str, passage: str) -> str:
        """What a session would put before a question that comes without an image."""
        return "\n".join(t for t in (*map(report_text, pool.consult([], question)), passage) if t)

    ways: dict[str, dict[str, Any]] = {
        "image": {"image": lambda q: q.scene},
        "image_with_caption": {
            "image": lambda q: q.scene,
            "context": lambda q: captions[q.scene],
        },
        "text_alone": {"context": lambda q: q.passage},
        "text_alone_with_experts": {
            "context": lambda q: without_image(q.asked.question, q.passage)
        },
        "text_with_unrelated_image": {
            "context": lambda q: q.passage,
            "image": lambda q: test.unrelated(q.scene),
        },
    }
    scores: dict[str, Any] = {}
    for name, way in ways.items():
        exact = [mark.exact for mark in answer_questions(*loaded, test, **way)]
        scores[name] = Score(right=sum(exact), total=len(exact)).to_dict()
    gain = scores["image_with_caption"]["value"] - scores["image"]["value"]
    return {**scores, "gain": round(gain, 4)}


class Sleeper:
    """An expert that takes its time."""

    info = ExpertInfo(version="1", uses_question=False)

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self.seconds = seconds

    def consult(self, request: Request) -> Report:  # noqa: ARG002
        time.sleep(self.seconds)
        return Report(expert=self.name, findings=(Finding(text="a nap", kind="note"),))


class Faller:
    """An expert that breaks."""

    name = "faller"
    info = ExpertInfo()

    def consult(self, request: Request) -> Report:  # noqa: ARG002
        raise RuntimeError("out of luck")


def measure_panel(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """Side by side, a time limit, one that breaks, and the second time from the cache."""
    scene = next(scene_stream(options.seed, split=Split.TEST, sign_probability=1.0))
    image = draw(scene, seed=options.seed, index=0, size=512)
    nap = 0.5
    together = [Sleeper(f"sleeper {i}", nap) for i in range(4)]
    side_by_side = timed(lambda: ExpertPool(together).consult([image], "?"))
    one_by_one = timed(lambda: [e.consult(Request(images=[image])) for e in together])
    session = ChatSession(
        *loaded,
        experts=ExpertPool([Sleeper("slow", 20.0), Faller(), Sleeper("quick", 0.0)], timeout=1.0),
        settings=GenerationSettings(max_new_tokens=16),
    )
    started = time.perf_counter()
    answer = session.ask("how many things are there?", images=[image])
    with tempfile.TemporaryDirectory() as folder:
        cache = ReportCache(Path(folder) / "experts.sqlite")
        pool = ExpertPool(make_experts([OCR]), timeout=120, cache=cache)
        other = draw(scene, seed=options.seed + 1, index=0, size=512)
        pool.consult([other], "?")  # the models are loaded once
        first = timed(lambda: pool.consult([image], "?"))
        again = min(timed(lambda: pool.consult([image], "?")) for _ in range(5))
        cache.close()
    return {
        "four_experts_of_half_a_second": {
            "one_by_one_s": round(one_by_one, 3),
            "side_by_side_s": round(side_by_side, 3),
        },
        "slow_and_broken_experts": {
            "answer": answer.text,
            "seconds": round(time.perf_counter() - started, 3),
            "problems": {r.expert: r.problem for r in answer.contexts},
        },
        "ocr_cache": with_target(
            {"first_s": round(first, 4), "again_s": round(again, 4)}, first / again, at_least=50
        ),
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds of one turn."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def with_target(result: dict[str, Any], value: float, *, at_least: float) -> dict[str, Any]:
    return {**result, "value": round(value, 4), "target": at_least, "met": value >= at_least}


MEASURES: dict[str, Callable[[Loaded, argparse.Namespace], dict[str, Any]]] = {
    "signs": measure_signs,
    "captions": measure_captions,
    "panel": measure_panel,
}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*MEASURES, "receipts"]
    parser.add_argument("what", nargs="*", help=f"some of {', '.join(names)}; default: all")
    parser.add_argument("--model", type=Path, default=bundled_adapter("v2"))
    parser.add_argument("--caption", type=Path, default=bundled_adapter("caption"))
    parser.add_argument("--scenes", type=int, default=200, help="signs to read")
    parser.add_argument("--size", type=int, default=256, help="pixels a side for OCR")
    parser.add_argument("--images", type=int, default=200, help="for captions, per seed")
    parser.add_argument("--questions", type=int, default=660, help="for captions, per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seed", type=int, default=7_000, help="of the scenes with signs")
    parser.add_argument("--receipts", type=Path, help="folder of folders of receipts")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    wanted = options.what or [n for n in names if n != "receipts" or options.receipts]
    unknown = set(wanted) - set(names)
    if unknown or ("receipts" in wanted and options.receipts is None):
        parser.error(f"unknown {unknown}" if unknown else "receipts needs --receipts DIR")
    results: dict[str, Any] = {}
    if any(name in MEASURES for name in wanted):
        loaded = load(options.model)
        for name in wanted:
            if name in MEASURES:
                results[name] = MEASURES[name](loaded, options)
    if "receipts" in wanted:
        results["receipts"] = measure_receipts(options.receipts)
    report("experts", results, targets={}, options=options)


if __name__ == "__main__":
    main()
