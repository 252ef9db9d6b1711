"""Check the machine, and with a configuration the run: python -m tools.doctor [CONFIG.toml]

Exit code 0: nothing is in the way. 1: a failure, with what to do beside it. 2: the call is wrong.
Nothing is changed, nothing is downloaded; a file that measures the disk is removed again.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from loader.config import ConfigError, load_toml
from tools.doctor import cards, host, run, step
from tools.doctor.finding import Check, Finding, guarded
from train.config import TrainConfig

MARKS = {"ok": "ok     ", "warning": "WARNING", "failure": "FAILURE", "skipped": "skipped"}
HOST_CHECKS: dict[str, Check] = {
    "python": host.interpreter,
    "packages": host.packages,
    "imports": host.imports,
    "bitsandbytes": host.bitsandbytes,
    "host memory": host.pinned_memory,
    "fonts": host.fonts,
    "gpu": cards.cards,
    "host to device": cards.host_copies,
    "all-reduce": cards.all_reduce,
    "video engines": cards.video_engines,
    "DALI": cards.dali,
}


def run_checks(config: TrainConfig | None) -> Iterator[Finding]:
    """All findings, host first. With a configuration its dataset, model, disk and one step too."""
    checks = dict(HOST_CHECKS)
    if config is not None:
        checks["dataset"] = partial(run.datasets, config)
        checks["model"] = partial(run.model_files, config)
        checks["disk"] = partial(run.disk, config)
        checks["one step"] = partial(step.one_step, config)
    for name, check in checks.items():
        yield from guarded(name, check)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    parser.add_argument("--json", action="store_true", help="a JSON array instead of lines")
    options = parser.parse_args(arguments)
    config = None
    if options.config is not None:
        try:
            config = load_toml(options.config, TrainConfig, options.set)
        except ConfigError as error:
            print(f"doctor: {error}", file=sys.stderr)
            return 2
    findings = []
    for finding in run_checks(config):
        findings.append(finding)
        if not options.json:
            print(f"{MARKS[finding.status]}  {finding.name}: {finding.text}", flush=True)
            if finding.advice:
                print(f"         -> {finding.advice}", flush=True)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(findings)).decode())
    num_failed = sum(finding.status == "failure" for finding in findings)
    if not options.json:
        count = {s: sum(f.status == s for f in findings) for s in MARKS}
        print(", ".join(f"{number} {status}" for status, number in count.items()))
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
