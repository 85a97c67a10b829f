"""Run every chapter, and check that the outputs it shows are the committed ones; with --write, refresh them.

usage: python tests/chapters.py [--write] [--workers N] [NOTEBOOK ...]
"""
import argparse
import base64
import io
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
WIDTH, COLOURS = 400, 32  # Most pixels across a picture in a chapter, and its colours


def kept(outputs: list) -> list:
    "What a reader sees: results, pictures and printed text, without warnings and counters."
    out = []
    for one in outputs:
        if one["output_type"] == "stream" and one.get("name") == "stdout":
            out.append({"name": "stdout", "output_type": "stream", "text": lines(one["text"])})
        elif one["output_type"] in ("execute_result", "display_data"):
            data = {kind: value if kind.startswith("image/png") else lines(value) for kind, value in one["data"].items()}
            if "image/png" in data: data = {"image/png": small(one["data"]["image/png"]), "text/plain": ["<Figure>"]}
            counter = {"execution_count": None} if one["output_type"] == "execute_result" else {}
            out.append({"data": data, **counter, "metadata": {}, "output_type": one["output_type"]})
    return out


def small(picture: str) -> str:  # base64
    "A picture at the size a chapter can carry."
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail((WIDTH, 10_000))
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(out := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def lines(text) -> list:
    text = text if isinstance(text, str) else "".join(text)
    return re.sub(r"(<[^>\n]*?) at 0x[0-9a-fA-F]+", r"\1", text).splitlines(keepends=True)


def same(a: list, b: list) -> bool:
    "Whether two outputs say the same: text to the letter, decimal numbers to four digits, pictures by their presence."
    plain = lambda rows: json.dumps([{**row, "data": {k: "picture" if k == "image/png" else v for k, v in row.get("data", {}).items()}} for row in rows], ensure_ascii=False, sort_keys=True)
    a, b = plain(a), plain(b)
    if NUMBER.sub("#", a) != NUMBER.sub("#", b): return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b))
    return all(abs(float(x) - float(y)) <= 1e-4 * max(1, abs(float(x))) for x, y in pairs)


def run(path: Path, write: bool) -> tuple:  # (path, what is wrong, seconds)
    "Execute one chapter in this process."
    os.environ["IN_TEST"] = "1"
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    began, os.environ["MPLBACKEND"] = time.time(), "module://matplotlib_inline.backend_inline"
    os.chdir(path.parent)
    nb, raw = NBProcessor(path, process=True).nb, json.loads(path.read_text())
    flags = set(get_config().tst_flags.split())
    skipped = lambda cell: cell.cell_type != "code" or flags & (getattr(cell, "directives_", None) or {}).keys()
    shell = CaptureShell(path, mpl_format="png")
    try: shell.run_all(nb, exc_stop=True, preproc=skipped)
    except BaseException: return path, shell.prettytb(fname=path), time.time() - began
    wrong = []
    for old, new in zip(raw["cells"], nb.cells):
        if old["cell_type"] != "code": continue
        visible = not re.match(r"#\|\s*(hide|export)", "".join(old["source"])) and not skipped(new)
        outputs = kept(json.loads(json.dumps(list(new.get("outputs", []))))) if visible else []
        if same(old["outputs"], outputs): continue
        if write: old["outputs"] = outputs
        else: wrong.append(f"{path.relative_to(ROOT)}: the output of cell {old['id']} is not the committed one: run make outputs")
    if write: path.write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n")
    return path, "\n".join(wrong), time.time() - began


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("paths", nargs="*", type=Path)
    given = parser.parse_args()
    found = [path.resolve() for path in given.paths] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    paths = [path for path in found if not {"chain", ".ipynb_checkpoints", "runs"} & set(path.relative_to(ROOT).parts)]
    failed = 0
    sys.path.insert(0, str(ROOT))
    with ProcessPoolExecutor(given.workers) as pool:
        for path, wrong, seconds in pool.map(run, paths, [given.write] * len(paths)):
            print(f"{path.relative_to(ROOT)}: {'FAILED' if wrong else 'ok'}, {seconds:.0f} s", flush=True)
            if wrong: print(wrong, file=sys.stderr, flush=True)
            failed += bool(wrong)
    print(f"chapters: {len(paths) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    import chapters  # workers cannot find functions of __main__, which IPython replaces

    sys.exit(chapters.main())
