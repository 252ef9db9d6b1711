"""The catalog of a build: SQLite, a row per label file, one status, one reason. All SQL is here,
and what comes out is typed: no other package subscripts a row.

    tables        the tables, the statuses of a clip, and the rows that stages hand over
    rows          the rows that come out
    database      how the file is opened, transactions, and values remembered from run to run
    catalog       a build's whole view: recipe, counts, clips, verdicts; it holds the next three
    adopt         what a build does before its first stage: recipe, selection, exclusions
    label_table   what ingest knows and writes of label files
    media_table   which files held which bytes, and what probing them said
    shard_table   shards and their windows: planned, written, lost
    drafts        what waits on disk between two steps of a stage
    rates         how fast the last build was
"""
