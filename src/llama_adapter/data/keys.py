"""What the keys of a record may be: read, known to hold nothing to learn from, or refused.

A key that nobody reads could hold what the answer depends on: a system message, an earlier turn,
a second image. Such a record is invalid unless the recipe lists the key in `ignore`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from llama_adapter.errors import DataError

_METADATA = re.compile(
    r"""(?:.*_)?(?:
        (?:coco|img|sent|doc|conv|user|prompt)?ids?|idx|index|key|uid|uuid|guid|hash|md5|sha1|sha256|name|category|categories|type|topic
        |source|sources|dataset|datasets|subset|split|lang|language|languages|license|licence|url
        |urls|model|models|version|date|time|timestamp|author|domain|difficulty|tags|size|format
        |(?:created|updated)(?:_at)?|exif|moderation|metadata|meta|info|motivation_app|status
    )""",
    re.VERBOSE | re.IGNORECASE,
)
"""Names, by their last word, of what describes a record without being part of it."""
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")
"""Where a word of `createdAt` ends."""
_MEDIA = re.compile(r"image|img|photo|picture|video|audio|pixel|frame|speech|sound", re.IGNORECASE)


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing."""
    return value is None or value == [] or value == {} or not str(value).strip()


def check_keys(
    record: Mapping[str, Any],
    read: Collection[str],
    *,
    ignore: Collection[str],
    shows_media: bool = False,
    what: str = "key",
) -> None:
    """DataError that names a key which is neither read nor known to hold nothing to learn from.

    Harmless are empty values, numbers, truth values and the names of `_METADATA`; what names an
    image, a video or a sound only with one that is shown.
    """
    for key, value in record.items():
        # LLaMA-Factory writes an empty list of tools as text
        if key in read or key in ignore or is_empty(value) or value in ("[]", "{}"):
            continue
        harmless = (
            isinstance(value, int | float) or _METADATA.fullmatch(_WORDS.sub("_", key)) is not None
        )
        if _MEDIA.search(key) and not shows_media:
            harmless = False
        if not harmless:
            raise DataError(
                f"{what} {key!r} is not read, and what it holds would be lost; "
                "list it in the source's `ignore` if it is not needed"
            )
