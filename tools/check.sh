#!/usr/bin/env bash
# Everything that must hold before a commit: lint, types, tests. CI runs this file and nothing else.
# Arguments go to pytest: bash tools/check.sh tests/test_loader_order.py
# bash tools/check.sh --env oldest|newest [...]: the tests alone, in an environment of their own (.venv-oldest), with
# the versions of configs/env/oldest.txt and the Python that it names: what pyproject.toml allows is what was run.
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'echo "check: failed in: $BASH_COMMAND" >&2' ERR
# One thread a process: two processes share the tests, and many of those start more.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Packages are installed uncompiled, and some containers forbid Python to store what it compiles. Then each of the many
# processes that tests start would compile torch and diffusers again: 26 s of work instead of 9 for an import.
export PYTHONDONTWRITEBYTECODE=
# One process of tests keeps less than one core busy. Here two take file after file, in the order of names: a file's
# tests stay together, for its fixtures, and no long file is the last one.
shared=(-n 2 --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --env ]; then
    env="${2:?check: --env needs the name of a file in configs/env}"
    shift 2
    python="python$(sed -n 's/^# Python //p' "configs/env/$env.txt")"
    "$python" -c "" 2> /dev/null || { echo "check: configs/env/$env.txt is for $python: install that first" >&2; exit 2; }
    VENV=".venv-$env" PYTHON="$python" bash tools/install.sh "$env" dali-cuda12,ray,demo,dev
    [ $# -gt 0 ] || set -- "${shared[@]}"
    exec ".venv-$env/bin/python" -m pytest "$@"
fi
bash tools/install.sh cpu
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check .
.venv/bin/mypy --num-workers 2
if [ $# -gt 0 ]; then
    .venv/bin/python -m pytest "$@"
    exit
fi
# The browser tests need a Chromium of the system's, and a font for Hangul: apt-get install chromium fonts-nanum
if command -v chromium > /dev/null; then
    .venv/bin/python -m pytest "${shared[@]}" -m "not soak"
else
    .venv/bin/python -m pytest "${shared[@]}"
    echo "check: skipped, because no chromium is installed: tests/test_tools_dashboard_browser.py" >&2
fi
