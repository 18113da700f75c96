"""The experts that come with the package; see `registry` for how they are named."""

from __future__ import annotations

from collections.abc import Mapping

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Expert
from llama_adapter.experts.registry import ExpertKind, Options, Surroundings, existing_folder


def _caption(options: Options, around: Surroundings) -> Expert:
    from llama_adapter.experts.caption import is_adapter_directory, load_caption_expert
    from llama_adapter.experts.pipeline_caption import PipelineCaptionExpert

    where = options.take("main", "")
    instruction = options.take("instruction", "") or None
    max_new_tokens = options.take("max_new_tokens", 96)
    if max_new_tokens < 1:
        raise ExpertError(
            f"expert 'caption': max_new_tokens must be at least 1, got {max_new_tokens}"
        )
    if not where:
        raise ExpertError(
            "expert 'caption' needs the directory of a caption adapter for the same base, or the "
            "name of an image-text-to-text model: --expert caption=DIR"
        )
    if is_adapter_directory(where):
        if around.model is None:
            raise ExpertError("a caption adapter needs its base: no model is loaded")
        return load_caption_expert(
            where,
            model=around.model,
            instruction=instruction,
            max_new_tokens=max_new_tokens,
        )
    return PipelineCaptionExpert(
        where, instruction=instruction, max_new_tokens=max_new_tokens, device=around.device
    )


def _ocr(options: Options, around: Surroundings) -> Expert:  # noqa: ARG001
    from llama_adapter.experts.ocr import DEFAULT_WORDING, OcrExpert

    return OcrExpert(
        confidence=options.take("confidence", 0.5),
        languages=options.words("languages"),
        models=options.take("models", "") or None,
        threads=options.take("threads", 1),
        wording=options.take("wording", DEFAULT_WORDING),
    )


def _detection(options: Options, around: Surroundings) -> Expert:
    from llama_adapter.experts.detection import DetectionExpert

    return DetectionExpert(
        options.take("main", ""),
        labels=options.words("labels"),
        confidence=options.take("confidence", 0.5),
        device=around.device,
    )


def _search(options: Options, around: Surroundings) -> Expert:  # noqa: ARG001
    from llama_adapter.experts.search import SearchExpert

    folder = existing_folder(options.take("main", ""), expert="search")
    return SearchExpert(folder, passages=options.take("passages", 3))


def _web(options: Options, around: Surroundings) -> Expert:  # noqa: ARG001
    from llama_adapter.experts.web_search import WebSearchExpert

    return WebSearchExpert(
        options.take("main", ""),
        results=options.take("results", 3),
        with_findings=options.take("with_findings", False),
    )


def _auto(options: Options, around: Surroundings) -> Expert:
    from llama_adapter.experts.registry import make_experts

    options.done()
    return make_experts(["auto"], around)[0]


EXPERTS: Mapping[str, ExpertKind] = {
    "caption": ExpertKind(
        make=_caption, summary="describes the picture: a caption adapter on the same base"
    ),
    "ocr": ExpertKind(
        make=_ocr,
        summary="reads the words in the picture",
        needs=(("rapidocr", "ocr"), ("onnxruntime", "ocr")),
    ),
    "detection": ExpertKind(
        make=_detection,
        summary="lists the things in the picture and where they are",
        wants="the name or directory of an object-detection model",
    ),
    "search": ExpertKind(
        make=_search,
        summary="finds passages in a folder of texts",
        needs=(("bm25s", "search"),),
        wants="a folder of texts",
    ),
    "web": ExpertKind(
        make=_web,
        summary="asks a search service of the user's choice",
        wants="the address of a search service",
    ),
    "auto": ExpertKind(make=_auto, summary="asks whichever experts a question calls for"),
}
"""By name."""
