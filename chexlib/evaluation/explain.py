"""Where the network looks: heat maps of one finding, and how well they agree with boxes that
radiologists drew.

A map answers "which places raised this finding's score", not "where is the disease". The pointing
game (Zhang et al. 2016) asks whether its hottest place lies in the finding's box; beside it stands
the share of the image that the box covers, which a blind guess would hit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs
from chexlib.errors import ConfigError, DataError
from chexlib.evaluation.operating import share
from chexlib.findings import FINDINGS
from chexlib.models.predict import batch_of

# Methods, and the least cells a side of the layer that each looks at.
CELLS = {"layer_cam": 14, "grad_cam": 7}
METHODS = tuple(CELLS)
# At which Wang et al. 2017, section 4.2, cut maps of 0..255 to get boxes.
LEVELS = (60 / 255, 180 / 255)
IOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # their thresholds of intersection over union
IOBB = (0.1, 0.25, 0.5, 0.75, 0.9)  # and of intersection over the detected box
IMAGES = 256  # that are read at a time


def heat_maps(
    model,
    pixels: np.ndarray,
    findings: Sequence[str],
    *,
    method: str = "layer_cam",
    cells: int | None = None,
) -> np.ndarray:
    """A map for each image, of what raised the score of one finding in it.

    Of a layer's activations A and the gradient G of the finding's logit: "grad_cam" is the positive
    part of the channels' sum of A times the mean of G (Selvaraju et al. 2017), "layer_cam" of A
    times the positive part of G, place by place (Jiang et al. 2021), which earlier, finer layers
    need. Of an ensemble it is the mean of the members' maps.

    Parameters
    ----------
    model : keras.Model of `build_model` or `combine_models`, or the path of a `model.keras`
    pixels : (n, size, size, 1) float32 in 0..255
    findings : n of FINDINGS
    method : {"layer_cam", "grad_cam"}
    cells : int, optional
        The deepest layer with at least so many cells a side is looked at: of a 224-px network the
        last one has 7, of a 64-px one it has 2, which is too coarse to point anywhere. Default: 14
        for "layer_cam", 7 for "grad_cam".

    Returns
    -------
    (n, size, size) float32
        0 to 1, the hottest place 1; all 0 where nothing raised the score.

    Raises
    ------
    ConfigError
        Another method or finding, or more cells than the first layers have.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not known. Use one of {', '.join(METHODS)}.")
    if unknown := sorted(set(findings).difference(FINDINGS)):
        raise ConfigError(f"findings={unknown} are not known. Use {', '.join(FINDINGS)}.")
    from chexlib.models.weights import MEMBER

    model = _loaded(model)
    if members := [part for part in model.layers if part.name.startswith(MEMBER)]:
        each = [
            heat_maps(member, pixels, findings, method=method, cells=cells) for member in members
        ]
        return _up_to_one(np.mean(each, axis=0))
    size = model.input_shape[1]
    look, batch = _looker(model, method, CELLS[method] if cells is None else cells), batch_of(size)
    wanted = np.array([FINDINGS.index(finding) for finding in findings], np.int32)
    maps = [np.empty((0, size, size), np.float32)]
    for start in range(0, len(pixels), batch):
        rows = slice(start, start + batch)
        maps.append(_up_to_one(look(pixels[rows], wanted[rows]).numpy()))
    return np.concatenate(maps)


def _loaded(model):
    """The model itself, or that of a `model.keras`."""
    import keras

    from chexlib.models.weights import load_model

    return model if isinstance(model, keras.Model) else load_model(model)[0]


def _looker(model, method: str, cells: int):
    """A graph, which unlike eager code keeps no layer's output for longer than it needs: pixels,
    findings to maps.
    """
    import keras
    import tensorflow as tf

    size = model.input_shape[1]
    backbone = next(part for part in model.layers if isinstance(part, keras.Model))
    outputs = [_layer(backbone, cells).output, backbone.output]
    parts, head = keras.Model(backbone.inputs, outputs), model.get_layer("findings")
    to_rgb, normalize = (model.get_layer(n) for n in ("grey_to_rgb", "imagenet_normalization"))
    pool = model.get_layer("pool")
    of_channel = functools.partial(tf.reduce_mean, axis=(1, 2), keepdims=True)
    signature = [tf.TensorSpec((None, size, size, 1), tf.float32), tf.TensorSpec((None,), tf.int32)]

    @tf.function(input_signature=signature)
    def look(grey, wanted):
        channels = tf.gather(tf.convert_to_tensor(head.kernel), wanted, axis=1)  # (features, k)
        rgb = normalize(to_rgb([grey, grey, grey]))
        with tf.GradientTape() as tape:
            tape.watch(rgb)
            activations, features = parts(rgb, training=False)
            pooled = pool(tf.cast(features, "float32"))
            logits = tf.reduce_sum(pooled * tf.transpose(channels), 1)  # but for a constant
        weight = tf.cast(tape.gradient(logits, activations), "float32")
        weight = of_channel(weight) if method == "grad_cam" else tf.nn.relu(weight)
        heat = tf.reduce_sum(tf.cast(activations, "float32") * weight, -1, keepdims=True)
        return tf.image.resize(tf.nn.relu(heat), (size, size))[..., 0]

    return look


def _up_to_one(maps: np.ndarray) -> np.ndarray:
    return maps / np.maximum(maps.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)


def _layer(backbone, cells: int):
    """The last layer of the backbone that gives a map of at least so many cells a side."""
    for layer in reversed(backbone.layers[1:]):
        shape = layer.output.shape
        if len(shape) == 4 and shape[1] >= cells:
            return layer
    raise ConfigError(
        f"cells={cells} is more than {backbone.name} has at {backbone.input_shape[1]} px. Use "
        "fewer."
    )


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
    from scipy import ndimage

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
    model = _loaded(model)
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
