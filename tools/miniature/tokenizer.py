"""The miniature world's tokenizer: a token for every word it knows, bytes for the rest.

Text is lower-cased; spaces and punctuation separate tokens, so that "Star." and "star ."
are the same two tokens. Digits stand alone. Words outside the world are spelt in letters
and bytes: any text can be encoded, and comes back up to case and spacing.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llama_adapter.miniature.bundled import PLACEHOLDERS
from llama_adapter.miniature.captions import (
    NUMBERS,
    RELATIONS,
    describe_tasks,
    passage,
)
from llama_adapter.miniature.instructions import KNOWLEDGE
from llama_adapter.miniature.questions import ONE_WORD, QUESTION_TYPES, ask
from llama_adapter.miniature.scenes import (
    COLORS,
    PLACES,
    SHAPES,
    SIGN_WORDS,
    SIZES,
    Scene,
    SceneObject,
)

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
MAX_LENGTH = 1024

_SPACE = "\u2581"
_PIECES = Regex(r"###|\d|[^\w\s]")

_TEMPLATE_WORDS = "### input : instruction response question answer tags in other words text"
_COMMON_WORDS = """
    a an the and or not is are was be of in on at to from with for by as it its this that these
    there here what which where who how many much do does did can could you i me my your we they
    have has see look find tell say show name list count read write describe give answer please
    picture image photo scene thing things object objects color colour colors colours shape
    shapes size sizes place places position sign word words number sentence caption tag fact
    above below left right between next near over under top bottom middle side corner corners
    big bigger larger largest smaller smallest little tiny huge same different all any some none
    yes no one two three four five six seven eight nine ten zero only also more less than most
    if then because but so very short long detail user assistant hello hi thanks thank welcome
    good ok sorry know black gray grey brown
    below instruction describes task paired input provides further context response
    appropriately completes request
"""


def _texts() -> Iterator[str]:
    """Texts that together contain every word of the world."""
    import random

    rng = random.Random(0)
    yield " ".join((*SHAPES, *COLORS, *SIZES, *PLACES, *SIGN_WORDS, *NUMBERS, *RELATIONS))
    yield from (" ".join(pair) for pair in KNOWLEDGE)
    yield f"{_TEMPLATE_WORDS} {_COMMON_WORDS} {ONE_WORD}"
    scene = Scene(
        objects=(
            SceneObject(shape="star", color="red", size="small", place="north"),
            SceneObject(shape="circle", color="orange", size="large", place="southeast"),
        ),
        sign="42",
    )
    for task in describe_tasks():
        yield " ".join(task.instructions) + " " + task.write(scene, rng)
    for _ in range(100):
        yield passage(scene, rng)
        for kind in QUESTION_TYPES:
            asked = ask(scene, rng, kind)
            if asked is not None:
                yield f"{asked.question} {asked.answer}"


def _words() -> list[str]:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(_PIECES, "isolated")]
    )
    words = {word for text in _texts() for word, _ in split.pre_tokenize_str(text)}
    return sorted(words | set(string.punctuation) | set(string.digits))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the miniature world; always the same one."""
    special = [PAD, BOS, EOS, *PLACEHOLDERS]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    words = [_SPACE + word for word in _words()]
    tokens = [*special, *bytes_, _SPACE, *string.ascii_lowercase, *words]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # no merges: a piece is one known word, or else falls apart into letters and bytes
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(_PIECES, "isolated"),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            decoders.Replace(Regex(r"\s+(?=[.,?!;:'])|(?<=\d)\s+(?=\d)|(?<=')\s+"), ""),
        ]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=list(PLACEHOLDERS),
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
