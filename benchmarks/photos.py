"""What an adapter makes of real photographs, beside what costs no training at all.

Captions and questions are measured by `llama-adapter eval` (see docs/photos.md). Here is the rest:

python -m benchmarks.photos retrieval --captions flickr8k/captions.json
python -m benchmarks.photos perplexity --model runs/photos/adapter --texts dolly.json alpaca.json \
    --photo unrelated.jpg
python -m benchmarks.photos captions --model runs/photos/adapter --captions flickr8k/captions.json
python -m benchmarks.photos questions --model runs/photos/adapter --questions question.jsonl \
    --reference answer_gpt35.jsonl --photo unrelated.jpg --answers runs/vicuna
python -m benchmarks.photos speed --recipe recipes/photos-answers.yaml --photos flickr8k/images
python -m benchmarks.photos compare vqav2 runs/own runs/blind
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from benchmarks.measuring import describe
from llama_adapter.cli.models import adapter_directory, load
from llama_adapter.cli.output import refusals
from llama_adapter.config import AdapterConfig
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.data import SOURCES
from llama_adapter.data.caption_facts import sentence_of
from llama_adapter.data.feature_cache import FeatureCache
from llama_adapter.errors import ConfigError, DataError
from llama_adapter.evaluation.bootstrap import bootstrap_intervals
from llama_adapter.evaluation.captions import caption_metrics, caption_sums
from llama_adapter.evaluation.records import Tally
from llama_adapter.evaluation.score import read_joined
from llama_adapter.evaluation.tasks import find_task
from llama_adapter.evaluation.tasks.base import Counting
from llama_adapter.families.vision import vision_features
from llama_adapter.files import atomic_file, read_json, write_atomically
from llama_adapter.generation.answer import answer, log_likelihoods
from llama_adapter.generation.settings import GenerationSettings
from llama_adapter.model.persistence import ADAPTER_WEIGHTS_NAME
from llama_adapter.model.references import resolve_reference
from llama_adapter.processing.images import load_image
from llama_adapter.training.launch import train
from llama_adapter.training.recipe import load_recipe
from llama_adapter.training.streams import choose_held_out

RESAMPLES = 2000


def retrieval(options: argparse.Namespace) -> dict[str, Any]:
    """Captions of the nearest training photo, in COCO's result format, for `eval --predictions`.

    Nearest by the cosine of mean patch features of the layer that the adapter reads. Of that
    photo's captions the one is taken that has most words in common with the others.
    """
    make_room(options.predictions)
    items = captioned(options.captions)
    folder = options.images or options.captions.parent
    parts = {s: [item for item in items if item["split"] == s] for s in ("train", options.split)}
    features = {
        name: _mean_features([folder / item["image"] for item in part], options)
        for name, part in parts.items()
    }
    nearest = (features[options.split] @ features["train"].T).argmax(1).tolist()
    answers = [
        {
            "image_id": Path(item["image"]).stem,
            "caption": _central(parts["train"][index]["captions"]),
        }
        for item, index in zip(parts[options.split], nearest, strict=True)
    ]
    write_atomically(options.predictions, json.dumps(answers, indent=1) + "\n")
    return {"photos": len(answers), "candidates": len(parts["train"])}


def captioned(path: Path) -> list[dict[str, Any]]:
    """Records of `image`, `captions` and `split`. DataError for anything else."""
    items = read_json(path, error=DataError, limit=1 << 30)
    for number, item in enumerate(items if isinstance(items, list) else [items]):
        known = item if isinstance(item, dict) else {}
        texts = known.get("captions")
        named = [known.get("image"), known.get("split")]
        named += texts if isinstance(texts, list) else []
        if len(named) < 3 or not all(isinstance(each, str) for each in named):
            raise DataError(
                f"{path}: record {number} is {item!r:.80}, expected an object with a text `image`, "
                "a list of `captions` and a text `split`"
            )
    return items


def make_room(path: Path | None) -> None:
    """The folder of what will be written, before anything is computed."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)


def _central(captions: Sequence[str]) -> str:
    words = [set(caption.lower().split()) for caption in captions]
    common = [sum(len(mine & other) for other in words) / max(1, len(mine)) for mine in words]
    return captions[int(np.argmax(common))]


def _mean_features(photos: Sequence[Path], options: argparse.Namespace) -> Tensor:
    """Mean patch features of unit length [I, C], kept beside the answers."""
    # what the files hold is not read for it: their sizes and times tell of others in their place
    encoder = sorted(Path(resolve_reference(options.vision)).glob("*"))
    key = _key(options.vision, options.layer, options.cache, *map(_version, [*encoder, *photos]))
    kept = options.predictions.with_name(f"features-{key}.npy")
    if kept.exists():
        return torch.from_numpy(np.load(kept))
    read = patch_features(photos, options)
    means = [patches.mean(1) for patches in read]
    found = torch.nn.functional.normalize(torch.cat(means), dim=-1)
    with atomic_file(kept) as file:
        np.save(file, found.numpy())
    return found


def _version(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def patch_features(photos: Sequence[Path], options: argparse.Namespace) -> Iterator[Tensor]:
    """Of each photo, [1, P, C] without the class token, of `options.layer` of `options.vision`."""
    directory = resolve_reference(options.vision)
    encoder = AutoModel.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory)
    config = AdapterConfig(vision_feature=options.layer)
    cache = None if options.cache is None else FeatureCache(options.cache, dtype=torch.float16)
    for path in tqdm(photos, desc="photos"):
        ref = ImageRef.of(path)
        if cache is not None and cache.key(ref) in cache:
            patches = cache.read([ref])
        else:
            pixels = processor([load_image(ref)], return_tensors="pt")["pixel_values"]
            patches = vision_features(encoder, pixels, config)
        yield patches[:, 1:]


def _key(*of: Any) -> str:
    """Of what a kept file depends on: another model's is never taken for it."""
    return hashlib.sha256(repr(of).encode()).hexdigest()[:12]


def perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """Of answers that training held out: by the base, with the adapter, and next to a photo."""
    model, processor = load(options.model)
    photo = ImageRef.of(options.photo)
    results: dict[str, Any] = {}
    for path in options.texts:
        source = SOURCES["alpaca"].model_validate({"path": path}).open("instruction")
        chosen = choose_held_out(source, options.held_out)
        plain = [source[int(index)].conversation for index in chosen]
        plain = [one for one in plain if len(processor([one])["input_ids"][0]) <= options.longest]
        with_photo = [_shown(one, photo) for one in plain]
        losses = {
            "adapter": _losses(model, processor, plain),
            "adapter_with_photo": _losses(model, processor, with_photo),
        }
        with model.adapters_disabled():
            losses["base"] = _losses(model, processor, plain)
        results[path.stem] = {
            name: {"perplexity": float(_perplexity(sums)), "interval": _interval(sums)}
            for name, sums in losses.items()
        } | {
            f"{name}/base": _paired(sums, losses["base"])
            for name, sums in losses.items()
            if name != "base"
        }
        results[path.stem]["answers"] = len(plain)
    return results


def captions(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the human captions: with their photo, with another one, and without.

    They are written as training has them. Tells what an image says where greedy captions are
    still alike. Intervals resample photos.
    """
    items = [item for item in captioned(options.captions) if item["split"] == "test"]
    items = items[: options.limit]
    if len(items) < 2 and "another" in options.against:
        raise ConfigError(
            f"--against another needs two photos, {options.captions} has {len(items)}"
        )
    model, processor = load(options.model)
    folder = options.captions.parent
    photos = [ImageRef.of(folder / item["image"]) for item in items]
    seen: dict[str, Sequence[ImageRef | None]]
    seen = {"own": photos, "another": [*photos[1:], *photos[:1]], "none": [None] * len(photos)}
    asked = options.question
    losses: dict[str, np.ndarray] = {}
    for name in ("own", *options.against):
        shown, sums = seen[name], []
        for item, photo in tqdm(list(zip(items, shown, strict=True)), desc=name):
            batch = [
                Conversation.ask(
                    asked, images=[] if photo is None else [photo], answer=sentence_of(caption)
                )
                for caption in item["captions"][: options.each]
            ]
            found = log_likelihoods(model, processor, batch)
            sums.append(
                [
                    -sum(float(one.log_probabilities_A.sum()) for one in found),
                    sum(len(one.tokens_A) for one in found),
                ]
            )
        losses[name] = np.array(sums)
    results: dict[str, Any] = {
        name: {"perplexity": float(_perplexity(sums)), "interval": _interval(sums)}
        for name, sums in losses.items()
    }
    results |= {f"own/{name}": _paired(losses["own"], losses[name]) for name in options.against}
    return {"photos": len(items), **results}


def questions(options: argparse.Namespace) -> dict[str, Any]:
    """The Vicuna questions answered by the base, with the adapter, and next to a photo.

    No judge is at hand: answers are counted, and compared with another model's by ROUGE-L and by
    the perplexity of the other model's answers. What is answered is kept and not asked again.
    """
    model, processor = load(options.model)
    photo = ImageRef.of(options.photo)
    asked = {line["question_id"]: line["text"] for line in _lines(options.questions)}
    reference = {line["question_id"]: line["text"] for line in _lines(options.reference)}
    plain = [Conversation.ask(text) for text in asked.values()]
    told = [Conversation.ask(text, answer=reference[id_]) for id_, text in asked.items()]
    told = [one for one in told if len(processor([one])["input_ids"][0]) <= options.longest]
    results: dict[str, Any] = {"questions": len(plain), "references_that_fit": len(told)}
    losses: dict[str, np.ndarray] = {}
    for name in ("base", "adapter", "adapter_with_photo"):
        show = [photo] if name == "adapter_with_photo" else []
        with model.adapters_disabled() if name == "base" else nullcontext():
            rows = _answered(model, processor, [_with(one, show) for one in plain], name, options)
            losses[name] = _losses(model, processor, [_with(one, show) for one in told])
        texts = [row["text"] for row in rows]
        sums = caption_sums(texts, [[reference[id_]] for id_ in asked], tokenizer="simple").sums_UC
        draws = _draws(len(sums))
        rouge = [float(caption_metrics(sums[draw].sum(0))["ROUGE-L"]) for draw in draws[:1000]]
        results[name] = {
            "words": float(np.mean([len(text.split()) for text in texts])),
            "cut_at_the_limit": sum(row["finish"] == "length" for row in rows),
            "empty": sum(not text.strip() for text in texts),
            "repeats_itself": sum(map(_repeats, texts)),
            "ROUGE-L": float(caption_metrics(sums.sum(0))["ROUGE-L"]),
            "ROUGE-L interval": np.percentile(rouge, [2.5, 97.5]).tolist(),
            "perplexity_of_reference": float(_perplexity(losses[name])),
        }
        if name != "base":
            results[name]["perplexity_of_reference/base"] = _paired(losses[name], losses["base"])
    return results


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _answered(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    name: str,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Greedy answers as {text, finish}, kept in a file of that name."""
    weights = adapter_directory(options.model) / ADAPTER_WEIGHTS_NAME
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    key = _key(digest, options.max_new_tokens, *conversations)
    options.answers.mkdir(parents=True, exist_ok=True)  # before anything is answered
    kept = options.answers / f"{name}-{key}.jsonl"
    if kept.exists():
        return _lines(kept)
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens)
    rows = []
    for first in tqdm(range(0, len(conversations), options.batch_size), desc=name):
        batch = conversations[first : first + options.batch_size]
        found = answer(model, processor, batch, settings)
        rows += [{"text": one.text, "finish": one.finish} for one in found]
    write_atomically(kept, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _repeats(text: str) -> bool:
    """Whether six words in a row come a second time."""
    words = text.split()
    runs = [tuple(words[at : at + 6]) for at in range(len(words) - 5)]
    return len(set(runs)) < len(runs)


def _with(conversation: Conversation, photos: Sequence[ImageRef]) -> Conversation:
    return _shown(conversation, photos[0]) if photos else conversation


def _shown(conversation: Conversation, photo: ImageRef) -> Conversation:
    first, *rest = conversation.messages
    return replace(conversation, messages=(replace(first, images=(photo,)), *rest))


def _losses(model: Any, processor: Any, conversations: Sequence[Conversation]) -> np.ndarray:
    """Negative log-likelihood and number of tokens of each answer [N, 2]."""

    def each() -> Iterator[tuple[float, int]]:
        for conversation in tqdm(conversations, desc="answers"):
            [found] = log_likelihoods(model, processor, [conversation])
            yield -float(found.log_probabilities_A.sum()), len(found.tokens_A)

    return np.array(list(each()))


def _perplexity(sums: np.ndarray) -> np.ndarray:
    """Of answers [..., N, 2] together: per token."""
    return np.exp(sums[..., 0].sum(-1) / sums[..., 1].sum(-1))


def _draws(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, (RESAMPLES, n))


def _interval(sums: np.ndarray) -> list[float]:
    return np.percentile(_perplexity(sums[_draws(len(sums))]), [2.5, 97.5]).tolist()


def _paired(sums: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """The ratio of perplexities over the same answers."""
    draws = _draws(len(sums))
    ratios = _perplexity(sums[draws]) / _perplexity(base[draws])
    ratio = float(_perplexity(sums) / _perplexity(base))
    return {"ratio": ratio, "interval": np.percentile(ratios, [2.5, 97.5]).tolist()}


VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "one answer behind an image": ("captions.sources.0.answers=1",),
    "captions behind one prompt": (
        "captions.sources.0.captions_share=1",
        "captions.row_length=288",
    ),
    "a sample a row, sorted by length": ("data.padding=padded", "data.group_by_length=true"),
    "bfloat16": ("compute.autocast=bfloat16",),
    "compiled": ("compute.compile=true",),
}
"""What might make a step of a recipe faster."""


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Caption steps of a recipe in its variants, after what they compile; the encoder alone."""
    if options.steps <= options.skip:
        raise ConfigError(f"--steps {options.steps} are over with --skip {options.skip}")
    results: dict[str, Any] = {}
    for name in options.variants:
        changes = VARIANTS[name]
        with tempfile.TemporaryDirectory() as folder:
            own = (f"out={folder}/run", f"steps={options.steps}", "minutes=null", "evaluation=null")
            recipe = load_recipe(options.recipe, [*options.set, *own, *changes])
            began = time.perf_counter()
            train(recipe)
            took = time.perf_counter() - began
            rows = _lines(Path(folder) / "run/metrics.jsonl")
        # steps that hold instructions too are of another size
        rows = [row for row in rows[options.skip :] if "loss/instruction" not in row]
        seconds = sum(row["seconds"] - row["waited"] for row in rows)
        answers = sum(row["answer_tokens/caption"] for row in rows)
        results[name] = {
            "steps": len(rows),
            "seconds_a_step": seconds / len(rows),
            "tokens_a_second": sum(row["tokens"] for row in rows) / seconds,
            "answer_tokens_a_second": answers / seconds,
            "seconds_in_all": took,
        }
    directory = resolve_reference(options.vision)
    encoder = AutoModel.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory)
    photos = sorted(options.photos.glob("*.jpg"))[:32]
    began = time.perf_counter()
    for photo in photos:
        pixels = processor([load_image(ImageRef.of(photo))], return_tensors="pt")["pixel_values"]
        vision_features(encoder, pixels, AdapterConfig(vision_feature=11))
    results["encoder"] = {"photos_a_second": len(photos) / (time.perf_counter() - began)}
    return results


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """First run minus second, over the records that both answered; intervals are paired."""
    task = find_task(options.task)
    found = [read_joined(task, run, None) for run in (options.first, options.second)]
    both = set.intersection(*({r.record.id for r in one.rows if r.is_answered} for one in found))
    tallies = []
    for one in found:
        rows = sorted((r for r in one.rows if r.record.id in both), key=lambda r: r.record.id)
        tallies.append(task.count(replace(one, rows=tuple(rows)), Counting()))
    first, second = tallies
    width = first.sums_UC.shape[1]

    def difference(totals: np.ndarray) -> dict[str, np.ndarray]:
        a, b = first.metrics(totals[..., :width]), second.metrics(totals[..., width:])
        return {name: a[name] - b[name] for name in a}

    joint = Tally(n=first.n, sums_UC=np.hstack([first.sums_UC, second.sums_UC]), metrics=difference)
    values = {name: float(value) for name, value in difference(joint.sums_UC.sum(0)).items()}
    intervals = bootstrap_intervals(joint, resamples=RESAMPLES)
    return {
        "records": len(both),
        "difference": {
            name: {"value": value, "interval": intervals.get(name)}
            for name, value in values.items()
            if not math.isnan(value)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("retrieval", help=retrieval.__doc__)
    one.add_argument("--captions", type=Path, required=True)
    one.add_argument("--images", type=Path, help="their folder, by default that of the captions")
    one.add_argument("--split", default="test")
    one.add_argument("--vision", default="home:photos/vision")
    one.add_argument("--cache", type=Path, help="features that training kept")
    one.add_argument("--layer", type=int, default=11)
    one.add_argument("--predictions", type=Path, default=Path("runs/retrieval/captions.json"))
    one.set_defaults(measure=retrieval)
    two = commands.add_parser("perplexity", help=perplexity.__doc__)
    two.add_argument("--model", required=True)
    two.add_argument("--texts", type=Path, nargs="+", required=True)
    two.add_argument("--photo", type=Path, required=True)
    two.add_argument("--held-out", type=int, default=50, help="as in the recipe")
    two.add_argument("--longest", type=int, default=384, help="tokens; longer ones are left out")
    two.set_defaults(measure=perplexity)
    five = commands.add_parser("captions", help=captions.__doc__)
    five.add_argument("--model", required=True)
    five.add_argument("--captions", type=Path, required=True)
    five.add_argument("--limit", type=int, default=100, help="photos")
    five.add_argument("--each", type=int, default=5, help="captions of a photo")
    five.add_argument(
        "--against", nargs="+", default=["another", "none"], choices=["another", "none"]
    )
    five.add_argument("--question", default="Generate caption of this image")
    five.set_defaults(measure=captions)
    four = commands.add_parser("questions", help=questions.__doc__)
    four.add_argument("--model", required=True)
    four.add_argument("--questions", type=Path, required=True, help="question.jsonl")
    four.add_argument("--reference", type=Path, required=True, help="another model's answers")
    four.add_argument("--photo", type=Path, required=True)
    four.add_argument("--answers", type=Path, required=True, help="the folder they are kept in")
    four.add_argument("--max-new-tokens", type=int, default=192)
    four.add_argument("--longest", type=int, default=768, help="tokens of a reference")
    four.add_argument("--batch-size", type=int, default=16)
    four.set_defaults(measure=questions)
    six = commands.add_parser("speed", help=speed.__doc__)
    six.add_argument("--recipe", type=Path, required=True)
    six.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    six.add_argument("--steps", type=int, default=12)
    six.add_argument("--skip", type=int, default=4, help="steps that warm up")
    six.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    six.add_argument("--photos", type=Path, required=True, help="a folder of JPEGs")
    six.add_argument("--vision", default="home:photos/vision")
    six.set_defaults(measure=speed)
    three = commands.add_parser("compare", help=compare.__doc__)
    three.add_argument("task", choices=["vqav2", "coco-caption"])
    three.add_argument("first", type=Path)
    three.add_argument("second", type=Path)
    three.set_defaults(measure=compare)
    options = parser.parse_args()
    with refusals():
        make_room(options.out)
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    results = options.measure(options)
    settings = {k: v for k, v in vars(options).items() if k != "measure"}
    about = describe(options.measure.__name__, results, options=argparse.Namespace(**settings))
    text = json.dumps(about, indent=2, default=str)
    print(text)
    if options.out is not None:
        write_atomically(options.out, text + "\n")


if __name__ == "__main__":
    main()
