"""The two Java programs behind published caption scores: the PTB tokenizer and METEOR 1.5.

They come with pycocoevalcap as jars. We run each once for a whole file, over pipes.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_adapter.errors import EvaluationError, MissingDependencyError
from llama_adapter.evaluation.records import Floats, ratio

_QUOTES = ("''", "'", "``", "`")
_BRACKETS = ("-LRB-", "-RRB-", "-LCB-", "-RCB-")
_PUNCTUATION = frozenset((*_QUOTES, *_BRACKETS, *".?!,:-;", "--", "..."))
METEOR_SUMS = 23
"""Statistics that METEOR keeps of a sentence."""

_LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


def has_java() -> bool:
    """Whether both programs can run here."""
    return shutil.which("java") is not None and _folder() is not None


def _folder() -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _jar(name: str) -> str:
    folder = _folder()
    if folder is None:
        raise MissingDependencyError("pycocoevalcap", extra="eval", purpose="caption scoring")
    return str(folder / name)


def _run_java(arguments: Sequence[str], *, text: str) -> list[str]:
    if shutil.which("java") is None:
        raise EvaluationError(
            "the PTB tokenizer and METEOR need a Java runtime, and no 'java' is on the path"
        )
    command = ["java", "-Dfile.encoding=UTF-8", *arguments]
    done = subprocess.run(  # noqa: S603
        command,
        input=text.encode(),
        capture_output=True,
        check=False,
        process_group=0,  # a Ctrl-C in the terminal is ours to act on
    )
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise EvaluationError(f"java ended with {done.returncode}: {''.join(last)}")
    return done.stdout.decode().split("\n")


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Each text as lower-case Penn Treebank tokens without punctuation, joined by spaces."""
    if not texts:
        return []
    # The program reads lines: whatever Java takes for a line break must not part a text.
    lines = [text.translate(_LINE_BREAKS) for text in texts]
    main = "edu.stanford.nlp.process.PTBTokenizer"
    jar = _jar("tokenizer/stanford-corenlp-3.4.1.jar")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
        out = _run_java(["-cp", jar, main, *options, str(file)], text="")
    if len(out) < len(texts):
        raise EvaluationError(f"the PTB tokenizer gave {len(out)} lines for {len(texts)} texts")
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION)
        for line in out[: len(texts)]
    ]


def meteor_statistics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """METEOR's sums for each candidate against its best reference, (U, 23)."""
    lines = []
    for candidate, refs in zip(candidates, references, strict=True):
        hypothesis = candidate.replace("|||", "").replace("  ", " ")
        lines.append(" ||| ".join(("SCORE", *refs, hypothesis)))
    options = ["-jar", "-Xmx2G", _jar("meteor/meteor-1.5.jar"), "-", "-"]
    out = _run_java([*options, "-stdio", "-l", "en", "-norm"], text="\n".join(lines) + "\n")
    rows = [[float(value) for value in line.split()] for line in out if line.strip()]
    if len(rows) != len(candidates) or any(len(row) != METEOR_SUMS for row in rows):
        raise EvaluationError(f"METEOR gave {len(rows)} results for {len(candidates)} captions")
    sums_UC = np.asarray(rows).reshape(-1, METEOR_SUMS)
    # A sentence that matches in one piece has nothing out of order: METEOR adds no chunk of it to
    # a corpus. (Alone, its one chunk is overlooked, which comes to the same.)
    chunks, test_matched, reference_matched = sums_UC[:, 20:].T
    is_whole = (test_matched == sums_UC[:, 0]) & (reference_matched == sums_UC[:, 1])
    sums_UC[is_whole & (chunks == 1), 20] = 0
    return sums_UC


def meteor_score(totals: Floats) -> Floats:
    """METEOR 1.5 (English) from sums (..., 23): what the program computes over a corpus."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    weights = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
    test, reference, test_function, reference_function = np.moveaxis(totals[..., :4], -1, 0)
    stages = weights @ totals[..., 4:20].reshape(*totals.shape[:-1], 4, 4)
    test_content, reference_content, test_small, reference_small = np.moveaxis(stages, -1, 0)
    chunks, test_matched, reference_matched = np.moveaxis(totals[..., 20:23], -1, 0)

    def share(content: Floats, small: Floats, length: Floats, function: Floats) -> Floats:
        weighted = delta * (length - function) + (1 - delta) * function
        return ratio(delta * content + (1 - delta) * small, weighted)

    precision = share(test_content, test_small, test, test_function)
    recall = share(reference_content, reference_small, reference, reference_function)
    f_mean = ratio(precision * recall, alpha * precision + (1 - alpha) * recall)
    fragmentation = ratio(chunks, (test_matched + reference_matched) / 2)
    return np.nan_to_num(f_mean * (1 - gamma * fragmentation**beta))
