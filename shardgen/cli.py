"""`shardgen build | verify | inspect | report`.

Exit codes: 0 done, 1 the data has faults or work is left, 2 the command can't be carried out as given, 130 interrupted.
"""  # the last paragraph is printed by --help

import argparse
import json
import os
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from loader.config import load_toml
from loader.manifest import decode_index, read_manifest
from loader.sample import JSON, LATENT, TEXT, decode_meta, decode_tensor, split_member_name
from shardgen.build import STAGES, build
from shardgen.config import ShardgenConfig
from shardgen.encode.executors import ExecutorError
from shardgen.encode.write import IDX, TAR
from shardgen.report.figures import Check
from shardgen.report.files import REPORT_FILE, summary, summary_of_checks
from shardgen.report.inspect_clip import inspect_clip
from shardgen.report.page import write_page
from shardgen.verify import verify_dataset

OK, FAULTS, CANNOT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's fault is one line on stderr, never a
    traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except sqlite3.Error as error:
        print(
            f"shardgen: the catalog can't be read or written: {error}; is the disk full, or the folder read-only? "
            f"What was finished stands, run the same command to go on",
            file=sys.stderr,
        )
        return CANNOT
    except (ValueError, OSError, ExecutorError) as error:
        print(f"shardgen: {error}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print(
            "shardgen: interrupted; what was finished stands, run the same command to go on",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # not by way of the workers' last units: they end with this process


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
    done = build(
        load_toml(options.config, ShardgenConfig, overrides), options.stage, options.dry_run
    )
    return OK if done else FAULTS


def run_verify(options: argparse.Namespace) -> int:
    shards = [info for infos in read_manifest(options.dataset).splits.values() for info in infos]
    num_faults = 0
    with tqdm(desc="verify", total=len(shards), unit=" shards", dynamic_ncols=True) as bar:
        for fault in verify_dataset(options.dataset, options.workers, bar.update):
            bar.write(fault)
            num_faults += 1
    print(
        f"{options.dataset}: {len(shards)} shards, {sum(info.num_samples for info in shards)} samples, "
        f"{sum(info.bytes for info in shards) / 1e6:.1f} MB: {num_faults or 'no'} faults"
    )
    return FAULTS if num_faults else OK


def run_inspect(options: argparse.Namespace) -> int:
    if not options.target.endswith(TAR):
        for line in inspect_clip(options.dataset, options.target, options.sheet):
            print(line)
        return OK
    stem = Path(options.target).with_suffix("")
    index = decode_index(stem.with_suffix(IDX).read_bytes(), str(stem.with_suffix(IDX)))
    found = False
    with stem.with_suffix(TAR).open("rb") as tar:
        for members in index:
            stored = {}
            for member in members:
                tar.seek(member.offset)
                stored[split_member_name(member.name)[1]] = tar.read(member.size)
            meta = decode_meta(stored[JSON])
            if options.key is None:
                print(
                    f"{meta.key}  {meta.clip_id}  shot {meta.shot}  {meta.start_ms} ms  {meta.bucket}  {meta.prompt}"
                )
            elif meta.key.startswith(options.key):
                found = True
                print(json.dumps(json.loads(stored[JSON]), ensure_ascii=False, indent=2))
                for name, data in stored.items():
                    print(f"{meta.key}.{name}: {len(data)} bytes")
                for name, info in (LATENT, meta.latent), (TEXT, meta.text):
                    if name not in stored:  # of an index of foreign tars
                        continue
                    tensor = decode_tensor(stored[name], info).astype("float32")
                    print(
                        f"{name}: shape {list(info.shape)}, mean {tensor.mean():.4f}, deviation {tensor.std():.4f}, "
                        f"from {tensor.min():.4f} to {tensor.max():.4f}"
                    )
    if options.key is not None and not found:
        raise ValueError(
            f"{stem.with_suffix(TAR)}: no sample has a key that begins with {options.key}"
        )
    return OK


def run_report(options: argparse.Namespace) -> int:
    report = msgspec.json.decode((options.dataset / REPORT_FILE).read_bytes())
    shards = [
        (split, info)
        for split, infos in read_manifest(options.dataset).splits.items()
        for info in infos
    ]
    print(summary(report, shards))
    print()
    print(summary_of_checks(msgspec.convert(report["checks"], list[Check])))
    print(f"\n{write_page(options.dataset, report)}")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardgen",
        description="Label files and footage in, training shards out.",
        epilog=(__doc__ or "").strip().rpartition("\n")[2],
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
