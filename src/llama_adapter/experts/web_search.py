"""Search by a service of the user's choice; nothing is asked of anyone unless they name one."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from pydantic import Field, field_validator

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import ExpertInfo, Finding, Report, Request
from llama_adapter.experts.options import Count, ExpertContext, ExpertOptions
from llama_adapter.experts.search import query_of
from llama_adapter.files import parse_json

KEY_VARIABLE = "LLAMA_ADAPTER_SEARCH_KEY"
"""Sent as a bearer token where it is set."""
MAX_BYTES = 2**20
SECONDS = 10.0
LONGEST_RESULT = 600
_LISTS = ("results", "items", "data", "hits", "organic")
_TEXTS = ("content", "snippet", "text", "description", "body")
_ADDRESSES = ("url", "link", "href")


class WebOptions(ExpertOptions):
    """Asks a search service of the user's choice."""

    name = "web"
    main = "url"

    url: str = Field(min_length=1, description="the address of a search service")
    """With `{query}` where the question goes, or else it is added as the parameter `q`."""
    results: Count = 3
    """Most results to show the model."""
    with_findings: bool = False
    """Whether what other experts read in the image is sent too."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise ValueError("must start with http:// or https://")
        return value

    def open(self, context: ExpertContext) -> WebSearchExpert:  # noqa: ARG002
        return WebSearchExpert(self)


class WebSearchExpert:
    """Asks an HTTP endpoint that answers with JSON, such as one's own SearXNG."""

    name = "web"
    info = ExpertInfo(version=None, reads_reports=True)

    def __init__(self, options: WebOptions) -> None:
        self._options = options
        parts = urlsplit(options.url)
        self._host = parts.hostname or parts.netloc

    def consult(self, request: Request) -> Report:
        """Results for the question, and for what others reported where that may be sent."""
        reports = request.reports if self._options.with_findings else ()
        query = query_of(request.question, reports)
        findings = [
            Finding(text=text[:LONGEST_RESULT], kind="passage", source=address)
            for text, address in _results(self._ask(query))
        ]
        notes = (f"asked {self._host}: {query[:120]!r}",)
        return Report(
            expert=self.name,
            findings=tuple(findings[: self._options.results]),
            wording='Search results: "{}"',
            between="\n",
            notes=notes if findings else (*notes, "no results"),
        )

    def _ask(self, query: str) -> Any:
        url = self._options.url
        if "{query}" in url:
            url = url.replace("{query}", quote(query))
        else:
            url = f"{url}{'&' if '?' in url else '?'}{urlencode({'q': query})}"
        headers = {"Accept": "application/json", "User-Agent": "llama-adapter"}
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  (scheme is checked)
        if key := os.environ.get(KEY_VARIABLE):
            # for the service that the user named, not for whomever it sends us on to
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310
                data = reply.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise ExpertError(f"{self._host} answers {error.code} {error.reason}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            seconds = time.perf_counter() - started
            raise ExpertError(
                f"{self._host} cannot be reached after {seconds:.1f} seconds: {reason}"
            ) from error
        if len(data) > MAX_BYTES:
            raise ExpertError(f"{self._host} answers with more than {MAX_BYTES} bytes")
        return parse_json(data, name=f"the answer of {self._host}", error=ExpertError)


def _results(content: Any) -> Iterator[tuple[str, str | None]]:
    """Text and address of each result, in the shapes that search services use.

    >>> list(_results({"results": [{"title": "Star", "content": "A shape.", "url": "a"}]}))
    [('Star: A shape.', 'a')]
    """
    if isinstance(content, dict):
        content = next((content[key] for key in _LISTS if key in content), [])
    for result in content if isinstance(content, list) else ():
        if isinstance(result, str):
            yield result, None
        elif isinstance(result, dict):
            text = next((str(result[key]) for key in _TEXTS if result.get(key)), "")
            title = str(result.get("title") or result.get("name") or "")
            address = next((str(result[key]) for key in _ADDRESSES if result.get(key)), None)
            said = ": ".join(part for part in (title, text) if part)
            if said:
                yield said, address
