"""Experts by name, options in one string, and `auto`."""

import importlib
import sys
from importlib.metadata import EntryPoint

import pytest
from PIL import Image

from llama_adapter.errors import ExpertError, MissingDependencyError
from llama_adapter.experts import (
    ExpertContext,
    ExpertInfo,
    ExpertOptions,
    ExpertPool,
    Finding,
    Report,
    Request,
    make_experts,
    make_pool,
    registry,
)
from llama_adapter.experts.auto import AutoRouter, text_likelihood
from llama_adapter.experts.registry import read_options
from llama_adapter.experts.wording import report_text
from llama_adapter.miniature.rendering import SceneImage
from llama_adapter.miniature.scenes import Scene, SceneObject

STAR = SceneObject(shape="star", color="red", size="large", place="north")


class Echo:
    name = "echo"
    info = ExpertInfo()

    def __init__(self, text):
        self.text = text

    def consult(self, request):
        return Report(expert=self.name, findings=(Finding(text=self.text, kind="note"),))


class EchoOptions(ExpertOptions):
    name = "echo"
    main = "text"

    text: str = "hello"

    def open(self, context):
        return Echo(self.text)


BROKEN = "no kind"
IMAGE = Image.new("RGB", (64, 64))


@pytest.fixture
def other_package(monkeypatch):
    """A package that adds an expert by an entry point."""

    def install(value):
        point = EntryPoint(name="echo", value=value, group=registry.GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])

    monkeypatch.setitem(sys.modules, "echoing", sys.modules[__name__])
    return install


def test_other_packages_add_experts(other_package):
    other_package("echoing:EchoOptions")
    [expert] = make_experts(["echo=good day"])
    assert report_text(ExpertPool([expert]).consult([IMAGE], "?")[0]) == "good day"
    other_package("echoing:BROKEN")
    with pytest.raises(ExpertError, match="must name a subclass of ExpertOptions, got 'no kind'"):
        registry.kinds()
    for value in ("no_such_package:EchoOptions", "echoing:NO_SUCH"):
        other_package(value)
        with pytest.raises(ExpertError, match=r"entry point 'echo' in .* cannot be loaded"):
            registry.kinds()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["oracle"], "unknown expert 'oracle'; known: auto, caption"),
        (["ocr", "ocr"], "named twice"),
        (["ocr,confidence"], "must be OPTION=VALUE"),
        (["ocr,confidnce=0.5"], "unknown option 'confidnce'; did you mean 'confidence'"),
        (["ocr,confidence=much"], "confidence: input should be a valid number.* got 'much'"),
        (["ocr=eng"], "unknown value"),
        (["search"], "needs a folder of texts"),
        (["search=/no/such"], "folder '/no/such' does not exist"),
        (["detection"], "needs the name or directory"),
        (["web=ftp://x"], "must start with http"),
        (["caption"], "needs the directory of a caption adapter"),
        (["detection="], "needs the name or directory"),
        (["ocr,confidence=nan"], "confidence: input should be a finite number, got 'nan'"),
        (["ocr,threads=10000000"], "threads: input should be less than or equal to 1000000"),
        (["ocr,threads=1.5"], "threads: input should be a valid integer.* got '1.5'"),
        (["ocr,wording=text"], "wording: must have a place for the text"),
        (
            ["web=http://x,with_findings=maybe"],
            "with_findings: input should be a valid boolean.* got 'maybe'",
        ),
        (["auto"], "use make_pool"),
        (["auto,confidence=1"], "takes no options"),
    ],
)
def test_bad_names_and_options_are_refused(texts, words):
    with pytest.raises(ExpertError, match=words):
        make_experts(texts)


def test_options_are_read_as_users_write_them():
    texts = ["ocr,languages=en+de,confidence=0.25", "search=my,,notes,passages=5"]
    ocr, search = registry.read_options(texts, {"ocr": {"wording": "<{}>", "confidence": 1}})
    assert (ocr.languages, ocr.confidence, ocr.wording) == (("en", "de"), 0.25, "<{}>")
    assert (search.folder, search.passages) == ("my,notes", 5)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llama-adapter\[ocr\]'"):
        make_experts(["ocr"])
    with pytest.raises(MissingDependencyError, match=r"pip install 'llama-adapter\[search\]'"):
        make_experts(["search=."])
    [decision] = make_pool(["auto"]).consult([IMAGE], "read the sign")
    assert any("llama-adapter[ocr]" in note for note in decision.notes)


def test_importing_experts_needs_no_extra(monkeypatch):
    for name in ("rapidocr", "bm25s", "pypdf", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("ocr", "search", "web_search", "detection", "auto", "registry"):
        importlib.import_module(f"llama_adapter.experts.{name}")
    from llama_adapter.experts.ocr_engine import import_rapidocr

    with pytest.raises(MissingDependencyError, match="pip install"):
        import_rapidocr()


# --- auto -----------------------------------------------------------------------------------------


def scene(sign):
    return SceneImage(scene=Scene(objects=(STAR,), sign=sign), seed=3, index=0, size=256)()


def test_text_is_noticed():
    assert text_likelihood(scene("hotel")) > 0.5
    assert text_likelihood(scene(None)) < 0.2
    assert text_likelihood(Image.new("RGB", (5, 5))) == 0.0
    assert text_likelihood(scene("hotel").rotate(90)) > 0.5


@pytest.mark.parametrize(
    ("question", "sign", "expected"),
    [
        ("What does the sign say?", "hotel", {"caption", "ocr"}),
        ("What does the sign say?", None, {"caption", "ocr"}),
        ("How many stars are there?", None, {"caption", "detection"}),
        ("What colour is it?", None, {"caption"}),
        ("What colour is it?", "hotel", {"caption", "ocr"}),
        ("What do my notes mean, according to the manual?", None, {"caption", "search"}),
    ],
)
def test_signals_choose(question, sign, expected):
    names = ("caption", "ocr", "detection", "search")
    router = AutoRouter([(name, lambda: Echo("x")) for name in names])
    chosen, decision = router.choose(Request(images=[scene(sign)], question=question))
    assert {note.split(",")[0] for note in decision.notes if ", since " in note} == expected
    assert len(chosen) == len(expected)


def test_the_decision_is_shown_and_acted_upon():
    def refuse():
        raise ExpertError("no model")

    router = AutoRouter([("caption", lambda: Echo("a star")), ("ocr", refuse)])
    decision, found = ExpertPool(router=router).consult([scene(None)], "read it")
    assert decision.expert == "auto"
    assert decision.notes == ("caption, since there is an image", "not ocr: no model")
    assert report_text(decision) == ""
    assert report_text(found) == "a star"


def test_without_an_image_only_texts_are_searched():
    router = AutoRouter([(name, lambda: Echo("x")) for name in ("caption", "search", "echo")])
    chosen, decision = router.choose(Request(question="how to charge it?"))
    assert len(chosen) == 1
    assert "search, since the question asks for knowledge" in decision.notes


def test_named_experts_are_candidates_of_auto(tmp_path, other_package):
    other_package("echoing:EchoOptions")
    defaults = {"echo": {"text": "good day"}}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("The pool is warm.")
    texts = ["auto", f"search={tmp_path / 'one'}", f"search={tmp_path / 'two'}"]
    pool = make_pool(texts, ExpertContext(defaults=defaults))
    decision, *found = pool.consult([IMAGE], "why is the pool warm?")
    assert [report.expert for report in found] == ["echo", "search", "search"]
    assert report_text(found[0]) == "good day"
    assert "not web: it needs the address" not in decision.notes
    assert any(note.startswith("not web: it needs the address") for note in decision.notes)


def test_defaults_are_of_the_default_captioner_alone():
    defaults = {"caption": {"model": "bundled", "instruction": "Describe the image."}}
    [ours] = read_options(["caption,max_new_tokens=9"], defaults)
    assert (ours.model, ours.instruction) == ("bundled", "Describe the image.")
    assert ours.max_new_tokens == 9
    for named in ("caption=blip", "caption,model=blip"):
        [other] = read_options([named], defaults)
        assert (other.model, other.instruction) == ("blip", None)
