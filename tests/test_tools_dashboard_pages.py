"""Every page in both languages, on the sample corpus; totals are those of quality_report.json."""

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from starlette.testclient import TestClient

from shardgen import build
from shardgen.labels.parse import Label
from tools.dashboard import sources as sources_module
from tools.dashboard.app import create_app
from tools.dashboard.catalog import CatalogView
from tools.dashboard.language import load_wording
from tools.dashboard.pages import preprocessing
from tools.dashboard.render import HERE, make_environment
from tools.dashboard.sources import Sources, find_sources
from tools.dashboard.state import State

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "ko")
VENDORED = {  # htmx.org 2.0.8 and uplot 1.6.32 of the npm registry
    "htmx.min.js": "22283ef68cb7545914f0a88a1bdedc7256a703d1d580c1d255217d0a50d31313",
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}
RECORDS = [
    {"step": step, "epoch": 0, "loss": 1 / step, "lr": 1e-4, "s_per_step": 2.0, "data_wait_s": 0.5}
    for step in range(1, 101)
]


@pytest.fixture(scope="module")
def sources(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A copy of the tiny dataset, and two runs."""
    folder = tmp_path_factory.mktemp("dashboard")
    shutil.copytree(tiny_dataset, folder / "tiny")
    with closing(sqlite3.connect(folder / "tiny" / "catalog.sqlite")) as db, db:
        ((number, body),) = db.execute(
            "SELECT id, body FROM clips JOIN bodies USING (id) WHERE clip_id = '2400102'"
        )
        label = msgspec.structs.replace(msgspec.msgpack.decode(body, type=Label), ocr=["새벽 4시"])
        db.execute(
            "UPDATE bodies SET body = ? WHERE id = ?", (msgspec.msgpack.encode(label), number)
        )
    for name, rate in (("first", 1e-4), ("second", 2e-4)):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
        (run / "metrics.jsonl").write_bytes(lines + b'{"step": 101, "lo')
        (run / "config.toml").write_text(f"num_steps = 200\n[optim]\nlr = {rate}\n")
        (run / "status.json").write_text('{"state": "running", "step": 100}')
        validation = {"step": 100, "relative_loss": 0.9, "by_level": [0.95], "num_windows": 4}
        (run / "validation.jsonl").write_text(json.dumps(validation) + "\n")
    return find_sources([str(folder / "tiny")], folder / "runs", folder / "own")


@pytest.fixture(scope="module")
def visitor(sources: Sources) -> Iterator[TestClient]:
    app = create_app(sources, with_index=False)
    app.state.dashboard.indexers["tiny"].update()
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def client(visitor: TestClient) -> TestClient:
    """Who has chosen no language yet."""
    visitor.cookies.clear()
    return visitor


PAGES = [
    "/",
    "/data/tiny/statistics",
    "/data/tiny/quality",
    "/data/tiny/defects",
    "/data/tiny/defects?text=토끼&status=accepted",
    "/data/tiny/decisions",
    "/data/tiny/preprocessing",
    "/data/tiny/preprocessing/live",
    "/training",
    "/training?run=first&run=second",
    "/training/live?run=second",
    "/explain/loss",
    "/explain/file_validity",
]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_in_both_languages(client: TestClient, page: str, language: str) -> None:
    answer = client.get(page, headers={"accept-language": f"{language};q=0.9"})
    assert answer.status_code == 200
    if not page.endswith("/live") and "/live?" not in page:
        assert f'<html lang="{language}">' in answer.text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_case_opens(client: TestClient, sources: Sources, language: str) -> None:
    report = json.loads((sources.datasets["tiny"].folder / "quality_report.json").read_bytes())
    for clip in range(1, report["label_files"] + 1):
        assert client.get(f"/data/tiny/case/{clip}?lang={language}").status_code == 200
    for number in (report["label_files"] + 1, 10**20):
        assert client.get(f"/data/tiny/case/{number}").status_code == 404
        assert client.get(f"/data/tiny/media/clip/{number}").status_code == 404


def test_the_language_is_chosen_by_query_then_cookie_then_browser(client: TestClient) -> None:
    with TestClient(client.app, base_url="http://127.0.0.1") as fresh:
        assert 'lang="en"' in fresh.get("/", headers={"accept-language": "fr"}).text
        assert 'lang="ko"' in fresh.get("/", headers={"accept-language": "ko-KR,en;q=0.5"}).text
        assert 'lang="ko"' in fresh.get("/?lang=ko", headers={"accept-language": "en"}).text
        assert 'lang="ko"' in fresh.get("/", headers={"accept-language": "en"}).text


def test_totals_equal_the_quality_report(client: TestClient, sources: Sources) -> None:
    report = json.loads((sources.datasets["tiny"].folder / "quality_report.json").read_bytes())
    overview = client.get("/?lang=en").text
    assert f"<dd>{report['label_files']}</dd>" in overview
    assert "The statuses add up" in overview
    for status, count in report["statuses"].items():
        if count:
            assert re.search(rf'status={status}".*?</a> <b>{count}</b>', overview), status
    table = client.get("/data/tiny/statistics?lang=en").text
    foot = re.findall(
        r'<td class="n">(\d+)</td>', table[table.index("<tfoot>") :].split("</tfoot>")[0]
    )
    assert sum(map(int, foot[: foot.index(str(report["label_files"]))])) == report["label_files"]
    defects = client.get("/data/tiny/defects?lang=en").text
    assert f"{report['label_files']} label files" in defects
    for status, reasons in report["reasons"].items():
        for reason, count in reasons.items():
            page = client.get(f"/data/tiny/defects?status={status}&reason={reason}").text
            assert f"{count} label files" in page
    quality = client.get("/data/tiny/quality?lang=en").text
    for check in report["checks"]:
        assert check["definition"] in quality.replace("&#39;", "'")
        assert f'<td class="n">{check["sample_size"]}</td>' in quality


def test_what_no_tool_wrote_reads_not_measured(client: TestClient) -> None:
    assert "FVD, CLIP: not measured" in client.get("/data/tiny/quality?lang=en").text
    assert "FVD, CLIP: 측정되지 않음" in client.get("/data/tiny/quality?lang=ko").text


def test_a_case_shows_what_became_the_prompt(client: TestClient) -> None:
    found = client.get("/data/tiny/defects?text=2400102").text
    case = re.search(r'href="(/data/tiny/case/\d+)">2400102<', found)
    assert case is not None
    page = client.get(f"{case[1]}?lang=en").text
    assert page.count("data-seek") >= 6  # a button and a bar for each of three shots
    sample = re.search(r'href="(/data/tiny/sample/[0-9a-f]{32})"', page)
    assert sample is not None and client.get(sample[1]).status_code == 200


def test_the_text_in_the_picture_stands_beside_what_is_said_and_is_found(
    client: TestClient,
) -> None:
    found = client.get("/data/tiny/defects?text=새벽&column=ocr").text
    (case,) = re.findall(r'href="(/data/tiny/case/\d+)">\d+<', found)
    page = client.get(f"{case}?lang=en").text
    assert "오늘의 소식을 전해 드립니다.</td><td>새벽 4시</td>" in page


def test_an_open_page_that_asks_again_is_told_that_nothing_changed(client: TestClient) -> None:
    for page in ("/data/tiny/preprocessing/live", "/training/live", "/training/data?run=first"):
        etag = client.get(page).headers["etag"]
        assert client.get(page, headers={"if-none-match": etag}).status_code == 304


@pytest.mark.parametrize("page", ["/data/tiny/preprocessing", "/data/tiny/case/1"])
def test_a_catalog_that_is_locked_for_a_moment_is_no_fault(
    client: TestClient, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(CatalogView, "clip", locked)
    monkeypatch.setattr(State, "status_counts", locked)
    answer = client.get(page)
    assert answer.status_code == 503 and 'hx-trigger="every 3s"' in answer.text


def test_every_sentence_has_both_languages_and_every_template_knows_its_words() -> None:
    wording = load_wording()
    for key, (english, korean) in wording.items():
        assert english.strip() and korean.strip(), key
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", korean)), (
            key
        )
    used = set()
    for path in (HERE / "templates").glob("*.html"):
        used |= set(re.findall(r'\bt\("([\w.]+)"[,)]', path.read_text(encoding="utf-8")))
    assert used <= set(wording)


def test_the_dashboard_starts_without_torch_and_names_files_as_shardgen_does() -> None:
    code = "import sys, tools.dashboard.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert (sources_module.CATALOG_FILE, sources_module.CONFIG_FILE, preprocessing.STAGES) == (
        build.CATALOG_FILE,
        build.CONFIG_FILE,
        build.STAGES,
    )


def test_vendored_files_are_the_published_ones_with_their_licences() -> None:
    folder = HERE / "static" / "vendor"
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix != ".LICENSE"
    }
    assert hashes == VENDORED
    assert "Zero-Clause BSD" in (folder / "htmx.LICENSE").read_text()
    assert "MIT License" in (folder / "uPlot.LICENSE").read_text()


def test_templates_escape_what_labels_say() -> None:
    template = make_environment().from_string("{{ caption }}")
    assert template.render(caption="<script>alert(1)</script>") == (
        "&lt;script&gt;alert(1)&lt;/script&gt;"
    )
