"""An engine that answers one request after another through transformers' `generate`.

For bases whose caches cannot be shared by rows, such as those with sliding windows.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

from llama_adapter.errors import ConfigError, PromptError, QueueFullError, UnavailableError
from llama_adapter.generation.answer import settled_text, text_before
from llama_adapter.generation.calls import Calls
from llama_adapter.generation.requests import (
    EncodedPrompt,
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
from llama_adapter.generation.settings import GenerationSettings
from llama_adapter.model import LlamaAdapterForConditionalGeneration
from llama_adapter.processing.batching import EncodedSample, join_images, make_batch
from llama_adapter.processing.encoding import Encoded, pad_id
from llama_adapter.processing.processor import LlamaAdapterProcessor


class SequentialEngine:
    """`Engine` with one row; see `llama_adapter.generation.requests.Engine`."""

    def __init__(
        self,
        model: LlamaAdapterForConditionalGeneration,
        processor: LlamaAdapterProcessor,
        *,
        name: str,
        max_queue: int = 64,
    ) -> None:
        """Start; the model's active adapter is called `name`."""
        self._model = model.eval()
        self._loaded = {name: (model.active_adapter, processor)}
        self._first = processor
        self._max_queue = max_queue
        self._queue: deque[Generation] = deque()
        self._busy: Generation | None = None
        self._changed = threading.Condition()
        self._calls = Calls(self._changed)
        self._state: State = "starting"
        self._reason = ""
        self._drained_at = float("inf")
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def health(self) -> Health:
        return Health(state=self._state, reason=self._reason)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(rows=1, busy_rows=int(self._busy is not None), queued=len(self._queue))

    @property
    def context_length(self) -> int:
        text = self._model.language_model.config.get_text_config()
        known = (getattr(text, "max_position_embeddings", None), self._first.context_length)
        return min((length for length in known if length), default=2048)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def processor(self, adapter: str | None) -> LlamaAdapterProcessor:
        return self._first if adapter is None else self._entry(adapter)[1]

    def submit(
        self, request: GenerationRequest, *, notify: Callable[[], None] | None = None
    ) -> Generation:
        request.check_processor(self.processor(request.adapter))
        if request.sampling.json_schema is not None or request.sampling.grammar is not None:
            raise ConfigError("json_schema and grammar are not supported with this base")
        check_length(request, self.context_length)
        generation = Generation(request, notify)
        with self._changed:  # in which an engine that is drained ends
            if self._state != "ready":
                raise UnavailableError(f"the engine is {self._state}")
            if len(self._queue) >= self._max_queue:
                raise QueueFullError(f"{len(self._queue)} requests wait, the most that may")
            self._queue.append(generation)
            self._changed.notify()
        return generation

    def load_adapter(self, name: str, directory: Path) -> None:
        processor = LlamaAdapterProcessor.from_pretrained(directory)
        self._call(lambda: self._load(name, directory, processor))

    def unload_adapter(self, name: str) -> None:
        self._call(lambda: self._forget(name))

    def _call(self, function: Callable[[], None]) -> None:
        """Have the engine's thread do something with the model before the next request."""
        with self._changed:  # in which an engine that is drained ends
            if self._state in ("draining", "dead"):
                raise UnavailableError(f"the engine is {self._state}")
            done = self._calls.put(function)
        done.result()

    def _load(self, name: str, directory: Path, processor: LlamaAdapterProcessor) -> None:
        if name in self._loaded:
            raise ConfigError(f"an adapter named {name!r} is loaded already")
        self._model.prepare_for_training()  # merged weights are of one adapter alone
        self._model.load_adapter(directory, name)
        self._model.eval()
        self._loaded[name] = (name, processor)

    def _forget(self, name: str) -> None:
        own_name, _ = self._entry(name)
        if len(self._loaded) == 1:
            raise ConfigError(f"{name!r} is the only adapter; it cannot be unloaded")
        del self._loaded[name]
        if self._model.active_adapter == own_name:
            self._model.set_adapter(next(iter(self._loaded.values()))[0])
        self._model.delete_adapter(own_name)

    def drain(self, seconds: float) -> None:
        with self._changed:
            if self._state != "dead":
                self._state, self._drained_at = "draining", time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 60)

    def _entry(self, name: str) -> tuple[str, LlamaAdapterProcessor]:
        if name not in self._loaded:
            raise ConfigError(f"no adapter {name!r}; loaded: {', '.join(self._loaded)}")
        return self._loaded[name]

    def _work(self) -> None:
        """The engine's thread: it ends when the engine is drained or cannot even warm up."""
        try:
            self._answer(_warm_up(self._first))
        except Exception as error:
            with self._changed:
                self._state, self._reason = "dead", f"{type(error).__name__}: {error}"
                self._calls.refuse(UnavailableError("the engine is dead"))
            return
        with self._changed:
            if self._state == "starting":
                self._state = "ready"
        while self._has_work():
            self._calls.make()
            if (generation := self._next()) is None:
                continue
            try:
                self._answer(generation)
            except Exception as error:  # of this request alone, whatever it is
                generation.fail(error)
            self._busy = None

    def _has_work(self) -> bool:
        """Wait for something to do; False where nothing will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._calls or self._state == "draining")
            return bool(self._queue or self._calls)

    def _next(self) -> Generation | None:
        with self._changed:
            self._busy = self._queue.popleft() if self._queue else None
            return self._busy

    def _answer(self, generation: Generation) -> None:
        request = generation.request
        request.check_processor(self.processor(request.adapter))  # others may have come meanwhile
        with self._adapter_on(request.adapter):
            for choice in range(request.sampling.n):
                self._answer_once(generation, choice)

    @contextmanager
    def _adapter_on(self, adapter: str | None) -> Iterator[None]:
        if adapter is None:
            with self._model.adapters_disabled():
                yield
            return
        own_name, _ = self._entry(adapter)
        if self._model.active_adapter != own_name:
            self._model.set_adapter(own_name)
        yield

    @torch.no_grad()
    def _answer_once(self, generation: Generation, choice: int) -> None:
        request = generation.request
        processor = self.processor(request.adapter)
        writer = _Writer(generation, choice, processor, drained_at=lambda: self._drained_at)
        options = {**processor.stop_options, **_sampling_options(request.sampling)}
        options.pop("stop_strings", None)  # the writer looks for them
        writer.ids = frozenset(options.get("eos_token_id", ()))
        if writer.must_end:
            writer.finish("cancelled" if generation.is_cancelled else "deadline")
            return
        seed = request.sampling.seed
        with torch.random.fork_rng():
            torch.manual_seed(torch.seed() if seed is None else seed + choice)
            self._model.generate(
                **_inputs(request.prompt, self._model.device),
                **options,
                pad_token_id=pad_id(processor.tokenizer),
                logits_processor=[writer],
                stopping_criteria=[writer.criterion],
            )
        if not writer.is_done:
            writer.finish("length")


class _Writer(LogitsProcessor):
    """Follows one `generate`: turns its tokens into increments, and says when to end."""

    def __init__(
        self,
        generation: Generation,
        choice: int,
        processor: LlamaAdapterProcessor,
        *,
        drained_at: Callable[[], float],
    ) -> None:
        self.ids: frozenset[int] = frozenset()
        self.is_done = False
        self.criterion = _Criterion(self)
        self._generation, self._choice, self._processor = generation, choice, processor
        self._drained_at = drained_at
        self._start = len(generation.request.prompt.input_ids)
        self._ends = (*processor.ends, *generation.request.sampling.stop)
        self._logits_V = torch.empty(0)
        self._tokens: list[int] = []
        self._waiting: list[TokenLogprob] = []
        self._shown = ""

    def __call__(self, _tokens_BT: Tensor, scores_BV: Tensor) -> Tensor:
        self._logits_V = scores_BV[0]
        return scores_BV

    @property
    def must_end(self) -> bool:
        now, deadline = time.monotonic(), self._generation.request.deadline
        is_late = now >= self._drained_at() or (deadline is not None and now >= deadline)
        return is_late or self._generation.is_cancelled

    def step(self, token: int) -> bool:
        """Take a new token; whether the answer ends here."""
        sampling = self._generation.request.sampling
        self._tokens.append(token)
        self._waiting.append(_logprob(token, self._logits_V, sampling))
        text = self._text()
        if token in self.ids or any(end in text for end in self._ends):
            self.finish("stop")
        elif len(self._tokens) >= sampling.max_tokens:
            self.finish("length")
        elif self.must_end:
            self.finish("cancelled" if self._generation.is_cancelled else "deadline")
        else:
            self._deliver(settled_text(text, self._ends), None)
        return self.is_done

    def finish(self, reason: Finish) -> None:
        """Deliver what is left, up to what ends the answer."""
        self.is_done = True
        text = self._processor.without_end(text_before(self._text(), self._ends))
        self._deliver(text, reason)

    def _deliver(self, text: str, finish: Finish | None) -> None:
        added, self._shown = text[len(self._shown) :], max(self._shown, text, key=len)
        usage = self._generation.usage
        done = usage.completion_tokens + len(self._waiting)
        self._generation.put(
            Increment(choice=self._choice, text=added, tokens=tuple(self._waiting), finish=finish),
            usage=Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=done),
        )
        self._waiting = []

    def _text(self) -> str:
        return str(self._processor.tokenizer.decode(self._tokens, skip_special_tokens=True))


class _Criterion(StoppingCriteria):
    def __init__(self, writer: _Writer) -> None:
        self._writer = writer

    def __call__(self, tokens_BT: Tensor, _scores: Any, **_: Any) -> Tensor:
        is_done = self._writer.is_done or self._writer.step(int(tokens_BT[0, -1]))
        return torch.full((len(tokens_BT),), is_done, device=tokens_BT.device)


def check_length(request: GenerationRequest, context_length: int) -> None:
    """PromptError where prompt and answer do not fit into the context together."""
    prompt, answer = len(request.prompt.input_ids), request.sampling.max_tokens
    if prompt + answer > context_length:
        raise PromptError(
            f"the prompt has {prompt} tokens and max_tokens is {answer}; "
            f"together at most {context_length} fit"
        )


def _warm_up(processor: LlamaAdapterProcessor) -> Generation:
    prompt = processor.encode("Hello", rendered=True)
    return Generation(
        GenerationRequest(
            prompt=EncodedPrompt(input_ids=prompt.input_ids, placeholders=prompt.placeholders),
            sampling=Sampling(max_tokens=1),
        )
    )


def _sampling_options(sampling: Sampling) -> dict[str, Any]:
    options = GenerationSettings(
        max_new_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    ).as_keywords()
    if options["do_sample"]:
        options |= {"top_k": sampling.top_k, "min_p": sampling.min_p}
    return options


def _inputs(prompt: EncodedPrompt, device: torch.device) -> dict[str, Any]:
    """What `generate` takes of one prompt."""
    images = [image.pixel_values[None] for image in prompt.images]
    length = len(prompt.input_ids)
    encoded = Encoded(
        input_ids=prompt.input_ids, labels=(), placeholders=prompt.placeholders or (-1,) * length
    )
    pixels = join_images(images, still=4) if images else None
    inputs = make_batch(
        [[EncodedSample(encoded=encoded, pixels=pixels)]],
        filling=0,
        length=length,
        placeholders_only=max(encoded.placeholders) >= 0,
        labels=False,
    )
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _logprob(token: int, logits_V: Tensor, sampling: Sampling) -> TokenLogprob:
    if not sampling.logprobs:
        return TokenLogprob(token=token)
    logprobs_V = logits_V.float().log_softmax(-1)
    values, tokens = logprobs_V.topk(min(sampling.top_logprobs, len(logprobs_V)))
    return TokenLogprob(
        token=token,
        logprob=float(logprobs_V[token]),
        top=tuple(zip(tokens.tolist(), values.tolist(), strict=True)),
    )
