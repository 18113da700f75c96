"""Pretraining scores no word as false that is held out with what a text describes."""

from __future__ import annotations

import torch
from tools.miniature.decoder import collate
from tools.miniature.masking import without_unscored
from tools.miniature.pretraining_text import Document, Piece
from tools.miniature.tokenizer import build_tokenizer

from llama_adapter.miniature.scenes import Scene, SceneObject

SCENE = Scene(
    objects=(
        SceneObject(shape="square", color="green", size="small", place="north"),
        SceneObject(shape="star", color="white", size="large", place="south"),
    )
)


def test_just_the_held_out_words_are_left_out():
    tokenizer = build_tokenizer()
    answer = Piece(text="the square is green. a white star.", weight=1.0, segment=0)
    batch = collate([Document(pieces=(answer,), scene=SCENE)], tokenizer)
    found = {
        tokenizer.decode([label]): tokenizer.decode([token])
        for label, token in zip(batch.tokens[0], batch.unscored[0], strict=True)
        if token >= 0
    }
    assert found == {"square": "circle", "green": "yellow", "white": "blue"}
    nothing = collate([Document(pieces=(answer,))], tokenizer)
    assert (nothing.unscored == -1).all()

    logits_BTV = torch.zeros(*batch.tokens.shape, len(tokenizer))
    scored_BTV = without_unscored(logits_BTV, batch.unscored)
    assert int(scored_BTV.isinf().sum()) == 3
    assert not logits_BTV.isinf().any()
