"""Search by a service of the user's choice; nothing is asked of anyone unless they name one."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from PIL import Image

from llama_adapter.errors import ExpertError
from llama_adapter.experts.base import Finding, Report, Traits
from llama_adapter.experts.search import query_of

KEY_VARIABLE = "LLAMA_ADAPTER_SEARCH_KEY"
MAX_BYTES = 2**20
SECONDS = 10.0
LONGEST_RESULT = 600
WORDING = 'Search results: "{}"'
_LISTS = ("results", "items", "data", "hits", "organic")
_TEXTS = ("content", "snippet", "text", "description", "body")
_ADDRESSES = ("url", "link", "href")


class WebSearchExpert:
    """Asks an HTTP endpoint that answers with JSON, such as one's own SearXNG."""

    name = "web"
    traits = Traits(version=None)

    def __init__(self, url: str, *, results: int = 3, with_findings: bool = False) -> None:
        """Set up.

        Args:
            url: where to ask, with `{query}` where the question goes, or else it is added as the
                parameter `q`. A key in LLAMA_ADAPTER_SEARCH_KEY is sent as a bearer token.
            results: how many results to show the model.
            with_findings: whether what other experts read in the picture is sent too.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise ExpertError(f"expert 'web': url must start with http:// or https://, got {url!r}")
        if results < 1:
            raise ExpertError(f"expert 'web': results must be at least 1, got {results}")
        self._url = url
        self._host = parts.hostname or parts.netloc
        self._results = results
        self._with_findings = with_findings

    def consult(self, images: Sequence[Image.Image], question: str) -> Report:  # noqa: ARG002
        """Results for the question alone."""
        return self.consult_after(question, ())

    def consult_after(self, question: str, reports: Sequence[Report]) -> Report:
        """Results for the question, and for what others reported where that may be sent."""
        query = query_of(question, reports if self._with_findings else ())
        results = list(_results(self._ask(query)))[: self._results]
        findings = tuple(
            Finding(text=text[:LONGEST_RESULT], kind="passage", source=address)
            for text, address in results
        )
        notes: tuple[str, ...] = (f"asked {self._host}: {query[:120]!r}",)
        if not findings:
            notes = (*notes, "no results")
        return Report(
            expert=self.name, findings=findings, wording=WORDING, between="\n", notes=notes
        )

    def _ask(self, query: str) -> Any:
        if "{query}" in self._url:
            url = self._url.replace("{query}", quote(query))
        else:
            url = f"{self._url}{'&' if '?' in self._url else '?'}{urlencode({'q': query})}"
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
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ExpertError(f"{self._host} answers with something other than JSON") from error


def _results(content: Any) -> Iterator[tuple[str, str | None]]:
    """Text and address of each result, in the shapes that search services use.

    >>> list(_results({"results": [{"title": "Star", "content": "A shape.", "url": "a"}]}))
    [('Star: A shape.', 'a')]
    """
    if isinstance(content, dict):
        content = next((content[key] for key in _LISTS if key in content), [])
    if not isinstance(content, list):
        return
    for result in content:
        if isinstance(result, str):
            yield result, None
        elif isinstance(result, dict):
            text = next((str(result[key]) for key in _TEXTS if result.get(key)), "")
            title = str(result.get("title") or result.get("name") or "")
            address = next((str(result[key]) for key in _ADDRESSES if result.get(key)), None)
            said = ": ".join(part for part in (title, text) if part)
            if said:
                yield said, address
