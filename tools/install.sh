#!/usr/bin/env bash
# bash tools/install.sh [ENV [EXTRAS]]: make .venv and install newsreel into it, as configs/env/ENV.txt constrains.
# Does nothing, quickly, when neither that file nor pyproject.toml has changed since it last succeeded here.
# VENV=FOLDER makes another environment than .venv, PYTHON=... chooses the interpreter of a new one.
set -euo pipefail
cd "$(dirname "$0")/.."
env="${1:-cpu}" extras="${2:-dali-cuda12,ray,demo,dev}"
constraints="configs/env/$env.txt" venv="${VENV:-.venv}"
[ -f "$constraints" ] || { echo "install: $constraints does not exist; there are: $(ls configs/env)" >&2; exit 2; }

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "install: $venv has $("$venv/bin/python" -V); newsreel needs 3.11 or newer: PYTHON=python3.11 bash $0" >&2
      exit 2; }

state="$PWD $extras $(cat pyproject.toml "$constraints" | cksum)"
[ "$(cat "$venv/newsreel-installed" 2>/dev/null || true)" = "$state" ] && exit 0
rm -f "$venv/newsreel-installed"
# --no-compile: of torch and its like few modules are ever imported; it halves the time.
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-compile)
echo "install: torch first, alone and by exact pin, so that nothing later replaces the build that was chosen"
"${pip[@]}" "$(grep '^torch==' "$constraints")"
echo "install: newsreel[$extras]"
"${pip[@]}" --constraint "$constraints" --editable ".[$extras]"
echo "$state" > "$venv/newsreel-installed"
