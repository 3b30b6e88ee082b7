"""How often the hottest place of a heat map lies in the box of its finding, beside what a blind
guess would hit.

python benchmarks/localization.py --weights runs/latest/03_train_baseline/model.keras --data
data/phantom/NAME python benchmarks/localization.py --weights FILE --data data/nih --all

Of images with boxes, those of the release's test list unless `--all`. One JSON line a finding, then
all, then the focal ones: findings whose boxes cover less than a tenth of the image on average.
"""

from __future__ import annotations

import argparse
import json
import math

from chexlib.data.nih import load_radiographs
from chexlib.data.splits import LISTS, read_list
from chexlib.evaluation.explain import METHODS, judge_boxes, localize


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--weights", required=True)
    options.add_argument("--data", required=True)
    options.add_argument("--method", default="layer_cam", choices=METHODS)
    options.add_argument("--cells", type=int)
    options.add_argument(
        "--focal", type=float, default=0.1, help="largest mean share of the image that boxes cover"
    )
    options.add_argument("--all", action="store_true", help="images of the training list too")
    asked = options.parse_args()
    radiographs = load_radiographs(asked.data)
    wanted = set(radiographs.boxes["image"])
    if not asked.all:
        wanted &= set(read_list(radiographs.root / LISTS[1], radiographs))
    scored = localize(
        asked.weights, radiographs.select(wanted), method=asked.method, cells=asked.cells
    )
    covered = scored.groupby("finding")["chance"].transform("mean")
    for name, rows in (("", scored), ("focal", scored[covered < asked.focal])):
        if rows.empty:
            continue
        judged = judge_boxes(rows)
        for row in judged[
            (judged["measure"] == "pointing") & ((name == "") | (judged["finding"] == "all"))
        ].itertuples():
            line = {
                "finding": name or row.finding,
                "method": asked.method,
                "cases": row.cases,
                "patients": row.patients,
            }
            line |= {key: round(getattr(row, key), 3) for key in ("share", "low", "high", "chance")}
            line |= {key: None for key in ("low", "high") if math.isnan(line[key])}
            mine = judged[(judged["finding"] == row.finding) & (judged["measure"] != "pointing")]
            line |= {
                f"{m}>{t:g}": round(s, 3)
                for m, t, s in mine[["measure", "threshold", "share"]].itertuples(index=False)
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main()
