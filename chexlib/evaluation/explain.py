"""Where the network looks: heat maps of one finding, and how well they agree with boxes that
radiologists drew.

A map answers "which places raised this finding's score", not "where is the disease". The pointing
game (Zhang et al. 2016) asks whether its hottest place lies in the finding's box; beside it stands
the share of the image that the box covers, which a blind guess would hit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from chexlib.data.cache import ImageStore
from chexlib.data.nih import Radiographs
from chexlib.errors import ConfigError, DataError
from chexlib.evaluation.operating import share
from chexlib.findings import FINDINGS
from chexlib.models.predict import batch_of

METHODS = ("layer_cam", "grad_cam", "cam")
# Least cells a side of the layer that is looked at.
CELLS = {"layer_cam": 14, "grad_cam": 7, "cam": 0}
# At which Wang et al. 2017, section 4.2, cut maps of 0..255 to get boxes.
LEVELS = (60 / 255, 180 / 255)
IOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # their thresholds of intersection over union
IOBB = (0.1, 0.25, 0.5, 0.75, 0.9)  # and of intersection over the detected box


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
    need. "cam" is the positive part of the last features times the weights of the finding's output
    (Zhou et al. 2016). Of an ensemble it is the mean of the members' maps.

    Parameters
    ----------
    model : keras.Model of `build_model` or `combine_models`, or the path of a `model.keras`
    pixels : (n, size, size, 1) float32 in 0..255
    findings : n of FINDINGS
    method : {"layer_cam", "grad_cam", "cam"}
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
    import keras

    from chexlib.models.combine import MEMBER

    if not isinstance(model, keras.Model):
        from chexlib.models.weights import load_model

        model, _ = load_model(model)
    if members := [part for part in model.layers if part.name.startswith(MEMBER)]:
        each = [
            heat_maps(member, pixels, findings, method=method, cells=cells) for member in members
        ]
        return _up_to_one(np.mean(each, axis=0))
    size = model.input_shape[1]
    look, wanted = (
        _looker(model, method, cells),
        np.array([FINDINGS.index(finding) for finding in findings], np.int32),
    )
    maps, batch = [np.empty((0, size, size), np.float32)], batch_of(size)
    for start in range(0, len(pixels), batch):
        maps.append(
            _up_to_one(look(pixels[start : start + batch], wanted[start : start + batch]).numpy())
        )
    return np.concatenate(maps)


def _looker(model, method: str, cells: int | None):
    """A graph, which unlike eager code keeps no layer's output for longer than it needs: pixels,
    findings to maps.
    """
    import keras
    import tensorflow as tf

    size, backbone = (
        model.input_shape[1],
        next(part for part in model.layers if isinstance(part, keras.Model)),
    )
    layer = _layer(backbone, CELLS[method] if cells is None or method == "cam" else cells)
    parts, head = (
        keras.Model(backbone.inputs, [layer.output, backbone.output]),
        model.get_layer("findings"),
    )
    signature = [tf.TensorSpec((None, size, size, 1), tf.float32), tf.TensorSpec((None,), tf.int32)]

    @tf.function(input_signature=signature)
    def look(grey, wanted):
        channels = tf.gather(tf.convert_to_tensor(head.kernel), wanted, axis=1)  # (features, k)
        rgb = model.get_layer("imagenet_normalization")(
            model.get_layer("grey_to_rgb")([grey, grey, grey])
        )
        with tf.GradientTape() as tape:
            tape.watch(rgb)
            active, features = parts(rgb, training=False)
            pooled = model.get_layer("pool")(tf.cast(features, "float32"))
            logits = tf.reduce_sum(pooled * tf.transpose(channels), 1)  # but for a constant
        if method == "cam":
            found = tf.einsum("khwc,ck->khw", tf.cast(features, "float32"), channels)
        else:
            gradient = tf.cast(tape.gradient(logits, active), "float32")
            weight = (
                tf.reduce_mean(gradient, (1, 2), keepdims=True)
                if method == "grad_cam"
                else tf.nn.relu(gradient)
            )
            found = tf.reduce_sum(tf.cast(active, "float32") * weight, -1)
        return tf.image.resize(tf.nn.relu(found)[..., None], (size, size))[..., 0]

    return look


def _up_to_one(maps: np.ndarray) -> np.ndarray:
    return maps / np.maximum(maps.max((1, 2), keepdims=True), np.finfo(np.float32).tiny)


def _layer(backbone, cells: int):
    """The last layer of the backbone that gives a map of at least so many cells a side."""
    if not cells:
        return backbone.layers[-1]
    fine = [
        layer
        for layer in backbone.layers[1:]
        if len(layer.output.shape) == 4 and layer.output.shape[1] >= cells
    ]
    if not fine:
        raise ConfigError(
            f"cells={cells} is more than {backbone.name} has at {backbone.input_shape[1]} px. Use "
            "fewer."
        )
    return fine[-1]


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
    from scipy import ndimage

    rows = []
    for heat, given in zip(maps, boxes, strict=True):
        size = len(heat)
        edges = np.asarray(given, float).reshape(-1, 4) * size
        frames = np.c_[
            edges[:, 1], edges[:, 0], edges[:, 1] + edges[:, 3], edges[:, 0] + edges[:, 2]
        ].clip(0, size)
        inside = np.zeros((size, size), bool)
        for top, left, bottom, right in frames:
            inside |= _covered(top, bottom, size)[:, None] & _covered(left, right, size)
        spots = [
            spot
            for level in LEVELS
            for spot in ndimage.find_objects(ndimage.label(heat > level)[0])
        ]
        found = np.array([(y.start, x.start, y.stop, x.stop) for y, x in spots], float).reshape(
            -1, 4
        )
        low, high = (
            pick(found[:, None, k], frames[None, :, k])
            for pick, k in ((np.maximum, [0, 1]), (np.minimum, [2, 3]))
        )
        shared = (high - low).clip(0).prod(-1)  # (spots, boxes), square pixels
        area = (found[:, 2:] - found[:, :2]).prod(-1)[:, None]
        union = area + (frames[:, 2:] - frames[:, :2]).prod(-1) - shared
        hit = bool(heat.max() > 0 and inside.flat[heat.argmax()])
        best = [float((shared / over).max(initial=0)) for over in (union, area)]
        rows.append((hit, inside.mean(), *best, int((shared.sum(1) == 0).sum())))
    return pd.DataFrame(rows, columns=["hit", "chance", "iou", "iobb", "stray"])


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
    import keras

    if radiographs.boxes.empty:
        raise DataError(
            f"no image in {radiographs.root} has a box. Use images that BBox_List_2017.csv names."
        )
    if not isinstance(model, keras.Model):
        from chexlib.models.weights import load_model

        model, _ = load_model(model)
    table, scored = radiographs.table.set_index("image"), []
    groups = list(radiographs.boxes.groupby(["image", "finding"], sort=False))
    pairs = pd.DataFrame([key for key, _ in groups], columns=["image", "finding"])
    boxes = [rows[["x", "y", "width", "height"]].to_numpy() for _, rows in groups]
    store = ImageStore(table.loc[pairs["image"], "path"].tolist(), size=model.input_shape[1])
    for start in range(0, len(pairs), 256):
        rows = range(start, min(start + 256, len(pairs)))
        pixels = store.take(rows)[..., None].astype(np.float32)
        maps = heat_maps(
            model, pixels, pairs["finding"].iloc[rows].tolist(), method=method, cells=cells
        )
        scored.append(score_boxes(maps, boxes[start : start + 256]))
    pairs.insert(1, "patient", table.loc[pairs["image"], "patient"].to_numpy())
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
    kinds = [("pointing", np.nan), *(("iou", t) for t in IOU), *(("iobb", t) for t in IOBB)]
    right = [scored["hit"] if kind == "pointing" else scored[kind] > t for kind, t in kinds]
    codes, rows = pd.factorize(scored["patient"])[0], []
    for finding in (*(f for f in FINDINGS if f in set(scored["finding"])), "all"):
        mine = (
            np.ones(len(scored), bool)
            if finding == "all"
            else (scored["finding"] == finding).to_numpy()
        )
        cases = np.bincount(codes[mine])
        for (kind, threshold), found in zip(kinds, right, strict=True):
            hits = np.bincount(codes[mine], weights=found[mine], minlength=len(cases))
            chance = scored["chance"][mine].mean() if kind == "pointing" else np.nan
            rows.append(
                (
                    finding,
                    kind,
                    threshold,
                    *share(hits, cases),
                    chance,
                    mine.sum(),
                    (cases > 0).sum(),
                )
            )
    columns = [
        "finding",
        "measure",
        "threshold",
        "share",
        "low",
        "high",
        "chance",
        "cases",
        "patients",
    ]
    return pd.DataFrame(rows, columns=columns)
