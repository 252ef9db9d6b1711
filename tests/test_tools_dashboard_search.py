"""Korean search and filters: what is found, what is counted, and how the index follows a build."""

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from tools.dashboard import indexing, search
from tools.dashboard.catalog import CatalogView
from tools.dashboard.indexing import Indexer
from tools.dashboard.search import Filter, bigrams, find, match_of, needs_scan, open_search
from tools.fake.catalog import add_row, write_catalog


def indexed(folder: Path) -> Indexer:
    indexer = Indexer(CatalogView(folder / "catalog.sqlite"), folder / "own")
    indexer.update()
    return indexer


def hits(indexer: Indexer, wanted: Filter) -> list[int]:
    with open_search(indexer.path) as db:
        return find(db, wanted, 0, None, 50).ids


def test_two_syllables_of_a_longer_word_are_found(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["새벽 어시장의 상인", "자동차가 지나간다", "어시스트"])
    indexer = indexed(tmp_path)
    assert hits(indexer, Filter(text="어시")) == [1, 3]
    assert hits(indexer, Filter(text="시장")) == [1]
    assert hits(indexer, Filter(text="어시장")) == [1]
    assert hits(indexer, Filter(text="어장")) == []
    assert hits(indexer, Filter(text="어시장 상인")) == [1]
    assert hits(indexer, Filter(text="어시장 자동차")) == []


def test_latin_digits_and_decomposed_hangul_are_found(tmp_path: Path) -> None:
    decomposed = "\u1112\u1161\u11ab\u1100\u1173\u11af"  # 한글, as some file systems write it
    write_catalog(tmp_path, ["CCTV 2019년 화면", decomposed])
    indexer = indexed(tmp_path)
    assert hits(indexer, Filter(text="cctv")) == [1]
    assert hits(indexer, Filter(text="2019년")) == [1]
    assert hits(indexer, Filter(text="한글")) == [2]


def test_a_column_can_be_searched_alone(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["어시장"], speech="오늘의 소식")
    indexer = indexed(tmp_path)
    assert hits(indexer, Filter(text="소식", column="stt")) == [1]
    assert hits(indexer, Filter(text="소식", column="caption")) == []


def test_the_text_in_the_picture_is_found(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["어시장"], ocr=["새벽 4시", "속보"])
    indexer = indexed(tmp_path)
    assert (
        hits(indexer, Filter(text="새벽", column="ocr"))
        == hits(indexer, Filter(text="속보"))
        == [1]
    )
    assert hits(indexer, Filter(text="새벽", column="caption")) == []
    assert CatalogView(tmp_path / "catalog.sqlite").scan(["속"], 0, 10).ids == [1]


def test_a_catalog_of_labels_without_that_text_is_read_all_the_same(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["어시장"])
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as db, db:
        (body,) = db.execute("SELECT body FROM bodies").fetchone()
        older = msgspec.msgpack.encode(msgspec.msgpack.decode(body)[:-1])
        db.execute("UPDATE bodies SET body = ?", (older,))
    assert hits(indexed(tmp_path), Filter(text="어시")) == [1]


def test_a_query_holds_no_syntax() -> None:
    assert match_of('어시장" OR caption:*') == '"어시 시장" AND "OR" AND "caption"'
    assert match_of("()*^\"'") == ""
    assert bigrams("어시장 CCTV 눈") == "어시 시장 CCTV 눈"


def test_a_single_syllable_is_looked_for_in_the_texts_themselves(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["함박눈이 내린다", "비가 내린다"])
    assert needs_scan("눈") and not needs_scan("함박눈")
    assert CatalogView(tmp_path / "catalog.sqlite").scan(["눈"], 0, 10).ids == [1]


@pytest.mark.parametrize("few", [0, 400])
def test_filters_and_pages_see_every_row_once(
    tmp_path: Path, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FEW", few)
    write_catalog(tmp_path, [f"어시장 {number}번" for number in range(1, 101)])
    indexer = indexed(tmp_path)
    for wanted in (Filter(status="rejected"), Filter(text="어시", status="rejected"), Filter()):
        expected = [n for n in range(1, 101) if not wanted.status or n % 3 == 0]
        with open_search(indexer.path) as db:
            seen: list[int] = []
            after: int | None = 0
            while after is not None:
                page = find(db, wanted, after, None, 7)
                seen += page.ids
                after = page.following
            assert seen == expected
            assert page.total in (len(expected), None)
            back = find(db, wanted, 0, expected[20], 7)
            assert back.ids == expected[13:20]
            assert back.previous == expected[13] and back.following == expected[19]


def test_filters_of_dates_and_unknown_names(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["가나다"] * 20)
    indexer = indexed(tmp_path)
    assert hits(indexer, Filter(first_day="2019-05-03", last_day="2019-05-04")) == [2, 3]
    assert hits(indexer, Filter(category="없는 분류")) == []
    with open_search(indexer.path) as db:
        assert search.choices(db, "status", Filter(category="인물")) == [
            ("accepted", 7),
            ("rejected", 3),
        ]


def test_the_index_follows_statuses_new_rows_and_changed_texts(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["처음 설명문", "다른 설명문"])
    indexer = indexed(tmp_path)
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as db, db:
        db.execute("UPDATE clips SET status = 'failed' WHERE id = 1")
        db.execute("DELETE FROM clips WHERE id = 2")
        db.execute("DELETE FROM bodies WHERE id = 2")
        add_row(db, 2, "나중에 바뀐 글")
        add_row(db, 3, "새로 들어온 글")
    indexer.update()
    assert hits(indexer, Filter(status="failed")) == [1]
    assert hits(indexer, Filter(text="다른")) == []
    assert hits(indexer, Filter(text="바뀐")) == [2]
    assert hits(indexer, Filter(text="새로")) == [3]


def test_a_pass_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "TEXTS_PER_PIECE", 3)
    write_catalog(tmp_path, [f"글 {number}번째" for number in range(1, 11)])
    indexer = Indexer(CatalogView(tmp_path / "catalog.sqlite"), tmp_path / "own")
    index_piece = Indexer._index_piece

    def stop_after_one(self: Indexer, *arguments: object) -> None:
        index_piece(self, *arguments)  # type: ignore[arg-type]
        self._stop.set()

    monkeypatch.setattr(Indexer, "_index_piece", stop_after_one)
    indexer.update()
    assert indexer.progress.rows_ready and not indexer.progress.texts_ready
    assert indexer.progress.num_texts == 3
    monkeypatch.setattr(Indexer, "_index_piece", index_piece)
    again = indexed(tmp_path)
    assert again.progress.texts_ready and again.progress.num_texts == 10
    with closing(sqlite3.connect(again.path)) as db:
        assert db.execute("SELECT count(*) FROM texts WHERE texts MATCH '번째'").fetchone()[0] == 10


def test_an_index_of_another_catalog_is_thrown_away(tmp_path: Path) -> None:
    write_catalog(tmp_path / "one", ["하나의 글"])
    write_catalog(tmp_path / "two", ["둘째의 글"])
    Indexer(CatalogView(tmp_path / "one/catalog.sqlite"), tmp_path / "own").update()
    second = Indexer(CatalogView(tmp_path / "two/catalog.sqlite"), tmp_path / "own")
    second.update()
    assert hits(second, Filter(text="하나")) == []
    assert hits(second, Filter(text="둘째")) == [1]


def test_a_reader_does_not_hold_up_the_checkpoint_of_a_build(tmp_path: Path) -> None:
    write_catalog(tmp_path, ["글"] * 10)
    view = CatalogView(tmp_path / "catalog.sqlite")
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        with db:
            db.execute("UPDATE clips SET detail = 'written meanwhile'")
        assert view.page(0, 5)
        busy, frames, done = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert (busy, frames, done) == (0, 0, 0)
