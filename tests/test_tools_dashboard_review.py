"""Decisions stay, are claimed by a name, and reach exclusions.csv; CSV cells are never formulas."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from urllib.parse import quote, unquote

import pytest
from starlette.testclient import TestClient

from tools.dashboard.app import create_app
from tools.dashboard.exports import csv_bytes, exclusions_of, read_csv, update_exclusions
from tools.dashboard.review import Decision, Review, ReviewError
from tools.dashboard.sources import find_sources
from tools.fake.catalog import write_catalog

NASTY = ["=1+1", "+1", "-1", "@x", "'quoted", "''", "\t=1", "\r=1", "\n=1", 'a"b,c\nd', "", "토끼"]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    write_catalog(tmp_path / "data", ["토끼가 풀밭에 서 있다.", "어시장에 사람이 많다."])
    app = create_app(
        find_sources([str(tmp_path / "data")], None, tmp_path / "own"), with_index=False
    )
    with TestClient(app, base_url="http://127.0.0.1") as client:
        found = re.search(r'"X-CSRF-Token": "([0-9a-f]{64})"', client.get("/").text)
        assert found is not None
        client.headers["x-csrf-token"] = found[1]
        yield client


def decide(client: TestClient, clip: int, verdict: str, **fields: str) -> int:
    form = {"person": "홍길동", "verdict": verdict, "type": "", "note": ""} | fields
    return client.post(f"/data/data/case/{clip}", data=form).status_code


def decision(**changes: str) -> Decision:
    plain = Decision("data", "a.json", "1", "exclude", "", "", "홍길동", "2026-01-01T00:00:00Z")
    return plain._replace(**changes)


def test_a_decision_is_written_to_the_list_that_builds_obey(
    client: TestClient, tmp_path: Path
) -> None:
    assert decide(client, 1, "exclude", type="caption_wrong", note="=HYPERLINK(1)") == 200
    assert decide(client, 2, "accept") == 200
    rows = read_csv((tmp_path / "data/exclusions.csv").read_bytes())
    assert [(row["label"], row["decision"], row["type"], row["person"]) for row in rows] == [
        ("video/0000001.json", "exclude", "caption_wrong", "홍길동"),
        ("video/0000002.json", "accept", "", "홍길동"),
    ]
    assert decide(client, 1, "undecided") == 200
    rows = read_csv((tmp_path / "data/exclusions.csv").read_bytes())
    assert [row["label"] for row in rows] == ["video/0000002.json"]
    page = client.get("/data/data/decisions?lang=en").text
    assert "=HYPERLINK(1)" in page and "홍길동" in page
    history = read_csv(client.get("/data/data/decisions.csv").content)
    assert [row["verdict"] for row in history] == ["exclude", "accept", "undecided"]
    assert history[0]["note"] == "=HYPERLINK(1)"


def test_decisions_survive_a_restart(client: TestClient, tmp_path: Path) -> None:
    assert decide(client, 1, "exclude") == 200
    again = create_app(
        find_sources([str(tmp_path / "data")], None, tmp_path / "own"), with_index=False
    )
    with TestClient(again, base_url="http://127.0.0.1") as other:
        assert "홍길동" in other.get("/data/data/case/1").text


@pytest.mark.parametrize(
    "fields",
    [{"verdict": "maybe"}, {"type": "nonsense"}, {"person": " \n"}, {"note": "x" * 3000}],
)
def test_a_decision_that_makes_no_sense_is_refused(
    client: TestClient, tmp_path: Path, fields: dict[str, str]
) -> None:
    assert decide(client, 1, **{"verdict": "exclude", **fields}) == 400
    assert not (tmp_path / "data/exclusions.csv").exists()


def test_a_name_is_one_printable_line(client: TestClient, tmp_path: Path) -> None:
    assert decide(client, 1, "exclude", person="홍\x00길\u202e동\r\n x" + "y" * 200) == 200
    person = read_csv((tmp_path / "data/exclusions.csv").read_bytes())[0]["person"]
    assert person.startswith("홍길동 x") and len(person) == 60


def test_rows_by_hand_stay_until_the_dashboard_decides_about_their_label(tmp_path: Path) -> None:
    write_catalog(tmp_path / "data", ["글"])
    dataset = find_sources([str(tmp_path / "data")], None, tmp_path / "own").datasets["data"]
    dataset.exclusions.write_text("label,decision,type,person,time\nb.json,exclude,,손,\n")
    assert update_exclusions(dataset, lambda: [decision()]) == 2
    assert [row.label for row in exclusions_of(dataset)] == ["a.json", "b.json"]
    undecided = [decision(label="b.json", verdict="undecided")]
    assert update_exclusions(dataset, lambda: undecided) == 1


def test_two_people_who_decide_at_once_both_reach_the_list(tmp_path: Path) -> None:
    write_catalog(tmp_path / "data", ["글"])
    dataset = find_sources([str(tmp_path / "data")], None, tmp_path / "own").datasets["data"]
    decided, begun, goes_on = [decision()], Event(), Event()

    def slow() -> list[Decision]:
        found = list(decided)
        begun.set()
        assert goes_on.wait(30)
        return found

    first = Thread(target=update_exclusions, args=(dataset, slow))
    second = Thread(target=update_exclusions, args=(dataset, lambda: list(decided)))
    first.start()
    assert begun.wait(30)
    decided.append(decision(label="b.json"))
    second.start()
    # time enough to overtake, were it not held back
    second.join(0.2)
    goes_on.set()
    first.join(30)
    second.join(30)
    assert [row.label for row in exclusions_of(dataset)] == ["a.json", "b.json"]


def test_names_in_hangul_are_remembered_and_can_be_downloaded(tmp_path: Path) -> None:
    for name in ("가", "뉴스"):
        write_catalog(tmp_path / name, ["글"])
    sources = find_sources([str(tmp_path / "가"), str(tmp_path / "뉴스")], None, tmp_path / "own")
    with TestClient(create_app(sources, with_index=False), base_url="http://127.0.0.1") as client:
        answer = client.get("/data/뉴스/decisions.csv")
        assert answer.status_code == 200
        name = answer.headers["content-disposition"].partition("UTF-8''")[2]
        assert unquote(name) == "decisions-뉴스.csv"
        client.get("/data/뉴스/decisions")
        # a page of no dataset links to the one that was looked at last
        assert quote("/data/뉴스/defects") in client.get("/").text


def test_the_newest_decision_holds_and_the_old_ones_stay_readable(tmp_path: Path) -> None:
    review = Review(tmp_path)
    review.decide(decision())
    review.decide(decision(verdict="accept", person="다른 사람"))
    assert [each.verdict for each in review.newest("data")] == ["accept"]
    assert [each.person for each in review.history("data", "a.json")] == ["다른 사람", "홍길동"]
    assert review.newest("other") == []
    with pytest.raises(ReviewError, match="verdict"):
        review.decide(decision(verdict="delete"))


def test_a_csv_has_a_bom_and_reads_back_as_it_was() -> None:
    rows = [(text, str(number)) for number, text in enumerate(NASTY)]
    data = csv_bytes(("text", "number"), rows)
    assert data.startswith(b"\xef\xbb\xbf")
    assert [(row["text"], row["number"]) for row in read_csv(data)] == rows
    plain = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    assert not [cell for row in plain for cell in row if cell.startswith(("=", "+", "-", "@"))]


def test_a_file_by_hand_that_makes_no_sense_is_named_and_left_alone(
    client: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "data/exclusions.csv").write_text("a,b\n1,2\n")
    assert decide(client, 1, "exclude") == 200
    assert "it needs label and decision" in client.get("/data/data/decisions").text
    assert (tmp_path / "data/exclusions.csv").read_text() == "a,b\n1,2\n"
