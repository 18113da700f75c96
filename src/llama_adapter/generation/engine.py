"""An engine that answers many requests at once: a row of the cache for each answer.

Each step admits waiting requests into free rows, reads a piece of the prompts that are new, and
makes one token of every other answer. Adapters and images differ from row to row.

Shapes: N rows of a pass, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.errors import (
    ConfigError,
    PromptError,
    QueueFullError,
    UnavailableError,
    UnsupportedModelError,
)
from llama_adapter.generation.calls import Calls, complete
from llama_adapter.generation.grammar import Grammars, Matcher
from llama_adapter.generation.passes import Chunk, RowModel
from llama_adapter.generation.pending import PendingAnswer, ReadyImage, num_frames
from llama_adapter.generation.requests import (
    EngineStats,
    Finish,
    Generation,
    GenerationRequest,
    Health,
    Increment,
    Sampling,
    State,
    TokenLogprob,
    Usage,
)
from llama_adapter.generation.sampling import Drawer, draw, log_probabilities
from llama_adapter.generation.sequential import check_length
from llama_adapter.generation.text import TextStream
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.model.configuration import read_adapter_config
from llama_adapter.model.stack import AdapterStack, StackedAdapter
from llama_adapter.processing.processor import LlamaAdapterProcessor

_MOST_CRASHES = 3
"""After so many steps in a row in which neither a request nor a trial works, it is dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What an engine has place for; fixed when it starts."""

    rows: int = 16
    """Answers at once."""
    context_length: int = 2048
    """Most tokens of a prompt and its answer; at most what the base takes."""
    max_queue: int = 64
    """Answers that may wait for a row."""
    max_queue_tokens: int = 1 << 18
    """Tokens of the prompts that may wait."""
    prefill_tokens: int = 256
    """Tokens of new prompts that are read in one pass, between two tokens of other answers; as many
    passes follow one another as more answers wait for their prompts than are under way."""
    adapters: int = 16
    images: int = 64
    """Images ready at once, each for one adapter."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class RowEngine:
    """`Engine` with many rows; see `llama_adapter.generation.requests.Engine`.

    An answer is what the adapter gives alone, whatever runs in other rows. What goes wrong in one
    row ends that row's request alone. One thread runs the model, and survives what it raises.
    """

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        name: str,
        settings: EngineSettings | None = None,
    ) -> None:
        """Start; the model's active adapter is called `name`, and the model is the engine's now.

        Raises UnsupportedModelError, with the family's name, for a base whose cache rows cannot
        share.
        """
        self.settings = settings or EngineSettings()
        model.eval().prepare_for_training()  # the stack merges by itself
        adapter, vision = model.adapter, model.vision
        model.disable_adapters()
        base = model.language_model
        self._stack = AdapterStack(
            base, capacity=self.settings.adapters, image_capacity=self.settings.images
        )
        self._encoders = {_encoder_key(model.config.vision): vision}
        self._first = processor
        self._processors = {name: processor}
        known = (getattr(base.config.get_text_config(), "max_position_embeddings", None),)
        lengths = (self.settings.context_length, processor.context_length, *known)
        self._length = min(length for length in lengths if length)
        try:
            rows = self.settings.rows
            self._model = RowModel(base, self._stack, rows=rows, length=self._length)
        except UnsupportedModelError:
            model.enable_adapters()  # as it was given, for another engine
            raise
        self._stack.add(name, adapter, vision)
        self._grammars = Grammars(processor.tokenizer, self._model.vocabulary)
        self._cache = self._model.cache
        self._decoding = self._prefilling = 0
        """How many rows at the front make tokens, and how many behind them read prompts."""
        self._images: dict[tuple[StackedAdapter, str], ReadyImage] = {}
        self._changed = threading.Condition()
        self._queue: deque[PendingAnswer] = deque()
        self._calls = Calls(self._changed)
        self._leaving: dict[str, Future[None]] = {}
        self._delivered: dict[Generation, list[Increment]] = {}
        self._state: State = "starting"
        self._reason = ""
        self._drained_at = float("inf")
        self._steps = self._crashes = 0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    # --- for any thread ---------------------------------------------------------------------

    @property
    def health(self) -> Health:
        return Health(state=self._state, reason=self._reason)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            rows=self.settings.rows,
            busy_rows=self._decoding + self._prefilling,
            queued=len(self._queue),
        )

    @property
    def context_length(self) -> int:
        return self._length

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._processors)

    def processor(self, adapter: str | None) -> LlamaAdapterProcessor:
        if adapter is None:
            return self._first
        if adapter not in self._processors:
            raise ConfigError(f"no adapter {adapter!r}; loaded: {', '.join(self._processors)}")
        return self._processors[adapter]

    def submit(
        self, request: GenerationRequest, *, notify: Callable[[], None] | None = None
    ) -> Generation:
        self._refuse_unless_ready()
        sampling, settings = request.sampling, self.settings
        self.processor(request.adapter)
        check_length(request, self._length)
        if sampling.n > settings.max_queue:
            raise ConfigError(f"n must be at most {settings.max_queue}, got {sampling.n}")
        if not request.prompt.input_ids:
            raise PromptError("the prompt has no tokens")
        if len(request.prompt.images) > settings.images:
            raise PromptError(
                f"the prompt has {len(request.prompt.images)} images; "
                f"at most {settings.images} can be read at once"
            )
        generation = Generation(request, notify)
        with self._changed:  # in which no adapter leaves
            self._refuse_unless_ready()
            request.check_processor(self.processor(request.adapter))
            self._refuse_if_full(request)
            grammar = self._grammars.compile(sampling)
            self._queue.append(self._answer(generation, grammar=grammar))
            self._changed.notify()
        return generation

    def _refuse_unless_ready(self) -> None:
        if self._state != "ready":
            raise UnavailableError(f"the engine is {self._state}")

    def _refuse_if_ending(self) -> None:
        if self._state in ("draining", "dead"):
            raise UnavailableError(f"the engine is {self._state}")

    def _refuse_if_full(self, request: GenerationRequest) -> None:
        waiting = sum(a.request.sampling.n if a.choice == 0 else 1 for a in self._queue)
        waiting += sum(len(a.siblings) for a in self._running())
        tokens = sum(len(a.prompt) for a in self._queue)
        if waiting + request.sampling.n > self.settings.max_queue:
            raise QueueFullError(
                f"{waiting} answers wait, and at most {self.settings.max_queue} may"
            )
        if tokens and tokens + len(request.prompt.input_ids) > self.settings.max_queue_tokens:
            raise QueueFullError(f"prompts of {tokens} tokens wait, the most that may")

    def load_adapter(self, name: str, directory: Path) -> None:
        processor = LlamaAdapterProcessor.from_pretrained(directory)
        with self._changed:  # in which an engine that is drained ends
            self._refuse_if_ending()
            done = self._calls.put(lambda: self._load(name, directory, processor))
        done.result()

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter: it takes no more requests, and those that it has are answered."""
        with self._changed:
            if len(self._processors) == 1 and name in self._processors:
                raise ConfigError(f"{name!r} is the only adapter; it cannot be unloaded")
            self._refuse_if_ending()
            self.processor(name)
            del self._processors[name]
            done = self._leaving[name] = Future()
            self._changed.notify()
        done.result()

    def drain(self, seconds: float) -> None:
        with self._changed:
            if self._state != "dead":
                self._state, self._drained_at = "draining", time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 60)

    def _answer(
        self, generation: Generation, *, grammar: Future[Any] | None, choice: int = 0
    ) -> PendingAnswer:
        request = generation.request
        sampling, processor = request.sampling, self.processor(request.adapter)
        options = processor.stop_options
        found = options.get("eos_token_id", self._model.end_ids)
        penalty = self._model.penalty
        answer = PendingAnswer(
            generation=generation,
            choice=choice,
            adapter=None if request.adapter is None else self._stack[request.adapter],
            processor=processor,
            stop_ids=frozenset(found),
            drawer=Drawer(
                sampling=sampling,
                choice=choice,
                penalty=penalty,
                seen=[] if penalty == 1 else list(request.prompt.input_ids),
            ),
            text=TextStream(processor, sampling.stop),
            grammar=grammar,
        )
        answer.read_prompt()
        if choice == 0:
            answer.siblings = [
                self._answer(generation, grammar=grammar, choice=i) for i in range(1, sampling.n)
            ]
        return answer

    # --- the engine's thread ----------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            self._stack.attach()
            try:
                self._model.warm_up()
                with self._changed:
                    if self._state == "starting":
                        self._state = "ready"
                while self._wait():
                    try:
                        self._step()
                    except Exception as error:
                        self._recover(error)
            except Exception as error:
                self._die(error)
            self._stack.detach()

    def _wait(self) -> bool:
        """Wait for something to do; False where nothing will come any more."""
        with self._changed:
            while not self._has_work():
                if self._state in ("draining", "dead"):
                    return False
                self._changed.wait()
        return self._state != "dead"

    def _has_work(self) -> bool:
        busy = self._decoding + self._prefilling
        return bool(busy or self._queue or self._calls or self._leaving)

    def _step(self) -> None:
        self._steps += 1
        self._make_calls()
        self._end_overdue()
        self._admit()
        tried = self._decoding + self._prefilling
        worked = self._read_prompts() + self._decode()
        self._deliver()
        if worked:
            self._crashes = 0
        elif tried:
            self._try_out()
        elif not self._calls:
            # all that wait, wait for a grammar
            with self._changed:
                self._changed.wait(0.002)

    def _recover(self, error: Exception) -> None:
        """Go on after a step that failed: what runs is lost, requests that wait are not."""
        failed = {answer.generation for answer in self._running()}
        self._deliver()  # also to those that ended in this step
        for generation in failed:
            generation.fail(error)
        for answer in [a for a in self._waiting() if a.generation in failed]:
            self._unqueue(answer)
        for row in self._cache.rows:
            row.answer, row.owner, row.content = None, None, []
        self._decoding = self._prefilling = 0
        for image in self._images.values():
            image.users = 0
        self._try_out()

    def _try_out(self) -> None:
        """See whether it was the requests: a server that bad requests could end would be theirs."""
        try:
            logits_NV = self._model.try_row(self._decoding + self._prefilling)
            draw(logits_NV, [Drawer(sampling=Sampling(temperature=0))])
        except Exception as error:
            self._crashes += 1
            if self._crashes >= _MOST_CRASHES:
                self._die(error)
        else:
            self._crashes = 0

    def _die(self, error: Exception) -> None:
        self._reason = f"{type(error).__name__}: {error}"
        with self._changed:
            self._state = "dead"
            waiting = [*self._queue, *self._running()]
            self._queue.clear()
            leaving = [*self._leaving.values()]
            self._leaving.clear()
            self._calls.refuse(UnavailableError("the engine is dead"))
        for done in leaving:
            done.set_result(None)
        for answer in waiting:
            answer.generation.fail(UnavailableError(f"the engine is dead: {self._reason}"))

    def _waiting(self) -> list[PendingAnswer]:
        with self._changed:
            return list(self._queue)

    def _running(self) -> list[PendingAnswer]:
        # each is looked at once: to other threads a row may become free at any time
        answers = [row.answer for row in self._cache.rows]
        return [answer for answer in answers if answer is not None]

    # --- adapters ---------------------------------------------------------------------------

    def _make_calls(self) -> None:
        self._calls.make()
        with self._changed:  # an adapter that leaves by now takes no more requests
            leaving = list(self._leaving)
        used = {
            a.adapter.name for a in (*self._running(), *self._waiting()) if a.adapter is not None
        }
        for name in leaving:
            if name not in used:
                complete(self._leaving.pop(name), partial(self._forget, name))

    def _load(self, name: str, directory: Path, processor: LlamaAdapterProcessor) -> None:
        if name in self._processors or name in self._leaving:
            raise ConfigError(f"an adapter named {name!r} is loaded already")
        key = _encoder_key(read_adapter_config(Path(directory)).get("vision"))
        # a new adapter finds its places by gradients
        with self._stack.detached(), torch.inference_mode(False):
            model = LlamaAdapterForConditionalGeneration.from_pretrained(
                directory, language_model=self._stack.language_model, vision=self._encoders.get(key)
            )
            model.disable_adapters()
        self._stack.add(name, model.adapter, model.vision)
        self._encoders.setdefault(key, model.vision)
        self._processors[name] = processor

    def _forget(self, name: str) -> None:
        adapter = self._stack[name]
        for key in [key for key in self._images if key[0] is adapter]:
            self._stack.release([self._images.pop(key).entry])
        for row in self._cache.rows:
            if row.owner is adapter:
                row.owner, row.content = None, []
        self._stack.remove(name)
        used = {id(other.vision) for other in self._stack.adapters.values()}
        self._encoders = {key: v for key, v in self._encoders.items() if id(v) in used}

    # --- admission --------------------------------------------------------------------------

    def _end_overdue(self) -> None:
        for answer in self._running():
            if (reason := self._overdue(answer)) is not None:
                self._finish(answer, reason)
        for answer in self._waiting():
            if (reason := self._overdue(answer)) is not None:
                self._unqueue(answer)
                if answer.grammar is not None:
                    answer.grammar.cancel()
                for one in (answer, *answer.siblings):
                    self._put(one, Increment(choice=one.choice, finish=reason))

    def _unqueue(self, answer: PendingAnswer) -> None:
        with self._changed:
            self._queue.remove(answer)

    def _overdue(self, answer: PendingAnswer) -> Finish | None:
        if answer.generation.is_cancelled:
            return "cancelled"
        now, deadline = time.monotonic(), answer.request.deadline
        is_late = now >= self._drained_at or (deadline is not None and now >= deadline)
        return "deadline" if is_late else None

    def _admit(self) -> None:
        self._encode_together()
        for answer in self._waiting():
            busy = self._decoding + self._prefilling
            if busy == len(self._cache.rows):
                return
            if answer.generation.is_done:  # a sibling before it has failed
                continue
            if answer.grammar is not None and not answer.grammar.done():
                continue
            if not self._make_room(answer):
                return
            self._unqueue(answer)
            try:
                if answer.grammar is not None:
                    answer.drawer.matcher = Matcher(
                        answer.grammar.result(), sorted(answer.stop_ids), self._model.vocabulary
                    )
                self._encode_images(answer)
            except Exception as error:
                self._fail(answer, error)
                continue
            try:
                self._place(answer)
            except Exception as error:
                answer.generation.fail(error)
                raise

    def _make_room(self, answer: PendingAnswer) -> bool:
        """Free entries of images that nobody reads, the oldest first, for those of an answer."""
        keys = {(answer.adapter, key) for key in answer.keys}
        missing = len(keys - self._images.keys())
        unused = sorted(
            (key for key, image in self._images.items() if not image.users and key not in keys),
            key=lambda key: self._images[key].used_at,
        )
        if self._stack.free_images + len(unused) < missing:
            return False  # what others need is not thrown out for nothing
        while self._stack.free_images < missing and unused:
            self._stack.release([self._images.pop(unused.pop(0)).entry])
        return self._stack.free_images >= missing

    def _encode_together(self) -> None:
        """Read images of several requests in one pass; where that fails, each is read alone."""
        groups: dict[tuple[StackedAdapter, torch.Size], dict[str, Tensor]] = {}
        free = len(self._cache.rows) - self._decoding - self._prefilling
        for answer in self._waiting()[:free]:
            for key, pixels in self._new_images(answer).items():
                assert answer.adapter is not None
                groups.setdefault((answer.adapter, pixels.shape), {})[key] = pixels
        for (adapter, _), new in groups.items():
            if 1 < len(new) <= self._stack.free_images:
                with suppress(Exception):
                    self._encode(adapter, new)

    def _encode_images(self, answer: PendingAnswer) -> None:
        new, adapter = self._new_images(answer), answer.adapter
        if len({pixels.shape for pixels in new.values()}) > 1:
            raise PromptError("images and videos of one prompt must have equally many frames")
        if new and adapter is not None:
            self._encode(adapter, new)
        answer.images = [self._images[adapter, key] for key in answer.keys if adapter]
        for ready in answer.images:
            ready.users += 1

    def _new_images(self, answer: PendingAnswer) -> dict[str, Tensor]:
        """Pixels of an answer's images that are not ready yet."""
        new: dict[str, Tensor] = {}
        if answer.adapter is None:
            return new
        for key, image in zip(answer.keys, answer.request.prompt.images, strict=False):
            if (answer.adapter, key) not in self._images:
                pixels = image.pixel_values
                if pixels.ndim == 3 and (frames := num_frames(answer.request)) > 1:
                    pixels = pixels.expand(frames, *pixels.shape)
                new[key] = pixels
        return new

    def _encode(self, adapter: StackedAdapter, new: dict[str, Tensor]) -> None:
        entries = self._stack.encode(adapter.name, torch.stack(list(new.values())))
        for key, entry in zip(new, entries, strict=True):
            self._images[adapter, key] = ReadyImage(entry, used_at=self._steps)

    def _place(self, answer: PendingAnswer) -> None:
        """Give an answer the first free row, with what any row holds of its prompt already."""
        # the last token is read again, for what follows it
        row, count = self._cache.claim(
            self._decoding + self._prefilling,
            owner=answer.owner,
            content=answer.content[:-1],
        )
        row.answer, row.used_at, answer.row = answer, self._steps, row
        answer.admitted_at = self._steps
        self._prefilling += 1
        usage = answer.generation.usage
        if answer.choice == 0:
            answer.generation.usage = Usage(prompt_tokens=usage.prompt_tokens, cached_tokens=count)

    # --- passes -----------------------------------------------------------------------------

    def _read_prompts(self) -> int:
        """A pass over new prompts, or several while more answers begin by it than wait for it.

        Tokens are then made for many rows at once, not for the few whose prompts were read first.
        """
        worked = 0
        for _ in range(max(1, self._prefilling - self._decoding)):
            worked += self._prefill()
            self._deliver()
        return worked

    def _prefill(self) -> int:
        """Read a piece of new prompts, of several at once while they are short."""
        if not self._prefilling:
            return 0
        budget, end = self.settings.prefill_tokens, self._decoding + self._prefilling
        # rows change their places: the oldest prompt goes on first, or it might never end
        first = min(
            range(self._decoding, end), key=lambda i: self._cache.rows[i].answer.admitted_at
        )
        chunks: list[list[int]] = []
        for row in self._cache.rows[first:end]:
            chunk = row.answer.chunk(budget // (len(chunks) + 1))
            longest = max(map(len, (*chunks, chunk)))
            if chunks and longest * (len(chunks) + 1) > budget:
                break
            chunks.append(chunk)
        found = self._pass(first, chunks)
        read = [(a, x) for a, x in found if a.row and len(a.row.content) == len(a.prompt)]
        for answer, _ in read:
            self._cache.swap(self._place_of(answer), self._decoding)
            self._decoding += 1
            self._prefilling -= 1
            with self._changed:
                self._queue.extendleft(reversed(answer.siblings))
            answer.siblings = []
        return len(found) - len(read) + self._advance(read)

    def _decode(self) -> int:
        rows = self._cache.rows[: self._decoding]
        if not rows:
            return 0
        found = self._pass(0, [row.answer.chunk(1) for row in rows])
        return self._advance(found)

    def _pass(self, first: int, chunks: list[list[int]]) -> list[tuple[PendingAnswer, Tensor]]:
        """Run the model over rows from `first` on; what answers it brought on, with their logits.

        Where the pass fails, each row is tried alone, and ends with the error if it fails again.
        """
        answers = [row.answer for row in self._cache.rows[first : first + len(chunks)]]
        found = list(self._tried(first, answers, chunks))
        for answer in answers:
            if answer.error is not None:
                self._fail(answer, answer.error)
        # an answer that failed ends its siblings too
        return [(answer, logits_V) for answer, logits_V in found if answer.is_running]

    def _tried(
        self, first: int, answers: list[PendingAnswer], chunks: list[list[int]]
    ) -> Iterator[tuple[PendingAnswer, Tensor]]:
        try:
            logits_NV = self._model.run(
                first, [_chunk(*pair) for pair in zip(answers, chunks, strict=True)]
            )
        except Exception as error:
            if len(answers) == 1:
                answers[0].error = error
                return
            for i, (answer, chunk) in enumerate(zip(answers, chunks, strict=True)):
                yield from self._tried(first + i, [answer], [chunk])
            return
        for answer, chunk, logits_V in zip(answers, chunks, logits_NV, strict=True):
            row = answer.row
            assert row is not None
            if answer.is_prefilling:
                done = len(row.content)
                row.content += answer.content[done : done + len(chunk)]
            else:
                row.content += map(answer.content_of, chunk)
            row.used_at = self._steps
            yield answer, logits_V

    def _advance(self, found: list[tuple[PendingAnswer, Tensor]]) -> int:
        """Draw the next token of each answer; how many went on."""
        if not found:
            return 0
        answers = [answer for answer, _ in found]
        logits_NV = torch.stack([logits_V for _, logits_V in found])
        are_numbers = logits_NV.amax(-1).isfinite().tolist()
        if not all(are_numbers):  # nothing can be drawn from them, and a GPU would stop for good
            for (answer, _), is_good in zip(found, are_numbers, strict=True):
                if not is_good:
                    self._fail(answer, RuntimeError("the model gave logits that are not numbers"))
            good = [pair for pair, is_good in zip(found, are_numbers, strict=True) if is_good]
            return self._advance([pair for pair in good if pair[0].is_running])
        drawers = [answer.drawer for answer in answers]
        is_bound = any(drawer.binds for drawer in drawers)
        try:
            tokens = draw(logits_NV.clone() if is_bound else logits_NV, drawers)
        except Exception as error:
            if len(found) > 1:
                return sum(self._advance([one]) for one in found)
            self._fail(answers[0], error)
            return 0
        parts = log_probabilities(logits_NV, tokens, [a.request.sampling for a in answers])
        went_on = 0
        for answer, part in zip(answers, parts, strict=True):
            if not answer.is_running:  # a sibling failed
                continue
            try:
                self._take(answer, part)
            except Exception as error:
                self._fail(answer, error)
            else:
                went_on += 1
        return went_on

    def _take(self, answer: PendingAnswer, part: TokenLogprob) -> None:
        token = part.token
        answer.tokens.append(token)
        answer.drawer.take(token)
        added = answer.text.push(token)
        matcher = answer.drawer.matcher
        if token in answer.stop_ids or answer.text.is_ended or (matcher and matcher.is_ended):
            self._finish(answer, "stop", part, added)
        elif len(answer.tokens) >= answer.request.sampling.max_tokens:
            self._finish(answer, "length", part, added)
        else:
            self._put(answer, Increment(choice=answer.choice, text=added, tokens=(part,)))

    def _finish(
        self,
        answer: PendingAnswer,
        reason: Finish,
        part: TokenLogprob | None = None,
        text: str = "",
    ) -> None:
        text += answer.text.finish(answer.tokens)
        tokens = () if part is None else (part,)
        self._put(answer, Increment(choice=answer.choice, text=text, tokens=tokens, finish=reason))
        for sibling in answer.siblings:  # of a prompt that was not even read
            self._put(sibling, Increment(choice=sibling.choice, finish=reason))
        self._free(answer)

    def _fail(self, answer: PendingAnswer, error: Exception) -> None:
        """End a request, all of its answers, with an error."""
        generation = answer.generation
        if delivered := self._delivered.pop(generation, ()):
            generation.put(*delivered)
        generation.fail(error)
        for waiting in [a for a in self._waiting() if a.generation is generation]:
            self._unqueue(waiting)
        for running in [a for a in self._running() if a.generation is generation]:
            self._free(running)

    def _place_of(self, answer: PendingAnswer) -> int:
        return next(i for i, row in enumerate(self._cache.rows) if row is answer.row)

    def _free(self, answer: PendingAnswer) -> None:
        """Give a row back, with what it holds, and close the gap in the block of busy rows."""
        cache = self._cache
        place = self._place_of(answer)
        cache.rows[place].answer = None
        for image in answer.images:
            image.users -= 1
            image.used_at = self._steps
        if place < self._decoding:
            self._decoding -= 1
            cache.swap(place, self._decoding)
            cache.swap(self._decoding, self._decoding + self._prefilling)
        else:
            self._prefilling -= 1
            cache.swap(place, self._decoding + self._prefilling)

    # --- delivery ---------------------------------------------------------------------------

    def _put(self, answer: PendingAnswer, increment: Increment) -> None:
        self._delivered.setdefault(answer.generation, []).append(increment)

    def _deliver(self) -> None:
        while self._delivered:
            generation, increments = self._delivered.popitem()
            usage = generation.usage
            made = sum(len(increment.tokens) for increment in increments)
            usage = Usage(
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens + made,
            )
            generation.put(*increments, usage=usage)


def _chunk(answer: PendingAnswer, tokens: list[int]) -> Chunk:
    assert answer.row is not None
    start = len(answer.row.content)
    return Chunk(start=start, tokens=tokens, reads=answer.reads(start, start + len(tokens)))


def _encoder_key(described: dict[str, Any] | None) -> Any:
    """What tells one vision encoder from another; None for none."""
    return None if described is None else described.get("fingerprint") or described["name_or_path"]
