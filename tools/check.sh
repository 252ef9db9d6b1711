#!/usr/bin/env bash
# Everything that must hold before a commit: lint, types, tests. CI runs this file and nothing else.
# Arguments go to pytest: bash tools/check.sh tests/test_order.py
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'echo "check: failed in: $BASH_COMMAND" >&2' ERR
bash tools/install.sh cpu
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
# The browser tests need a Chromium of the system's, and a font for Hangul: apt-get install chromium fonts-nanum
if [ $# -eq 0 ]; then
    if command -v chromium > /dev/null; then
        .venv/bin/python -m pytest -m browser
    else
        echo "check: skipped, because no chromium is installed: tests/test_tools_dashboard_browser.py" >&2
    fi
fi
