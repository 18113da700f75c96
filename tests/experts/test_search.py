"""Passages of the user's own texts: found, kept up to date, and never in the way."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("bm25s")

from llama_adapter.errors import ExpertError
from llama_adapter.experts import Finding, Report, Request
from llama_adapter.experts.passages import text_files
from llama_adapter.experts.search import SearchExpert, SearchOptions
from llama_adapter.experts.search_index import FolderIndex
from llama_adapter.experts.web_search import WebOptions, WebSearchExpert
from llama_adapter.experts.wording import report_text


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notes"
    (folder / "more").mkdir(parents=True)
    (folder / "hotels.md").write_text(
        "# Hotels\n\nThe Pacific opens at seven.\n\n# Banks\n\nBanks close on Sundays.\n"
    )
    (folder / "more" / "faq.jsonl").write_text(
        json.dumps({"question": "How warm is the pool?", "answer": "Twenty-eight degrees."})
        + "\n\n"
        + json.dumps({"text": "Batteries are charged in the cellar."})
        + "\n"
    )
    (folder / "long.txt").write_text(
        "\n\n".join(
            f"Room {i} has {i} windows. " + "Filler words follow here. " * 40 for i in range(9)
        )
    )
    (folder / ".hidden.txt").write_text("secret pool")
    return folder


def opened(folder, **options):
    return SearchExpert(SearchOptions(folder=str(folder), **options))


def ask(expert, question, reports=()):
    return expert.consult(Request(question=question, reports=reports))


def web(url, **options):
    return WebSearchExpert(WebOptions(url=url, **options))


def sources(report):
    return [finding.source for finding in report.findings]


def test_passages_come_with_their_place(folder):
    report = ask(opened(folder, passages=1), "When does the Pacific open?")
    assert sources(report) == ["hotels.md:1"]
    assert "opens at seven" in report_text(report)
    assert sources(ask(opened(folder, passages=1), "warm pool?")) == ["more/faq.jsonl:1"]
    assert sources(ask(opened(folder, passages=1), "battery")) == ["more/faq.jsonl:3"]
    assert all(len(f.text.split()) <= 240 for f in ask(opened(folder), "room").findings)


def test_what_others_read_in_the_image_is_looked_up(folder):
    read = Report(expert="ocr", findings=(Finding(text="HOTEL PACIFIC", kind="line"),))
    report = ask(opened(folder, passages=1), "What should I know?", [read])
    assert sources(report) == ["hotels.md:1"]


def test_the_index_is_next_to_the_folder_and_follows_it(folder):
    assert "4 of" not in str(ask(opened(folder), "pool").notes)
    directory = folder.parent / ".notes.llama-adapter-index"
    assert (directory / "files.json").exists()
    assert ask(opened(folder), "pool").notes == (), "nothing changed"
    (folder / "new.txt").write_text("Zebras graze.")
    (folder / "hotels.md").unlink()
    expert = opened(folder)
    report = ask(expert, "zebra")
    assert report.notes == ("index brought up to date: 1 of 3 files read, 1 gone",)
    assert sources(report) == ["new.txt:1"]
    assert ask(expert, "Pacific").findings == ()


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"hotels.md": 3}', b"\x00\xff" * 50])
def test_a_damaged_index_is_rebuilt_and_says_so(folder, damage):
    ask(opened(folder), "pool")
    (folder.parent / ".notes.llama-adapter-index" / "files.json").write_bytes(damage)
    report = ask(opened(folder), "pool")
    assert sources(report) == ["more/faq.jsonl:1"]
    assert any("was damaged and is rebuilt" in note for note in report.notes)
    assert ask(opened(folder), "pool").notes == ()


def test_files_that_cannot_be_read_are_named_and_left_out(folder):
    (folder / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (folder / "bad.pdf").write_bytes(b"no pdf at all")
    (folder / "binary.txt").write_bytes(b"\x00\x01\x02")
    notes = " ".join(ask(opened(folder), "pool").notes)
    assert "bad.jsonl: line 2 is not valid JSON" in notes
    assert "bad.pdf" in notes
    assert "binary.txt: is not a text" in notes


def test_a_pdf_is_searched_page_by_page(folder):
    pytest.importorskip("pypdf")
    (folder / "manual.pdf").write_bytes(_pdf("Press the violet button twice"))
    report = ask(opened(folder, passages=1), "violet button")
    assert sources(report) == ["manual.pdf, page 1"]


def test_folders_without_text_are_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(ExpertError, match="holds no txt, md, json, jsonl or pdf file"):
        FolderIndex(tmp_path).search("x", count=1)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ExpertError, match="no text in the 1 files"):
        FolderIndex(tmp_path).search("x", count=1)


def test_no_shared_word_is_said(folder):
    report = ask(opened(folder), "xylophone")
    assert report.findings == ()
    assert report.notes[-1].startswith("no passage shares a word")


def _pdf(text):
    """A one-page PDF, written by hand."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 6\n0000000000 65535 f \n"
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start


# --- the web, if the user names a service -------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    replies: ClassVar[dict[str, tuple[int, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    keys: ClassVar[list[str | None]] = []

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(self.path)
        self.keys.append(self.headers.get("Authorization"))
        status, body = self.replies[path]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body.decode())
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def service():
    results = [{"title": "Star", "content": "A shape.", "url": "https://a.example"}, "plain", {}]
    Service.replies = {
        "/search": (200, json.dumps({"results": results}).encode()),
        "/broken": (200, b"<html>"),
        "/refused": (403, b""),
        "/empty": (200, b"[]"),
        "/moved": (302, b"/empty"),
    }
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_results_are_findings_and_the_image_stays_private(service):
    read = Report(expert="ocr", findings=(Finding(text="PRIVATE", kind="line"),))
    report = ask(web(f"{service}/search"), "what is a star?", [read])
    assert [f.text for f in report.findings] == ["Star: A shape.", "plain"]
    assert report.findings[0].source == "https://a.example"
    assert "PRIVATE" not in Service.asked[-1]
    shared = web(f"{service}/search?k={{query}}", with_findings=True)
    ask(shared, "what?", [read])
    assert Service.asked[-1] == "/search?k=what%3F%20PRIVATE"


def test_the_key_goes_to_the_named_service_alone(service, monkeypatch):
    monkeypatch.setenv("LLAMA_ADAPTER_SEARCH_KEY", "sesame")
    ask(web(f"{service}/moved"), "x")
    assert Service.asked[-1] == "/empty"
    assert Service.keys[-2:] == ["Bearer sesame", None]


@pytest.mark.parametrize(
    ("path", "words"), [("/broken", "is not valid JSON"), ("/refused", "answers 403")]
)
def test_a_service_that_misbehaves_is_reported(service, path, words):
    with pytest.raises(ExpertError, match=words):
        ask(web(service + path), "x")


def test_no_results_and_no_service(service):
    assert ask(web(f"{service}/empty"), "x").notes[-1] == "no results"
    with pytest.raises(ExpertError, match="cannot be reached"):
        ask(web("http://127.0.0.1:9/"), "x")
    with pytest.raises(ExpertError, match="must start with http"):
        web("file:///etc/passwd")


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("the password is swordfish\n")
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "inside.txt").write_text("the pool opens at nine\n")
    (folder / "again.txt").symlink_to(folder / "inside.txt")
    (folder / "secret.txt").symlink_to(outside)
    assert [path.name for path in text_files(folder)] == ["again.txt", "inside.txt"]
