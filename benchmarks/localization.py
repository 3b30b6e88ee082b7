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
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import ndimage

from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs, load_radiographs
from chexlib.data.splits import LISTS, read_list
from chexlib.errors import DataError
from chexlib.evaluation.explain import METHODS, heat_maps
from chexlib.evaluation.operating import share
from chexlib.findings import FINDINGS
from chexlib.models.weights import load_model

# At which Wang et al. 2017, section 4.2, cut maps of 0..255 to get boxes.
LEVELS = (60 / 255, 180 / 255)
IOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # their thresholds of intersection over union
IOBB = (0.1, 0.25, 0.5, 0.75, 0.9)  # and of intersection over the detected box
IMAGES = 256  # that are read at a time


def score_boxes(maps: np.ndarray, boxes: Sequence[np.ndarray]) -> pd.DataFrame:
    """Hold each map against the boxes of its finding.

    Parameters
    ----------
    maps : (n, size, size) in 0..1
    boxes : n arrays of (k, 4): x, y (upper left), width, height in fractions of the side

    Returns
    -------
    DataFrame
        n rows: hit (the hottest place lies in a box), chance (the share of the image that the boxes
        cover), and of the boxes around what is hotter than `LEVELS`: the best iou and iobb, and
        stray, how many touch no box.
    """
    return pd.DataFrame([_score(*pair) for pair in zip(maps, boxes, strict=True)])


def _score(heat: np.ndarray, boxes: np.ndarray) -> dict:
    """A row of `score_boxes`."""
    size = len(heat)
    x, y, width, height = (np.asarray(boxes, float).reshape(-1, 4) * size).T
    truth = np.stack([y, x, y + height, x + width], axis=1).clip(0, size)  # pixels
    inside = np.zeros((size, size), bool)
    for top, left, bottom, right in truth:
        inside |= _covered(top, bottom, size)[:, None] & _covered(left, right, size)
    spots = []
    for level in LEVELS:
        labelled, _ = ndimage.label(heat > level)
        for rows, columns in ndimage.find_objects(labelled):
            spots.append((rows.start, columns.start, rows.stop, columns.stop))
    spots = np.array(spots, float).reshape(-1, 4)
    corner = np.maximum(spots[:, None, :2], truth[None, :, :2])
    opposite = np.minimum(spots[:, None, 2:], truth[None, :, 2:])
    shared = (opposite - corner).clip(0).prod(-1)  # (spots, boxes), square pixels
    area = (spots[:, 2:] - spots[:, :2]).prod(-1)[:, None]
    union = area + (truth[:, 2:] - truth[:, :2]).prod(-1) - shared
    return {
        "hit": bool(heat.max() > 0 and inside.flat[heat.argmax()]),
        "chance": inside.mean(),
        "iou": float((shared / union).max(initial=0)),
        "iobb": float((shared / area).max(initial=0)),
        "stray": int((shared.sum(axis=1) == 0).sum()),
    }


def _covered(low: float, high: float, size: int) -> np.ndarray:
    """Which of a row of pixels have their middle in a span; of a span narrower than that, the pixel
    that it lies in.
    """
    middles = np.arange(size) + 0.5
    inside = (middles >= low) & (middles < high)
    return inside if inside.any() else np.arange(size) == int((low + high) / 2)


def localize(
    model, radiographs: Radiographs, *, method: str = "layer_cam", cells: int | None = None
) -> pd.DataFrame:
    """`score_boxes` of every image and finding that has boxes; columns image, patient, finding come
    first.

    Raises
    ------
    DataError
        None of the images has a box.
    """
    if radiographs.boxes.empty:
        raise DataError(
            f"no image in {radiographs.root} has a box. Use images that BBox_List_2017.csv names."
        )
    groups = list(radiographs.boxes.groupby(["image", "finding"], sort=False))
    boxes = [rows[["x", "y", "width", "height"]].to_numpy() for _, rows in groups]
    pairs = pd.DataFrame([key for key, _ in groups], columns=["image", "finding"])
    images = radiographs.table.set_index("image").loc[pairs["image"]]
    pairs.insert(1, "patient", images["patient"].to_numpy())
    store = ImageStore(images["path"].tolist(), size=model.input_shape[1])
    scored = []
    for start in range(0, len(pairs), IMAGES):
        rows = range(start, min(start + IMAGES, len(pairs)))
        pixels = store.take(rows)[..., None].astype(np.float32)
        findings = pairs["finding"].iloc[rows].tolist()
        maps = heat_maps(model, pixels, findings, method=method, cells=cells)
        scored.append(score_boxes(maps, boxes[start : start + IMAGES]))
    return pd.concat([pairs, pd.concat(scored, ignore_index=True)], axis=1)


def judge_boxes(scored: pd.DataFrame) -> pd.DataFrame:
    """What share of boxes is found, per finding and over all, with the interval of
    `operating.share` over patients.

    Parameters
    ----------
    scored : DataFrame of `localize`

    Returns
    -------
    DataFrame
        Columns finding ("all" last), measure ("pointing", "iou", "iobb"), threshold (NaN for
        pointing), share, low, high, chance (mean share of the image in boxes, for pointing), cases
        (image and finding) and patients. Below `FEWEST_PATIENTS` patients there is no interval.
    """
    thresholds = {"pointing": (np.nan,), "iou": IOU, "iobb": IOBB}
    codes, rows = pd.factorize(scored["patient"])[0], []
    with_boxes = [finding for finding in FINDINGS if finding in set(scored["finding"])]
    for finding in (*with_boxes, "all"):
        chosen = (scored["finding"] == finding).to_numpy() | (finding == "all")
        cases, patients = scored[chosen], codes[chosen]
        for measure, threshold in ((m, t) for m, each in thresholds.items() for t in each):
            right = cases["hit"] if measure == "pointing" else cases[measure] > threshold
            found, low, high = share(right.to_numpy(), patients)
            rows.append(
                {
                    "finding": finding,
                    "measure": measure,
                    "threshold": threshold,
                    "share": found,
                    "low": low,
                    "high": high,
                    "chance": cases["chance"].mean() if measure == "pointing" else np.nan,
                    "cases": len(cases),
                    "patients": len(np.unique(patients)),
                }
            )
    return pd.DataFrame(rows)


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
    model, _ = load_model(asked.weights)
    scored = localize(model, radiographs.select(wanted), method=asked.method, cells=asked.cells)
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
