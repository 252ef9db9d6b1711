"""The dashboard in a real browser: pages, console, foreign requests, accessibility, a clip that
plays and seeks, a decision and a vote that survive a restart.

Run by `pytest -m browser`, which check.sh does where a Chromium is installed.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from tools.dashboard.exports import read_csv
from tools.dashboard.render import PERSON_COOKIE
from tools.fake.runs import write_build_log, write_evaluation, write_run, write_samples

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = [
    "/",
    "/data/tiny/statistics",
    "/data/tiny/quality",
    "/data/tiny/defects",
    "/data/tiny/decisions",
    "/data/tiny/preprocessing",
    "/training?run=first&run=second",
    "/samples",
    "/compare",
    "/vote",
    "/explain/relative",
]


class Server:
    """The dashboard as a process of its own, which can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # bound, though it does not listen: nobody else gets the port before the dashboard does, nor
        # while it is started again
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", 0))
        self.port = self.reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tools.dashboard",
                *("--dataset", str(self.folder / "tiny"), "--runs", str(self.folder / "runs")),
                *("--own", str(self.folder / "own"), "--port", str(self.port)),
            ],
            cwd=ROOT,
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                # until the search index stands, which the notice is about
                if "hx-trigger" not in httpx2.get(f"{self.url}/data/tiny/defects").text:
                    return
            except httpx2.TransportError:
                assert self.process.poll() is None, "the dashboard ended"
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(300)


@pytest.fixture(scope="module")
def server(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(tiny_dataset, folder / "tiny")
    write_build_log(folder / "tiny")
    write_run(folder / "runs" / "first")
    write_run(folder / "runs" / "second", lr=2e-4)
    write_samples(folder / "runs" / "first")
    write_evaluation(folder / "runs" / "evaluations" / "final", num_seeds=1)
    server = Server(folder)
    with server.reserved:
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "no chromium in PATH: apt-get install chromium fonts-nanum"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A page whose console stays silent and that asks nobody else."""
    context = browser.new_context(locale="ko-KR", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    # only for what never comes
    page.set_default_timeout(120_000)
    trouble: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error":
            trouble.append(message.text)

    def see(request: Request) -> None:
        if not request.url.startswith(server.url):
            trouble.append(request.url)

    page.on("console", hear)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", see)
    yield page
    context.close()
    assert trouble == []


def serious(page: Page) -> list[Any]:
    found = Axe().run(page).response["violations"]
    return [
        (each["id"], each["nodes"][0]["html"])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def case_url(server: Server, clip_id: str) -> str:
    text = httpx2.get(f"{server.url}/data/tiny/defects?text={clip_id}").text
    return server.url + text.split(f'">{clip_id}<')[0].rpartition('href="')[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_opens_cleanly(page: Page, server: Server, path: str, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(server.url + path)
    page.wait_for_load_state("networkidle")
    assert page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "ko"
    if path.startswith("/training"):
        page.wait_for_selector(".uplot canvas")
    assert serious(page) == []
    if shots := os.environ.get("NEWSREEL_SCREENSHOTS"):
        name = path.strip("/").partition("?")[0].replace("/", "-") or "overview"
        page.screenshot(path=f"{shots}/{name}-ko-{scheme}.png", full_page=True)


def test_a_clip_plays_and_a_shot_seeks(page: Page, server: Server) -> None:
    page.goto(case_url(server, "2400102"))
    page.wait_for_function("() => document.querySelector('video').readyState > 0")
    assert serious(page) == []
    assert page.locator(".shots rect").count() == 3
    page.locator("button[data-seek]").nth(1).press("Enter")
    page.wait_for_function("() => document.querySelector('video').currentTime > 1.3")
    page.locator(".shots rect").nth(2).click()
    page.wait_for_function("() => document.querySelector('video').currentTime > 2.85")
    assert page.evaluate("document.querySelector('video').error") is None


def test_hangul_has_a_font(page: Page, server: Server) -> None:
    """Two syllables that a browser without a font would draw as the same box."""
    page.goto(server.url)
    width = """text => { const c = document.createElement('canvas'); const g = c.getContext('2d');
        g.font = '40px ' + getComputedStyle(document.body).fontFamily; g.fillText(text, 0, 40);
        return Array.from(g.getImageData(0, 0, 60, 60).data).join() }"""
    assert page.evaluate(width, "한") != page.evaluate(width, "글")


def test_a_decision_and_a_vote_survive_a_restart(page: Page, server: Server) -> None:
    url = case_url(server, "2400104")
    page.goto(url)
    page.get_by_label("이름").fill("홍길동")
    page.get_by_label("결함 종류").select_option("caption_wrong")
    page.get_by_role("button", name="제외").click()
    page.get_by_role("status").filter(has_text="exclusions.csv").wait_for()
    page.goto(f"{server.url}/vote")
    page.keyboard.press("1")
    page.get_by_role("heading", name="글과 더 잘 맞는 쪽").wait_for()
    page.keyboard.press("0")
    page.get_by_text("가운데 1쌍").wait_for()
    page.goto("about:blank")
    server.stop()
    server.start()
    page.goto(url)
    page.locator(".history").get_by_text("홍길동").wait_for()
    page.goto(f"{server.url}/vote")
    page.get_by_text("가운데 1쌍").wait_for()
    written = (server.folder / "tiny" / "exclusions.csv").read_text(encoding="utf-8-sig")
    assert "2400104.json,exclude,caption_wrong,홍길동," in written


# answers each question as soon as the page holds its buttons, before the browser does anything else
HASTY = """
const keys = { overall: "1", text: "2" }, answered = new WeakSet();
new MutationObserver(() => {
    const form = document.querySelector("form.question");
    if (!form?.querySelector("[data-key='9']") || answered.has(form)) return;
    answered.add(form);
    const key = keys[form.elements.question.value];
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
}).observe(document, { childList: true, subtree: true });
"""


def test_no_vote_is_lost_however_quickly_keys_are_pressed(page: Page, server: Server) -> None:
    """On pages that are still being read, and on questions that have just been swapped in."""
    page.context.add_cookies([{"name": PERSON_COOKIE, "value": "hasty", "url": server.url}])
    page.add_init_script(HASTY)
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.goto(f"{server.url}/vote")
    page.get_by_text("쌍에 모두 답했습니다").wait_for()
    # the browser's own way to send a form, which records nothing and asks the same again
    assert not [url for url in urls if "answer=" in url]
    votes = read_csv(httpx2.get(f"{server.url}/votes.csv").content)
    answers = Counter(
        (vote["question"], vote["answer"]) for vote in votes if vote["rater"] == "hasty"
    )
    num_pairs = answers["overall", "left"]
    assert num_pairs > 1
    assert answers == {("overall", "left"): num_pairs, ("text", "right"): num_pairs}


PRESS = "key => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))"


def test_a_key_pressed_while_an_answer_is_on_its_way_is_said_not_to_count(
    page: Page, server: Server
) -> None:
    page.context.add_cookies([{"name": PERSON_COOKIE, "value": "twice", "url": server.url}])
    page.goto(f"{server.url}/vote")
    notice = page.locator("#not-counted")
    assert notice.is_hidden()
    # in one turn of the browser: no answer can come between them
    page.evaluate(f"() => ['1', '2'].forEach({PRESS})")
    page.get_by_role("heading", name="글과 더 잘 맞는 쪽").wait_for()
    assert notice.is_visible()
    page.evaluate(f"() => ['0', '9'].forEach({PRESS})")
    # the next pair is another page, which says it too
    page.get_by_text("가운데 1쌍").wait_for()
    notice.wait_for()
    page.evaluate(f"() => ['9'].forEach({PRESS})")
    notice.wait_for(state="hidden")
    page.get_by_role("heading", name="글과 더 잘 맞는 쪽").wait_for()
    votes = read_csv(httpx2.get(f"{server.url}/votes.csv").content)
    answers = [(vote["question"], vote["answer"]) for vote in votes if vote["rater"] == "twice"]
    assert answers == [("overall", "left"), ("text", "same"), ("overall", "unusable")]


def test_an_open_page_follows_a_run(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/training?run=first")
    page.wait_for_selector(".uplot canvas")
    with (server.folder / "runs/first/metrics.jsonl").open("a") as file:
        file.write('{"step": 777, "loss": 0.1, "s_per_step": 1.5}\n')
    page.get_by_text("777 / 1,000").wait_for()
