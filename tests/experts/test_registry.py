"""Experts by name, options in one string, and `auto`."""

import importlib
import sys
from importlib.metadata import EntryPoint

import pytest
from PIL import Image

from llama_adapter.errors import ExpertError, MissingDependencyError
from llama_adapter.experts import ExpertKind, Finding, Panel, Report, make_experts, registry
from llama_adapter.experts.automatic import AutomaticExpert, signals_of, text_likelihood
from llama_adapter.toyworld.pictures import picture
from llama_adapter.toyworld.scenes import Scene, Thing

STAR = Thing(shape="star", color="red", size="large", place="north")


class Echo:
    name = "echo"

    def __init__(self, text):
        self.text = text

    def consult(self, images, question):
        return Report(expert=self.name, findings=(Finding(text=self.text, kind="note"),))


KIND = ExpertKind(
    make=lambda options, around: Echo(options.take("main", "hello")), summary="says something"
)
BROKEN = "no kind"


@pytest.fixture
def other_package(monkeypatch):
    """A package that adds an expert by an entry point."""

    def install(value):
        point = EntryPoint(name="echo", value=value, group=registry.GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])

    monkeypatch.setitem(sys.modules, "echoing", sys.modules[__name__])
    return install


def test_other_packages_add_experts(other_package):
    other_package("echoing:KIND")
    [expert] = make_experts(["echo=good day"])
    assert Panel([expert]).consult([Image.new("RGB", (4, 4))], "?").text == "good day"
    other_package("echoing:BROKEN")
    with pytest.raises(ExpertError, match="must name an ExpertKind, got str"):
        registry.kinds()
    for value in ("no_such_package:KIND", "echoing:NO_SUCH"):
        other_package(value)
        with pytest.raises(ExpertError, match=r"entry point 'echo' in .* cannot be loaded"):
            registry.kinds()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["oracle"], "unknown expert 'oracle'; known: auto, caption"),
        (["ocr", "ocr"], "named twice"),
        (["ocr,confidence"], "must be OPTION=VALUE"),
        (["ocr,confidnce=0.5"], "unknown option 'confidnce'; did you mean confidence"),
        (["ocr,confidence=much"], "confidence must be a number, got 'much'"),
        (["ocr=eng"], "unknown value"),
        (["search"], "needs a folder of texts"),
        (["search=/no/such"], "folder '/no/such' does not exist"),
        (["detection"], "needs the name or directory"),
        (["web=ftp://x"], "must start with http"),
        (["caption"], "needs the directory of a caption adapter"),
    ],
)
def test_bad_names_and_options_are_refused(texts, words):
    with pytest.raises(ExpertError, match=words):
        make_experts(texts)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llama-adapter\[ocr\]'"):
        make_experts(["ocr"])
    with pytest.raises(MissingDependencyError, match=r"pip install 'llama-adapter\[search\]'"):
        make_experts(["search=."])
    [auto] = make_experts(["auto"])
    _, decision = auto.choose([Image.new("RGB", (64, 64))], "read the sign")
    assert any("llama-adapter[ocr]" in note for note in decision.notes)


def test_importing_experts_needs_no_extra(monkeypatch):
    for name in ("rapidocr", "bm25s", "pypdf", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("ocr", "search", "web_search", "detection", "automatic", "table"):
        importlib.import_module(f"llama_adapter.experts.{name}")
    from llama_adapter.experts.ocr_engine import import_rapidocr

    with pytest.raises(MissingDependencyError, match="pip install"):
        import_rapidocr()


# --- auto -----------------------------------------------------------------------------------------


def scene(sign):
    return picture(Scene(things=(STAR,), sign=sign), seed=3, index=0, size=256)


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
    auto = AutomaticExpert({name: lambda: Echo("x") for name in names})
    chosen, decision = auto.choose([scene(sign)], question)
    assert {note.split(",")[0] for note in decision.notes if ", since " in note} == expected
    assert len(chosen) == len(expected)


def test_the_decision_is_shown_and_acted_upon():
    def refuse():
        raise ExpertError("no model")

    auto = AutomaticExpert({"caption": lambda: Echo("a star"), "ocr": refuse})
    decision, found = Panel([auto]).consult([scene(None)], "read it").reports
    assert decision.expert == "auto"
    assert decision.notes == ("caption, since there is a picture", "not ocr: no model")
    assert decision.text == ""
    assert found.text == "a star"
    with pytest.raises(ExpertError, match="chooses for a panel"):
        auto.consult([], "x")


def test_without_a_picture_only_texts_are_searched():
    assert signals_of([], "how to charge it?").asks_for_knowledge
    auto = AutomaticExpert({name: lambda: Echo("x") for name in ("caption", "search")})
    chosen, _ = auto.choose([], "how to charge it?")
    assert len(chosen) == 1
