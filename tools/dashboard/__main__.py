"""See the data, the runs and the results: `python -m tools.dashboard --dataset D --runs R`.

Serves on 127.0.0.1 alone. From another computer: `ssh -L 7020:127.0.0.1:7020 HOST`, or behind a
proxy with TLS; a host that others can reach needs --token-file.
"""

import argparse
import fcntl
import logging
import os
import sqlite3
import sys
from pathlib import Path

import uvicorn

from loader.files import told
from tools.dashboard.app import create_app
from tools.dashboard.guard import LOOPBACK, MAX_QUERY_BYTES, TokenError, host_name, read_token
from tools.dashboard.review import REVIEW_FILE
from tools.dashboard.sources import SourceError, find_sources


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.dashboard", description=__doc__)
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="a dataset that shardgen builds or has built; may be repeated",
    )
    parser.add_argument("--runs", type=Path, help="folder of training runs, or one run")
    parser.add_argument(
        "--own",
        type=Path,
        default=Path("runs/dashboard"),
        help="folder of the dashboard's own files: decisions and votes, indexes, proxies",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7020)
    parser.add_argument("--token-file", type=Path, help="mode 0600; what visitors have to give")
    parser.add_argument(
        "--allow-host", action="append", default=[], help="another name it is reached by"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = (*LOOPBACK, options.host, *(host_name(name) for name in options.allow_host))
    try:
        if options.host not in LOOPBACK and options.token_file is None:
            raise TokenError(
                f"--host {options.host} can be reached by others: give --token-file, or keep "
                f"127.0.0.1 and use an SSH tunnel"
            )
        if not 0 < options.port < 2**16:
            raise SourceError(f"--port {options.port}: a port is a number from 1 to 65535")
        token = read_token(options.token_file) if options.token_file else ""
        sources = find_sources(options.dataset, options.runs, options.own)
        sources.own.mkdir(parents=True, exist_ok=True)
        lock = _lock(sources.own)
        app = create_app(sources, token=token, hosts=names)
    except sqlite3.DatabaseError as error:
        print(
            f"dashboard: {options.own / REVIEW_FILE}: {error}; it holds the decisions and votes: "
            f"bring back a copy, or give another --own",
            file=sys.stderr,
        )
        return 2
    except (TokenError, SourceError, OSError) as error:
        print(f"dashboard: {told(error)}", file=sys.stderr)
        return 2
    # requests wait for the interpreter while the index is made: let it change hands more often
    sys.setswitchinterval(0.001)
    print(f"dashboard: http://{options.host}:{options.port}/ (Ctrl-C ends it)")
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=16 * 1024 + MAX_QUERY_BYTES,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
    )
    os.close(lock)
    return 0


def _lock(own: Path) -> int:
    """One dashboard per folder. Raises SourceError."""
    descriptor = os.open(own / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise SourceError(
            f"{own} is used by another dashboard that runs: end it, or give another --own"
        ) from error
    return descriptor


if __name__ == "__main__":
    sys.exit(main())
