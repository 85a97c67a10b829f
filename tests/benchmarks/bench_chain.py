"Minutes of the whole chain and of each step, from the run.json of a finished run."
import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--run", default="runs/s3ft-micro", help="folder of a finished run")
run = json.loads((Path(parser.parse_args().run) / "run.json").read_text())
seconds = run["seconds"]
total = seconds.get("total") or sum(seconds.values())
for step, value in sorted(seconds.items(), key=lambda item: -item[1]):
    if step != "total": print(f"{step:<20} {value:7.1f} s  {value / total:6.1%}")
print(f"whole chain: {total / 60:.1f} minutes, peak memory {run['peak_rss_gib']:.2f} GiB")
