"""What a build does to its catalog before the first stage: adopt the recipe, the selection, the
reviewers' exclusions, and what another build has fetched and probed. Where one of them has changed
since the last build, the clips that it touches are judged anew.
"""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from shardgen.catalog.database import CatalogError, Database, open_to_read
from shardgen.catalog.tables import (
    ACCEPTED,
    DUPLICATE,
    EXCLUDED,
    FAILED,
    FETCHED,
    INGESTED,
    REJECTED,
    REPEATED_ID,
    SKIPPED,
    SOUND,
    UNAVAILABLE,
    WANTED,
)

_JUDGED = (WANTED, FETCHED, SOUND, REJECTED, DUPLICATE, UNAVAILABLE, SKIPPED)
_JUDGE_ANEW = "UPDATE clips SET status = ?, reason = '', detail = '' WHERE status = ?"
_UNPLAN = """
UPDATE clips SET
    status = ?, reason = '', detail = '', split = '', num_windows = 0, flags = ''
WHERE status = ?
"""
_EXCLUDED_TABLE = """
DROP TABLE IF EXISTS temp.excluded;
CREATE TEMP TABLE excluded (label TEXT PRIMARY KEY) WITHOUT ROWID;
"""
# A clip that was excluded may have been the one of two with equal bytes, or with one id, that was
# taken: so those others are judged anew with it.
_JUDGE_REVIEWED_ANEW = f"""
UPDATE clips SET status = '{INGESTED}', reason = '', detail = ''
WHERE status IN ({", ".join(f"'{status}'" for status in _JUDGED)}) AND (
    label IN (SELECT label FROM temp.excluded) OR reason IN ('{EXCLUDED}', '{REPEATED_ID}')
    OR status = '{DUPLICATE}')
"""
_REVIEWED_SAMPLES = f"""
SELECT id, label IN (SELECT label FROM temp.excluded) FROM clips WHERE status = '{ACCEPTED}'
"""


def forgets_plan(database: Database, recipe_id: str) -> bool:
    """Whether the recipe has changed since the last build, so that what was planned but not
    written is planned anew. Raises CatalogError if a shard was written, because those never
    change.
    """
    old = database.recall("recipe_id", recipe_id)
    if old == recipe_id:
        return False
    written = database.connection.execute(
        "SELECT 1 FROM shards WHERE info IS NOT NULL LIMIT 1"
    ).fetchone()
    if written:
        raise CatalogError(
            f"{database.path}: its shards were written under recipe {old}, the configuration and "
            f"the versions installed here give {recipe_id}, and a shard never changes: take the "
            f"configuration back to the one echoed beside the catalog, and newsreel and its "
            f"packages to the versions of then, or choose another output folder, with "
            f'fetch.reuse = "{database.path.parent}" to keep its downloads and probes'
        )
    return True


def adopt_recipe(database: Database, recipe_id: str, selection: str) -> None:
    """Start a build under this recipe and selection (limit, fraction). Raises CatalogError as
    `forgets_plan` does.
    """
    unplan = forgets_plan(database, recipe_id)
    is_other_selection = database.recall("selection", selection) != selection
    again = _JUDGED if unplan or is_other_selection else ()
    with database.transaction() as db:
        if unplan:
            db.execute("DELETE FROM windows")
            db.execute("DELETE FROM shards")
            db.executemany(_UNPLAN, [(INGESTED, status) for status in (ACCEPTED, FAILED)])
        database.remember("recipe_id", recipe_id)
        database.remember("selection", selection)
        db.executemany(_JUDGE_ANEW, [(INGESTED, status) for status in again])


def adopt_exclusions(database: Database, excluded: Iterable[str]) -> int:
    """Have clips judged anew whose exclusion by a reviewer has changed, and flag those whose
    samples are planned, because a shard never changes. `excluded` are the labels' relative paths;
    returns how many of them name no label file.
    """
    labels = sorted(excluded)
    digest = xxhash.xxh3_128_hexdigest("\n".join(labels).encode())
    none = xxhash.xxh3_128_hexdigest(b"")
    database.connection.executescript(_EXCLUDED_TABLE)
    with database.transaction() as db:
        db.executemany("INSERT INTO temp.excluded VALUES (?)", [(label,) for label in labels])
        if database.recall("exclusions", none) != digest:
            db.execute(_JUDGE_REVIEWED_ANEW)
            database.remember("exclusions", digest)
            samples = db.execute(_REVIEWED_SAMPLES).fetchall()
            database.flag(EXCLUDED, [clip for clip, is_excluded in samples if is_excluded])
            database.unflag(EXCLUDED, [clip for clip, is_excluded in samples if not is_excluded])
        (num_unknown,) = db.execute(
            "SELECT count(*) FROM temp.excluded WHERE label NOT IN (SELECT label FROM clips)"
        ).fetchone()
    database.connection.execute("DROP TABLE temp.excluded")
    return int(num_unknown)


def adopt_media(database: Database, other: Path) -> None:
    """Take over what the catalog `other` knows of files and of what probing them said, once. A
    file that has changed since is hashed again where it is used, as one of this catalog's own is.
    Failed probes are not taken over. Raises CatalogError if `other` can't be read.
    """
    name = f"reused {other.resolve()}"
    if database.recall(name):
        return
    source = open_to_read(other)
    try:
        files = source.connection.execute(
            "SELECT source, path, size_bytes, mtime_ns, media_xxh3 FROM sources"
        )
        probes = source.connection.execute(
            "SELECT media_xxh3, error_reason, error_detail, probe FROM media "
            "WHERE error_reason = ''"
        )
        with database.transaction() as db:
            db.executemany("INSERT OR IGNORE INTO sources VALUES (?, ?, ?, ?, ?)", files)
            db.executemany("INSERT OR IGNORE INTO media VALUES (?, ?, ?, ?)", probes)
            database.remember(name, "done")
    finally:
        source.connection.close()
