#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and run the smoke recipe from an empty folder; then the extra `ray`, once.
# usage: tests/wheel.sh BIN
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=$(cd "$1" && pwd)
HERE=$(pwd)
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
installed=$("$ROOM/venv/bin/python" -m pip list --disable-pip-version-check)
if grep -iE '^(ray|vllm) ' <<< "$installed"; then echo "the wheel without extras pulls in a heavy neighbour"; exit 1; fi
"$ROOM/venv/bin/python" -m pip install --disable-pip-version-check -q -c "$HERE/constraints.txt" "$(echo "$ROOM"/dist/*.whl)[ray]"
"$ROOM/venv/bin/python" "$HERE/tests/ray_rows.py"
echo "wheel: 1 passed, 0 failed"
