"""Experts side by side: in bounded time, whatever one of them does, and remembered."""

import hashlib
import json
import sqlite3
import threading
import time

import pytest
from PIL import Image
from tests.threads import SECONDS

from llama_adapter import LlamaAdapterForConditionalGeneration, LlamaAdapterProcessor
from llama_adapter.chat import ChatSession
from llama_adapter.conversation import Conversation, ImageRef
from llama_adapter.errors import ConfigError, EvaluationError
from llama_adapter.evaluation.answering import Prediction
from llama_adapter.evaluation.predictions import read_ours
from llama_adapter.evaluation.score import score
from llama_adapter.evaluation.tasks.base import Generation
from llama_adapter.evaluation.with_experts import ExpertAnswerer
from llama_adapter.experts import (
    CaptionExpert,
    ExpertInfo,
    ExpertPool,
    Finding,
    Report,
)
from llama_adapter.experts.cache import ReportCache
from llama_adapter.experts.wording import report_text, rough_tokens
from llama_adapter.generation import GenerationSettings
from llama_adapter.processing.prompts import frames_of

IMAGE = Image.new("RGB", (12, 12), (200, 30, 30))


class Sayer:
    """Says what it was shown, after a while, and counts how often it was asked."""

    def __init__(self, name="sayer", *, seconds=0.0, version=None, asks=False, kind="note"):
        self.name = name
        self.seconds = seconds
        self.kind = kind
        self.info = ExpertInfo(version=version, uses_question=asks)
        self.asked = 0

    def consult(self, request):
        self.asked += 1
        time.sleep(self.seconds)
        findings = [
            Finding(text=f"{image.size[0]} wide", kind=self.kind, image=i)
            for i, image in enumerate(request.images)
        ]
        return Report(expert=self.name, findings=tuple(findings))


@pytest.fixture
def held():
    """An expert that does not answer before the test is over."""
    over = threading.Event()

    class Held(Sayer):
        def consult(self, request):
            self.asked += 1
            over.wait(60)
            return Report(expert=self.name)

    yield Held("held")
    over.set()


class Faller:
    name = "faller"
    info = ExpertInfo()

    def consult(self, request):
        raise RuntimeError("out of\nluck")


class Librarian:
    name = "librarian"
    info = ExpertInfo(reads_reports=True)

    def consult(self, request):
        texts = " ".join(report_text(report) for report in request.reports)
        found = Finding(text=f"about {texts or request.question}", kind="passage")
        return Report(expert=self.name, findings=(found,))


def test_they_work_at_the_same_time_and_answer_in_order():
    together = threading.Barrier(4, timeout=SECONDS)

    class Meeter(Sayer):
        def consult(self, request):
            together.wait()
            return super().consult(request)

    sayers = [Meeter(f"sayer {i}", seconds=0.05) for i in range(4)]
    found = ExpertPool(sayers, timeout=SECONDS).consult([IMAGE], "?")
    assert [(r.expert, r.problem) for r in found] == [(s.name, None) for s in sayers]
    assert all(r.seconds >= 0.05 for r in found)


def test_one_that_fails_or_is_late_is_reported_and_the_rest_is_heard(held):
    pool = ExpertPool([held, Faller(), Sayer()], timeout=3)
    late, fallen, heard = pool.consult([IMAGE], "?")
    assert late.problem == "took longer than 3 seconds"
    assert fallen.problem == "RuntimeError: out of luck"
    assert report_text(heard) == "12 wide"
    again = pool.consult([IMAGE], "?")[0]
    assert "still busy" in again.problem
    assert held.asked == 1


def test_without_images_only_those_that_need_none_are_asked():
    sayer = Sayer()
    found = ExpertPool([sayer, Librarian()]).consult([], "stars")
    assert [report_text(r) for r in found] == ["about stars"]
    assert sayer.asked == 0


def test_a_librarian_starts_from_what_the_others_found():
    found = ExpertPool([Librarian(), Sayer()]).consult([IMAGE], "?")
    assert [report_text(r) for r in found] == ["about 12 wide", "12 wide"]


def test_frames_of_a_video_are_few_and_said_once():
    frames = [IMAGE] * 9
    [report] = ExpertPool([Sayer()]).consult([frames], "?")
    assert [(f.text, f.image, f.frame) for f in report.findings] == [("12 wide", 0, 0)]
    wide = Image.new("RGB", (20, 5))
    [report] = ExpertPool([Sayer()]).consult([IMAGE, [wide, IMAGE]], "?")
    places = [(f.text, f.image, f.frame) for f in report.findings]
    assert places == [("12 wide", 0, None), ("20 wide", 1, 0), ("12 wide", 1, 1)]


def test_the_budget_holds_for_all_together():
    pool = ExpertPool([Sayer(), Sayer("other")], max_tokens=20)
    images = [Image.new("RGB", (10 + i, 4)) for i in range(9)]
    informed = pool.inform(Conversation.ask("?", images=images))
    assert rough_tokens(informed.conversation.context) <= 20
    assert any("kept to stay within" in note for r in informed.told for note in r.notes)
    assert [len(r.findings) for r in informed.reports] == [9, 9]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "above 0 seconds"),
        ({"timeout": float("nan")}, "above 0 seconds"),
        ({"timeout": float("inf")}, "above 0 seconds and at most"),
        ({"max_tokens": 0}, "at least 1"),
    ],
)
def test_bad_limits_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ExpertPool([], **options)


# --- remembering ------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    cache = ReportCache(tmp_path / "folder" / "experts.sqlite", max_bytes=4000)
    yield cache
    cache.close()


def test_an_image_is_looked_at_once(cache):
    sayer = Sayer(version="1")
    pool = ExpertPool([sayer], cache=cache)
    first = pool.consult([IMAGE], "?")[0]
    again = pool.consult([IMAGE.copy()], "another question")[0]
    assert (sayer.asked, first.cached, again.cached) == (1, False, True)
    assert again.findings == first.findings
    pool.consult([Image.new("RGB", (12, 12))], "?")
    assert sayer.asked == 2


@pytest.mark.parametrize(
    ("other", "asked"),
    [
        (Sayer(version="2"), 1),
        (Sayer("else", version="1"), 1),
        (Sayer(version="1", asks=True), 1),
        (Sayer(version=None), 1),
        (Sayer(version="1"), 0),
    ],
)
def test_only_what_depends_on_the_same_is_remembered(other, asked, cache):
    ExpertPool([Sayer(version="1")], cache=cache).consult([IMAGE], "?")
    ExpertPool([other], cache=cache).consult([IMAGE], "!")
    assert other.asked == asked


def test_failures_are_not_remembered(cache):
    class Recovering(Sayer):
        def consult(self, request):
            if not self.asked:
                self.asked += 1
                raise OSError("not yet")
            return super().consult(request)

    pool = ExpertPool([Recovering(version="1")], cache=cache)
    assert pool.consult([IMAGE], "?")[0].problem == "OSError: not yet"
    assert report_text(pool.consult([IMAGE], "?")[0]) == "12 wide"


def test_what_was_cut_short_is_not_remembered(cache):
    class Hasty(Sayer):
        def consult(self, request):
            found = super().consult(request)
            in_time = request.seconds_left > 1
            return found if in_time else Report(expert=self.name, complete=False)

    hasty = Hasty(version="1")
    assert report_text(ExpertPool([hasty], timeout=1.0, cache=cache).consult([IMAGE], "?")[0]) == ""
    assert (
        report_text(ExpertPool([hasty], timeout=9.0, cache=cache).consult([IMAGE], "?")[0])
        == "12 wide"
    )
    assert (
        report_text(ExpertPool([hasty], timeout=1.0, cache=cache).consult([IMAGE], "?")[0])
        == "12 wide"
    )


@pytest.mark.parametrize("value", ['"text"', "null", "[" * 100_000, '{"findings": [5]}'])
def test_an_entry_that_is_not_a_report_is_found_again(value, cache):
    pool = ExpertPool([Sayer(version="1")], cache=cache)
    pool.consult([IMAGE], "?")
    cache.close()
    with sqlite3.connect(cache.path) as connection:
        connection.execute("UPDATE reports SET value = ?", (value,))
    connection.close()
    assert report_text(pool.consult([IMAGE], "?")[0]) == "12 wide"


def test_entries_of_earlier_versions_are_read(cache):
    cache.put("key", Report(expert="x", findings=(Finding(text="a", kind="note", image=2),)))
    with sqlite3.connect(cache.path) as connection:
        [sealed] = connection.execute("SELECT value FROM reports").fetchone()
        text = sealed[64:].replace('"image"', '"picture"')
        value = hashlib.sha256(text.encode()).hexdigest() + text
        connection.execute("UPDATE reports SET value = ?", (value,))
    connection.close()
    assert cache.get("key").findings[0].image == 2


def test_half_a_character_is_remembered_as_a_question_mark(cache):
    report = Report(expert="x", findings=(Finding(text="a\ud800", kind="note", box=(0, 1, 2, 3)),))
    cache.put("key", report)
    [finding] = cache.get("key").findings
    assert (finding.text, finding.box) == ("a?", (0, 1, 2, 3))


def test_the_cache_stays_within_its_bound(cache):
    sayer = Sayer(version="1")
    pool = ExpertPool([sayer], cache=cache)
    for width in range(10, 60):
        pool.consult([Image.new("RGB", (width, 4))], "?")
    assert 5 < len(cache) < 50
    pool.consult([Image.new("RGB", (59, 4))], "?")
    assert sayer.asked == 50, "the latest is still there"


def test_a_damaged_cache_is_replaced(cache):
    pool = ExpertPool([Sayer(version="1")], cache=cache)
    pool.consult([IMAGE], "?")
    cache.close()
    cache.path.write_bytes(b"no database" * 100)
    assert report_text(pool.consult([IMAGE], "?")[0]) == "12 wide"
    assert pool.consult([IMAGE], "?")[0].problem is None
    assert len(cache) == 1


def test_threads_share_a_cache(cache):
    pools = [ExpertPool([Sayer(version="1")], cache=cache) for _ in range(4)]
    threads = [threading.Thread(target=p.consult, args=([IMAGE], "?")) for p in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 1


# --- where they are asked -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(adapter_dir):
    model = LlamaAdapterForConditionalGeneration.from_pretrained(adapter_dir)
    model.load_adapter(adapter_dir, "caption")
    return model, LlamaAdapterProcessor.from_pretrained(adapter_dir)


def test_a_chat_answers_whatever_experts_do(loaded, held):
    pool = ExpertPool([Faller(), held, Sayer()], timeout=3)
    settings = GenerationSettings(max_new_tokens=3)
    answer = ChatSession(*loaded, experts=pool, settings=settings).ask("what?", images=[IMAGE])
    assert answer.tokens >= 1
    problems = {r.expert: r.problem for r in answer.contexts}
    assert problems["faller"] == "RuntimeError: out of luck"
    assert "took longer" in problems["held"]
    assert problems["sayer"] is None


def test_later_images_are_counted_on_and_passages_renewed(loaded):
    settings = GenerationSettings(max_new_tokens=2)
    chat = ChatSession(*loaded, experts=[Sayer(), Librarian()], settings=settings)
    chat.ask("what?", images=[IMAGE])
    assert chat.conversation.context == "12 wide\nabout 12 wide"
    chat.ask("and this?", images=[Image.new("RGB", (9, 9))])
    assert chat.conversation.context.split("\n")[:2] == ["12 wide", "Image 2: 9 wide"]
    chat.ask("so?")
    passages = [r for r in chat.last_answer.contexts if r.expert == "librarian"]
    assert len(passages) == 1


def test_frames_of_a_clip_are_looked_at_in_a_chat_and_by_the_processor(loaded):
    clip = [IMAGE, Image.new("RGB", (9, 9)), IMAGE]
    settings = GenerationSettings(max_new_tokens=2)
    chat = ChatSession(*loaded, experts=[Sayer()], settings=settings)
    [report] = chat.ask("what?", images=[clip]).contexts
    assert [(f.text, f.frame) for f in report.findings] == [("12 wide", 0), ("9 wide", 1)]
    told = loaded[1](Conversation.ask("what?", images=[clip]), experts=ExpertPool([Sayer()]))
    assert told.contexts[0][0].findings == report.findings


def test_a_caption_that_takes_too_long_leaves_the_model_as_it_was(loaded):
    model, processor = loaded
    expert = CaptionExpert(model, processor, max_new_tokens=900)
    [report] = ExpertPool([expert], timeout=0.05).consult([IMAGE], "?")
    assert "captions took longer than" in report.problem
    assert model.active_adapter == "default"


def test_the_processor_takes_experts(loaded):
    _, processor = loaded
    plain = processor("what now?", images=IMAGE)
    told = processor("what now?", images=IMAGE, experts=ExpertPool([Sayer()]))
    assert told["input_ids"].shape[1] > plain["input_ids"].shape[1]
    assert set(told) == set(plain)
    assert report_text(told.contexts[0][0]) == "12 wide"
    pooled = processor(["a?", "b?"], images=[IMAGE, None], experts=ExpertPool([Faller(), Sayer()]))
    assert [r.problem for r in pooled.contexts[0]] == ["RuntimeError: out of luck", None]
    assert pooled.contexts[1] == ()


def test_half_of_the_context_stays_free(loaded):
    _, processor = loaded
    pool = ExpertPool([Sayer()], processor=processor, max_tokens=100_000)
    assert pool.max_tokens == processor.context_length // 2
    assert pool.count("star star") == processor.count_tokens("star star") > 0


def test_what_was_read_in_images_is_for_its_owner_alone(tmp_path):
    cache = ReportCache(tmp_path / "experts.sqlite")
    assert len(cache) == 0
    assert cache.path.stat().st_mode & 0o077 == 0
    cache.close()


class Looker:
    """Answers that it saw so many images, after decoding them."""

    def answer(self, conversations, generation, *, seed):
        return [
            Prediction(text=str(sum(len(frames_of(ref)) for ref in conversation.images)))
            for conversation in conversations
        ]


def test_experts_and_answerer_share_what_is_decoded():
    decoded = []

    def image():
        decoded.append(1)
        return IMAGE

    shown = [ImageRef(source=image, name="one"), ImageRef(source=(image, image), name="clip")]
    asked = Conversation.ask("what?", images=shown)
    answerer = ExpertAnswerer(Looker(), ExpertPool([Sayer()]), named=["sayer"])
    [prediction] = answerer.answer([asked], Generation(), seed=0)
    assert prediction.text == "3"
    assert [finding["text"] for finding in prediction.contexts[0]["findings"]] == ["12 wide"] * 2
    assert len(decoded) == 3


def test_answers_without_an_expert_that_failed_are_counted(tmp_path):
    answerer = ExpertAnswerer(Looker(), ExpertPool([Faller(), Sayer()]), named=["faller"])
    lines = []
    for number in range(3):
        shown = [ImageRef(source=IMAGE, name="one")] if number else []
        asked = Conversation.ask("what?", images=shown)
        [found] = answerer.answer([asked], Generation(), seed=0)
        record = {"task": "vqa", "id": str(number), "questions": ["what?"], "gold": ["a"]}
        answered = {"answers": [found.text], "contexts": [list(found.contexts)]}
        lines.append(json.dumps(record | answered) + "\n")
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(lines))
    notes = read_ours(path, task="vqa").notes
    words = "2 answers were given without the expert 'faller', such as: RuntimeError: out of luck"
    assert notes == (words,)
    assert notes[0] in score("vqa", path, resamples=0).notes


@pytest.mark.parametrize("contexts", [3, [3], ["abc"], [["x"]], {"a": 1}])
def test_reports_that_no_run_writes_are_refused(tmp_path, contexts):
    record = {"task": "vqa", "id": "0", "questions": ["what?"], "answers": ["a"], "gold": ["a"]}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(record | {"contexts": contexts}) + "\n")
    with pytest.raises(EvaluationError, match="contexts is not as a run writes it"):
        read_ours(path, task="vqa")
