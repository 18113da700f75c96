"""What a request says is used or refused, never passed over."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llama_adapter.serving.schema import CompletionRequest, Part, TokenizeRequest

IMAGE, VIDEO = "data:image/png;base64,AA", "data:video/mp4;base64,AA"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "What is it?", "image_url": IMAGE},
        {"type": "image_url", "image_url": {"url": IMAGE}, "text": "What is it?"},
        {"type": "image_url", "image_url": IMAGE, "video_url": VIDEO},
        {"type": "input_video", "video_url": VIDEO, "image_url": IMAGE},
        {"type": "image_url", "video_url": VIDEO},
    ],
)
def test_a_part_holds_what_its_type_says_alone(part: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"a part of type '{part['type']}' needs"):
        Part.model_validate(part)


def test_an_empty_url_is_one_that_leads_nowhere() -> None:
    assert Part.model_validate({"type": "image_url", "image_url": ""}).url == ""


@pytest.mark.parametrize("prompt", ["\ud800", ["\ud800"]])
def test_half_of_a_surrogate_pair_is_no_prompt(prompt: Any) -> None:
    """Tokenizers fail at it, which is not the server's fault."""
    with pytest.raises(ValidationError, match="prompt"):
        CompletionRequest.model_validate({"model": "toy", "prompt": prompt})
    if isinstance(prompt, str):
        with pytest.raises(ValidationError, match="prompt"):
            TokenizeRequest.model_validate({"model": "toy", "prompt": prompt})
