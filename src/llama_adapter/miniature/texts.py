"""All texts of the miniature world, in one place to import from.

`captions` says scenes in words, `questions` asks about them, `instructions` puts both
into instructions and talks, and `pretraining_text` into documents for pretraining.
"""

from __future__ import annotations

from llama_adapter.miniature.captions import (
    CAPTION_TASK,
    NUMBERS,
    RELATIONS,
    DescribeTask,
    describe_tasks,
    parse_caption,
    passage,
    sign_sentence,
)
from llama_adapter.miniature.instructions import (
    KNOWLEDGE,
    Instruction,
    Talk,
    sample_instruction,
    sample_question,
    sample_talk,
)
from llama_adapter.miniature.pretraining_text import Curriculum, Piece, sample_document
from llama_adapter.miniature.questions import (
    KEYWORDS,
    QUESTION_TYPES,
    Keyword,
    QuestionAnswer,
    ask,
    key_positions,
)

__all__ = [
    "CAPTION_TASK",
    "KEYWORDS",
    "KNOWLEDGE",
    "NUMBERS",
    "QUESTION_TYPES",
    "RELATIONS",
    "Curriculum",
    "DescribeTask",
    "Instruction",
    "Keyword",
    "Piece",
    "QuestionAnswer",
    "Talk",
    "ask",
    "describe_tasks",
    "key_positions",
    "parse_caption",
    "passage",
    "sample_document",
    "sample_instruction",
    "sample_question",
    "sample_talk",
    "sign_sentence",
]
