"""One word for one thing, the one that PyTorch, Hugging Face and the papers use."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BANNED = {
    r"pictures?": "image",
    r"tower": "vision encoder",
    r"slots?(?!=True|__)": "placeholder",
    r"semantics": "adapter config, settings",
    r"colours?|centred?|behaviours?|neighbour(s|ing)?|honour(s|ed)?|licence": "American spelling",
    r"favour(s|ed)?|judgement|learnt|misspelt": "American spelling",
    r"fold(ed|ing|s)": "merge",
    r"(quant|token|normal|recogn|initial|optim|serial|synchron|random|util)is\w+": "-ize",
    r"anew|whoever|homeless|strangers?|the very (?!same)": "plain words",
    r"beside": "next to, with, in addition to",
    r"(?<!there )(is|are) no (?!longer|other|more|such)\w+": "is not a",
    r"stands? (in|between|before|behind|alone|there)|stand-ins?": "is, replaces",
    r"lies (in|on|at|elsewhere)": "is",
    r"parted by": "separated by",
}
STORED = (
    "<|slot_", "slot_reads", "slot_text", '"slots"', "'slots'", "unquantised", '"beside"',
    "Text in the picture:", '"judgement"', "describe the picture", "What does the picture show?",
    "|picture|", "|licence|", "beside onto", "tags for the picture", "summarize the picture",
    "over picture place", '"picture"', 'f"picture/', "what colour is", "what colours do",
    "colour color colours colors", "next to|beside|behind",
)  # fmt: skip
"""Names in files that earlier versions wrote, texts that the bundled bases know, and words to look
for in what users ask."""


def _words(pattern: str) -> re.Pattern[str]:
    # a word within an identifier counts too: num_pictures, loadTower
    return re.compile(rf"(?<![^\W_])({pattern})(?![^\W_])", re.IGNORECASE)


def test_no_other_word_is_used() -> None:
    globs = ("src/**/*.py", "docs/**/*.md", "recipes/*.yaml", "README.md", "CONTRIBUTING.md")
    found = []
    for path in (path for glob in globs for path in ROOT.glob(glob)):
        name = str(path.relative_to(ROOT))
        text = path.read_text()
        for stored in STORED:
            text = text.replace(stored, "")
        for pattern, better in BANNED.items():
            for match in _words(pattern).finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {match[0]} -> {better}")
    assert not found, "\n".join(found)
