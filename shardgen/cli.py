"""`shardgen build | verify | inspect | report`.

Exit codes: 0 done, 1 the data has faults or work is left, 2 the command can't be carried out as
given, 130 interrupted.
"""  # the last paragraph is printed by --help

import argparse
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgspec
from tqdm import tqdm

from loader.config import ConfigError, load_toml
from loader.files import told
from loader.manifest import read_manifest
from shardgen.build import CATALOG_FILE, CONFIG_FILE, STAGES, build
from shardgen.config import ShardgenConfig, rules_of, take_apart
from shardgen.encode.config import encoded_by
from shardgen.encode.executors import ExecutorError
from shardgen.encode.write import TAR
from shardgen.report.figures import Check
from shardgen.report.files import REPORT_FILE
from shardgen.report.inspect_clip import inspect_clip
from shardgen.report.inspect_shard import inspect_shard
from shardgen.report.page import write_page
from shardgen.report.summary import summary, summary_of_checks
from shardgen.verify import verify_dataset

OK, FAULTS, CANNOT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's fault is one line on stderr, never a
    traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        with _ending_at_once():
            return int(options.run(options))
    except sqlite3.Error as error:
        print(
            f"shardgen: the catalog can't be read or written: {error}; is the disk full, or the "
            f"folder read-only? What was finished stands, run the same command to go on",
            file=sys.stderr,
        )
        return CANNOT
    except OSError as error:
        print(f"shardgen: {told(error)}", file=sys.stderr)
        return CANNOT
    except (ValueError, ExecutorError) as error:
        print(f"shardgen: {error}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Ctrl-C ends the process there and then. As an exception it would wait for what threads and
    workers are at, a download of an hour perhaps; a build may be killed anywhere, and its workers
    end with it.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        print(
            "\nshardgen: interrupted; what was finished stands, run the same command to go on",
            file=sys.stderr,
            flush=True,
        )
        if "ray" in sys.modules:
            raise KeyboardInterrupt  # processes of a cluster of our own would outlive this one
        os._exit(INTERRUPTED)

    # elsewhere than in the main thread no handler can be set; one that ignores Ctrl-C is nohup's
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_build(options: argparse.Namespace) -> int:
    flags = {
        "executor.kind": options.executor,
        "executor.workers": options.workers,
        "labels.limit": options.limit,
    }
    overrides = [
        *options.set,
        *(f"{key}={value}" for key, value in flags.items() if value is not None),
    ]
    config = load_toml(options.config, ShardgenConfig, overrides)
    done = build(take_apart(config), options.stage, options.dry_run)
    return OK if done else FAULTS


def run_verify(options: argparse.Namespace) -> int:
    manifest = read_manifest(options.dataset)
    shards = [info for infos in manifest.splits.values() for info in infos]
    num_faults = 0
    with tqdm(desc="verify", total=len(shards), unit=" shards", dynamic_ncols=True) as bar:
        for fault in verify_dataset(options.dataset, options.workers, bar.update):
            bar.write(fault)
            num_faults += 1
    num_samples = sum(info.num_samples for info in shards)
    size = f"{sum(info.bytes for info in shards) / 1e6:.1f} MB"
    print(
        f"{options.dataset}: {len(shards)} shards, {num_samples} samples, {size}: "
        f"{num_faults or 'no'} faults"
    )
    if encoder := encoded_by(manifest.recipe):
        print(f"encoded by: {encoder}")
    return FAULTS if num_faults else OK


def run_inspect(options: argparse.Namespace) -> int:
    if options.target.endswith(TAR):
        lines = inspect_shard(Path(options.target), options.key)
    else:
        config = _config_of(options.dataset)
        root, rules = Path(config.labels.root), rules_of(config)
        lines = inspect_clip(options.dataset, options.target, options.sheet, root, rules)
    for line in lines:
        print(line)
    return OK


def run_report(options: argparse.Namespace) -> int:
    config = _config_of(options.dataset)
    report = msgspec.json.decode((options.dataset / REPORT_FILE).read_bytes())
    shards = [
        (split, info)
        for split, infos in read_manifest(options.dataset).splits.items()
        for info in infos
    ]
    print(summary(report, shards))
    print()
    print(summary_of_checks(msgspec.convert(report["checks"], list[Check])))
    print(f"\n{write_page(options.dataset, report, Path(config.labels.root))}")
    return OK


def _config_of(dataset: Path) -> ShardgenConfig:
    """The configuration that a build has echoed into its output folder. Raises ConfigError."""
    if not (dataset / CATALOG_FILE).is_file():
        raise ConfigError(
            f"{dataset}: holds no {CATALOG_FILE}; name the output folder of a build (of a clip: "
            f"with --dataset)"
        )
    return load_toml(dataset / CONFIG_FILE, ShardgenConfig)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardgen",
        description="Label files and footage in, training shards out.",
        epilog=" ".join((__doc__ or "").rpartition("\n\n")[2].split()),
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "build", help="build a dataset, or go on with one that was interrupted"
    )
    command.add_argument("config", type=Path, metavar="CONFIG.toml")
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one configuration key"
    )
    command.add_argument("--executor", choices=["local", "ray"], help="executor.kind")
    command.add_argument("--workers", type=int, metavar="N", help="executor.workers")
    command.add_argument(
        "--limit", type=int, metavar="N", help="labels.limit: the first N label files only"
    )
    command.add_argument(
        "--stage", choices=STAGES, default=STAGES[-1], help="stop after this stage"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="read and filter the labels, say what to expect"
    )
    command.set_defaults(run=run_build)

    command = commands.add_parser("verify", help="check every byte of a dataset")
    command.add_argument("dataset", type=Path)
    command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    command.set_defaults(run=run_verify)

    command = commands.add_parser(
        "inspect", help="what a shard or one sample of it holds, or what became of a clip"
    )
    command.add_argument("target", metavar="SHARD.tar|CLIP_ID")
    command.add_argument("key", nargs="?", metavar="KEY", help="of a shard: a key or its beginning")
    command.add_argument(
        "--dataset",
        type=Path,
        default=Path(),
        help="of a clip: the build's output folder (default: this folder)",
    )
    command.add_argument(
        "--sheet", type=Path, metavar="OUT.png", help="of a clip: draw its windows"
    )
    command.set_defaults(run=run_inspect)

    command = commands.add_parser(
        "report", help="print the quality report of a dataset and write it as one HTML page"
    )
    command.add_argument("dataset", type=Path)
    command.set_defaults(run=run_report)
    return parser


if __name__ == "__main__":
    sys.exit(main())
