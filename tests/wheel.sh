#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and run the smoke recipe from an empty folder.
# usage: tests/wheel.sh BIN
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=$(cd "$1" && pwd)
ROOM=$(mktemp -d)
trap 'rm -rf "$ROOM"' EXIT
rm -rf build dist
"$BIN/python" -m build --outdir "$ROOM/dist" . > "$ROOM/build.log" 2>&1 || { tail -20 "$ROOM/build.log"; exit 1; }
"$BIN/python" -m venv "$ROOM/venv"
"$ROOM/venv/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt "$ROOM"/dist/*.whl
mkdir "$ROOM/elsewhere" && cd "$ROOM/elsewhere"
HF_HUB_OFFLINE=1 "$ROOM/venv/bin/s3ft" run s3ft-smoke
test -s runs/s3ft-smoke/report/index.html
test -s runs/s3ft-smoke/report/numbers.jsonl
echo "wheel: 1 passed, 0 failed"
