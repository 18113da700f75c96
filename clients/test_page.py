"""The chat page in a real browser, and OpenAI's JavaScript client, against `serve toy`.

Run by `make clients`; needs Debian's chromium and node. Screenshots go to `runs/page`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from llama_adapter.miniature.rendering import render
from llama_adapter.miniature.scenes import Scene, SceneObject

HERE = Path(__file__).parent
SHOTS = HERE.parent / "runs" / "page"
KEY = "browser-key-0123456789"
ELSEWHERE = "http://elsewhere.localhost:8999"
"""A site whose pages may use the server."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that wants a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    caption = HERE.parent / "src/llama_adapter/miniature/adapters/caption"
    options = ["--port", "0", "--adapter", f"caption={caption}", "--api-keys", str(keys)]
    options += ["--cors-origin", ELSEWHERE]
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_adapter.cli", "serve", "toy", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{") and json.loads(line)["event"] == "serving":
            yield json.loads(line)["url"]
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    star = SceneObject(shape="star", color="red", size="large", place="center")
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    render(Scene(objects=(star,)), random.Random(5), size=256).save(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


def opened(browser: Browser, url: str, **options: Any) -> tuple[Page, list[str]]:
    """The page, and every address it asks for or complaint it makes that it should not."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("request", lambda r: wrong.append(r.url) if not allowed(r.url, url) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if "Content Security" in m.text else None)
    page.on("dialog", lambda dialog: dialog.accept(KEY))
    page.goto(url)
    expect(page.locator("#model option")).to_have_count(3)
    return page, wrong


def allowed(asked: str, url: str) -> bool:
    return asked.startswith((url, "data:", "blob:"))


def test_a_talk_with_an_image(browser: Browser, url: str, scene: Path) -> None:
    page, wrong = opened(browser, url)
    page.set_input_files("#file", scene)
    expect(page.locator("#attached img")).to_have_count(1)
    page.keyboard.type("What colour is the star?")  # the message has the focus
    page.keyboard.press("Enter")
    expect(page.locator(".assistant").last).to_have_text("the star is red.")
    expect(page.locator("#usage")).to_contain_text("tokens")
    page.keyboard.type("What shape is it?")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(page.locator("#usage")).to_contain_text("tokens")
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "light.png")
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=SHOTS / "dark.png")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    assert wrong == []
    page.close()


def test_an_answer_can_be_stopped_and_an_error_is_shown(browser: Browser, url: str) -> None:
    page, wrong = opened(browser, url)
    page.select_option("#model", "toy-base")
    page.fill("#text", "Tell me everything.")
    page.press("#text", "Enter")
    expect(page.locator("#go")).to_have_text("Stop")
    page.wait_for_function("document.querySelector('.assistant').textContent.length > 0")
    page.keyboard.press("Escape")
    expect(page.locator("#go")).to_have_text("Send")
    page.evaluate("new Promise(r => setTimeout(r, 300))")
    said = page.locator(".assistant").text_content()
    page.evaluate("new Promise(r => setTimeout(r, 500))")
    assert page.locator(".assistant").text_content() == said
    page.evaluate("document.getElementById('model').add(new Option('none'))")
    page.select_option("#model", "none")
    page.fill("#text", "Hello")
    page.click("#go")
    expect(page.locator(".error")).to_contain_text("no model 'none'")
    expect(page.locator("#text")).to_have_value("Hello")
    assert wrong == []
    page.close()


def test_images_can_be_pasted_and_dropped_on_a_phone(
    browser: Browser, url: str, scene: Path
) -> None:
    page, wrong = opened(browser, url, viewport={"width": 360, "height": 640}, has_touch=True)
    content = list(scene.read_bytes())
    for kind in ("paste", "drop"):
        page.evaluate(
            """([kind, content]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(content)], "a.png", { type: "image/png" }));
              const event = kind === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true });
              document.body.dispatchEvent(event);
            }""",
            [kind, content],
        )
    expect(page.locator("#attached img")).to_have_count(2)
    page.locator("#attached button").first.click()
    expect(page.locator("#attached img")).to_have_count(1)
    page.fill("#text", "What colour is the star?")
    page.tap("#go")
    expect(page.locator(".assistant")).to_have_text("the star is red.")
    expect(page.locator("#go")).to_have_text("Send")
    page.fill("#text", "Tell me what shape it is and where in the picture it is.")
    page.tap("#go")
    expect(page.locator(".assistant")).to_have_count(2)
    expect(page.locator("#usage")).to_contain_text("tokens")
    expect(page.locator("#go")).to_have_text("Send")
    expect(page.locator(".message").last).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=SHOTS / "phone.png")
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=SHOTS / "phone-dark.png")
    assert wrong == []
    page.close()


def test_deep_chat_on_another_site(browser: Browser, url: str) -> None:
    """The lines of the guide, with this server's address and a key."""
    guide = (HERE.parent / "docs/serving.md").read_text()
    [lines] = re.findall(r"```html\n(.*?)```", guide, re.DOTALL)
    lines = lines.replace("https://chat.example.org", url).replace('"none"', f'"{KEY}"')
    page = browser.new_page()
    bundle = HERE / "node_modules/deep-chat/dist/deepChat.bundle.js"
    page.route(f"{ELSEWHERE}/deepChat.bundle.js", lambda route: route.fulfill(path=bundle))
    page.route(f"{ELSEWHERE}/", lambda r: r.fulfill(body=lines, content_type="text/html"))
    page.goto(f"{ELSEWHERE}/")
    page.locator("#text-input").click()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".ai-message-text")).to_contain_text(re.compile(r"\w"))
    page.close()


def test_the_javascript_client(url: str, scene: Path) -> None:
    done = subprocess.run(
        ["node", str(HERE / "openai_client.mjs"), url, str(scene)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OPENAI_API_KEY": KEY},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all right"
