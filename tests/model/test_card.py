"""What an adapter's card says of its license goes with all that is made from the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llama_adapter import LlamaAdapterForConditionalGeneration
from llama_adapter.model.card import terms_of
from llama_adapter.photos.bundled import ADAPTER


def saved_again(adapter_dir: Path, card: bytes, folder: Path) -> ModelCard:
    shutil.copytree(adapter_dir, folder / "mine")
    (folder / "mine" / "README.md").write_bytes(card)
    model = LlamaAdapterForConditionalGeneration.from_pretrained(folder / "mine")
    model.save_pretrained(folder / "again")
    return ModelCard.load(folder / "again" / "README.md")


@pytest.mark.parametrize(
    ("card", "stated", "name"),
    [
        ("---\nlicense: other\n---\n\n# Mine\n", "other", "Mine"),
        ('---\r\n"license": mit\r\n---\r\n# `Mine`\r\n', "mit", "Mine"),
        (
            "\ufeff---\nlicense:\n- cc-by-nc-4.0\n- mit\n--- \nText.\n",
            ["cc-by-nc-4.0", "mit"],
            "mine",
        ),
        ("---\nlicense: >-\n  other\ntags: [a]\n---\nText.\n\n# Code\n", "other", "mine"),
    ],
)
def test_it_is_carried(
    adapter_dir: Path, tmp_path: Path, card: str, stated: object, name: str
) -> None:
    found = saved_again(adapter_dir, card.encode(), tmp_path)
    assert found.data.license == stated
    assert f"Made from `{name}`: its terms" in found.text


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"\xff",
        b"license: other\n",
        b"# Mine\n\nlicense: ask me: [x\n",
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense: 3\n---\n",
        b"---\n- license\n---\n",
        b"---\nlicense_name: mine\n---\n",
        b"---\nlicense: other\n",
    ],
)
def test_where_none_is_stated_none_is_carried(
    adapter_dir: Path, tmp_path: Path, card: bytes
) -> None:
    found = saved_again(adapter_dir, card, tmp_path)
    assert found.data.license is None
    assert "terms" not in found.text


def test_the_bundled_photos_adapter_has_terms() -> None:
    terms = terms_of(ADAPTER)
    assert terms is not None
    assert terms.name == "photos"
    assert terms.metadata["license"] == "other"
