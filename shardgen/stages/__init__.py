"""The stages of a build, each from one status to the next. A stage takes the clips of its status
from the catalog, asks the pure rules, and writes the outcome back: so each can be killed and
called again, and one that has nothing to do does nothing.

    label files --ingest--> ingested --filter--> wanted --fetch--> fetched --probe--> sound
                --plan--> accepted, in a planned shard --encode--> accepted, in a written shard

On each arrow a clip may end: unreadable, skipped, rejected, unavailable, duplicate, failed, gone.

    config   where labels and media come from ([labels], [fetch] of the configuration)
    ingest   the label tree into the catalog; reader is the process that reads for it
    filter   the rules that need the label alone
    fetch    media found or downloaded, and hashed
    recheck  a look at footage that has its samples already
    probe    media decoded once, and the rules that need them
    plan     duplicates settled, windows cut, shards fixed for ever
    encode   planned shards to an executor, results into the catalog
    verdict  from a rule's verdict to what the catalog records
"""
