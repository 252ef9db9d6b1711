"""Samples, comparisons and blind votes, over made-up results written through the real structs."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from starlette.testclient import TestClient

from tools.dashboard.app import create_app
from tools.dashboard.exports import read_csv
from tools.dashboard.pages.samples import MAX_COLUMNS, Event, grid, shown_events
from tools.dashboard.pairs import QUESTIONS, pairs_of
from tools.dashboard.records import SampleClip, SampleSet
from tools.dashboard.sources import find_sources
from tools.evaluate.result import Result, ResultClip
from tools.fake.runs import PROMPTS, write_evaluation, write_run, write_samples

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "runs"
    write_run(folder / "first", step=200)
    write_samples(folder / "first", (0, 100, 200))
    write_evaluation(folder / "first" / "evaluations" / "final", num_seeds=2)
    return folder


@pytest.fixture
def client(runs: Path, tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(find_sources([], runs, tmp_path / "own"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        found = re.search(r'"X-CSRF-Token": "([0-9a-f]{64})"', client.get("/").text)
        assert found is not None
        client.headers["x-csrf-token"] = found[1]
        yield client


def made_up(num_prompts: int = 200) -> Result:
    clips = [
        ResultClip(variant, f"{variant}/{number}.mp4", f"글 {number}", str(number), "", 0)
        for variant in ("real", "base", "lora")
        for number in range(num_prompts)
    ]
    return Result(clips=clips)


@pytest.mark.parametrize("language", ["en", "ko"])
@pytest.mark.parametrize("page", ["/samples", "/compare", "/vote", "/training", "/"])
def test_pages_of_runs_open_without_any_dataset(
    client: TestClient, page: str, language: str
) -> None:
    answer = client.get(f"{page}?lang={language}")
    assert answer.status_code == 200 and f'lang="{language}"' in answer.text


def test_samples_show_the_base_at_the_left_and_play(client: TestClient) -> None:
    page = client.get("/samples?lang=en").text
    assert page.index(">base<") < page.index("at step 100") < page.index("at step 200")
    clips = re.findall(r'src="(/samples/clip/[^"]+)"', page)
    assert len(clips) == 3 * len(PROMPTS)
    part = client.get(clips[0].replace("&amp;", "&"), headers={"range": "bytes=0-99"})
    assert part.status_code == 206 and part.headers["content-type"] == "video/mp4"
    assert client.get("/samples/clip/100/99?run=first").status_code == 404
    assert client.get("/samples/clip/7/0?run=first").status_code == 404
    assert client.get("/samples/clip/100/0?run=../first").status_code == 404


def test_a_file_that_a_json_file_names_outside_its_folder_is_not_served(
    client: TestClient, runs: Path
) -> None:
    folder = runs / "first/samples/step-00000300"
    folder.mkdir()
    names = ["/etc/passwd", "../../config.toml", "../../../../../../etc/passwd", "samples.json", ""]
    found = SampleSet(step=300, clips=[SampleClip(name) for name in names])
    (folder / "samples.json").write_bytes(msgspec.json.encode(found))
    for number in range(len(names)):
        assert client.get(f"/samples/clip/300/{number}?run=first").status_code == 404
    (folder / "samples.json").write_text("{nonsense")
    assert client.get("/samples").status_code == 200
    (folder / "samples.json").unlink()
    folder.rmdir()


def test_events_are_the_base_and_the_newest() -> None:
    events = [Event(step, Path(), SampleSet(), "") for step in range(0, 2000, 100)]
    steps = [event.step for event in shown_events(events, None)]
    assert steps == [0, 1500, 1600, 1700, 1800, 1900] and len(steps) == MAX_COLUMNS
    assert [event.step for event in shown_events(events, 250)] == [0, 100, 200]


def test_a_prompt_that_is_missing_at_a_step_leaves_a_gap() -> None:
    first = SampleSet(clips=[SampleClip("a.mp4", "가"), SampleClip("b.mp4", "나")])
    second = SampleSet(clips=[SampleClip("b.mp4", "나")])
    rows = grid([Event(0, Path(), first, ""), Event(100, Path(), second, "")])
    assert [(row.prompt, [cell is not None for cell in row.clips]) for row in rows] == [
        ("가", [True, False]),
        ("나", [True, True]),
    ]


def test_comparisons_show_interval_sample_size_and_model(client: TestClient) -> None:
    page = client.get("/compare?lang=en").text
    for text in ("601 … 670", "n = 160", "sha256 bec6519f", "too few prompts", "&lt;= 1140"):
        assert text in page
    assert "no image-text encoder is given" in page
    quality = re.findall(r'href="/explain/([^"]+)"', page)
    assert all(client.get(f"/explain/{name}").status_code == 200 for name in quality)


def test_pairs_are_blind_balanced_and_the_same_every_time() -> None:
    pairs = pairs_of(made_up(), "kim", SECRET, "hash")
    assert pairs == pairs_of(made_up(), "kim", SECRET, "hash")
    first = [pair for pair in pairs if not pair.repeated]
    again = [pair for pair in pairs if pair.repeated]
    assert len(first) == 200 and {pair.left.variant for pair in first} == {"base", "lora"}
    assert 70 <= Counter(pair.left.variant for pair in first)["base"] <= 130
    assert 20 <= len(again) <= 60
    by_name = {pair.name: pair for pair in first}
    assert all(by_name[pair.name].left == pair.right for pair in again)
    assert pairs[: len(first)] == first
    assert not any("base" in pair.token or "lora" in pair.token for pair in pairs)


def test_raters_share_pairs_and_see_them_from_other_sides() -> None:
    kim = [p for p in pairs_of(made_up(), "kim", SECRET, "hash") if not p.repeated]
    lee = [p for p in pairs_of(made_up(), "lee", SECRET, "hash") if not p.repeated]
    shared = {pair.name for pair in kim[:30]} & {pair.name for pair in lee[:80]}
    assert len(shared) == 30
    sides = {pair.name: pair.left.variant for pair in lee}
    assert 60 <= sum(sides[pair.name] == pair.left.variant for pair in kim) <= 140
    assert {pair.token for pair in kim}.isdisjoint(pair.token for pair in lee)


def test_a_whole_ballot_by_keys_and_its_export(client: TestClient, runs: Path) -> None:
    page = client.get("/vote?lang=en").text
    assert "Your name" in page
    assert client.post("/vote", data={"person": "김평가"}).status_code == 204
    seen = set()
    for _ in range(50):
        page = client.get("/vote?lang=en").text
        token = re.search(r'name="pair" value="(\w+)"', page)
        if token is None:
            break
        assert "base" not in page and "step-00000600" not in page
        clips = [client.get(f"/vote/clip/{token[1]}/{side}") for side in ("left", "right")]
        assert all(each.headers["content-type"] == "video/mp4" for each in clips)
        assert "content-disposition" not in clips[0].headers
        for question in QUESTIONS:
            form = {"pair": token[1], "question": question, "answer": "left"}
            assert client.post("/vote", data=form).status_code in (200, 204)
            client.post("/vote", data={**form, "answer": "right"})  # the first answer stands
        seen.add(token[1])
    assert "are answered" in page
    votes = read_csv(client.get("/votes.csv").content)
    assert len(votes) == len(QUESTIONS) * len(seen)
    assert {row["answer"] for row in votes} == {"left"} and {row["rater"] for row in votes} == {
        "김평가"
    }
    assert {row["left_variant"] for row in votes} <= {"base", "step-00000600"}
    again = create_app(client.app.state.dashboard.sources)  # type: ignore[attr-defined]
    with TestClient(again, base_url="http://127.0.0.1") as other:
        assert len(read_csv(other.get("/votes.csv").content)) == len(votes)


@pytest.mark.parametrize(
    "form",
    [
        {"pair": "nonsense", "question": "overall", "answer": "left"},
        {"pair": "", "question": "overall", "answer": "left"},
        {"answer": "left"},
    ],
)
def test_a_vote_that_makes_no_sense_is_refused(client: TestClient, form: dict[str, str]) -> None:
    assert client.post("/vote", data={"person": "김"}).status_code == 204
    assert client.post("/vote", data=form).status_code == 400


def test_clips_of_a_pair_can_be_had_by_their_token_alone(client: TestClient) -> None:
    for path in ("x/left", "..%2f..%2fconfig.toml/left", "x/middle"):
        assert client.get(f"/vote/clip/{path}").status_code == 404
