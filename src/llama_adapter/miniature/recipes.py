"""The courses behind the shipped adapters and the live training; one mechanism, other settings."""

from __future__ import annotations

from dataclasses import replace

from llama_adapter.config import AdapterConfig
from llama_adapter.miniature.course import Course
from llama_adapter.miniature.lessons import LessonPlan

PROJECTOR = {
    "projector": "query_transformer",
    "projector_width": 128,
    "projector_blocks": 2,
    "projector_heads": 4,
}

V2 = AdapterConfig.preset(
    "v2",
    prompt_length=8,
    visual_layers=3,
    visual_prompt_length=16,
    visual_scope="placeholders",
    placeholder_attention="own",
    **PROJECTOR,
)
"""The paper's V2 at toy size; K = N/2 layers read the picture, through placeholders."""

CAPTION = AdapterConfig.preset(
    "v1-multimodal",
    prompt_length=16,
    visual_prompt_length=16,
    **PROJECTOR,
)
"""The paper's default caption expert at toy size: late fusion, captions only."""

V2_COURSE = Course(adapter=V2, steps=3300)
LIVE_COURSE = replace(V2_COURSE, language_first=0.25)
"""For minutes instead of an hour: of fewer steps LANGUAGE needs a larger share."""
ABLATION_COURSE = replace(V2_COURSE, language_first=0.4)
"""For a few hundred steps: a larger one still."""
CAPTION_COURSE = Course(
    adapter=CAPTION,
    steps=2600,
    joint="naive",
    instructions=False,
    language_first=0.0,
    # it captions pictures, whatever stands beside them
    plan=LessonPlan(beside_share=0.0),
)
COURSES = {"v2": V2_COURSE, "caption": CAPTION_COURSE}
"""How each shipped adapter was made."""
