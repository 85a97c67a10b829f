#!/usr/bin/env bash
# All tests, from a checkout: drift of the generated package, chapters, pytest, and the wheel in an empty environment.
# usage: tests/run.sh BIN [unit]   (BIN: folder of the environment's programs; unit: without the wheel)
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=$(cd "$1" && pwd)
export PATH="$BIN:$PATH" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

echo "== notebooks are clean, and the package is what they export"
if grep -rlE '^ *"(<<<<<<<|>>>>>>>)' nbs --include='*.ipynb'; then echo "conflict markers in a notebook"; exit 1; fi
before=$(git status --porcelain)
nbdev_clean && nbdev_export
after=$(git status --porcelain)
test "$before" = "$after" || { git status --short; git diff --stat; echo "run nbdev_clean and nbdev_export, then commit"; exit 1; }

echo "== chapters: they run, and show the committed outputs"
OMP_NUM_THREADS=1 python tests/chapters.py

echo "== pytest"
OMP_NUM_THREADS=1 python -m pytest tests -n 2 --dist loadfile --durations=25

if [ "${2:-all}" = unit ]; then exit 0; fi
echo "== the wheel, in an empty environment"
bash tests/wheel.sh "$BIN"
