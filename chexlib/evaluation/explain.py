"""Where the network looks: heat maps of one finding.

A map answers "which places raised this finding's score", not "where is the disease".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from chexlib.errors import ConfigError
from chexlib.findings import FINDINGS
from chexlib.models.predict import batch_of

# Methods, and the least cells a side of the layer that each looks at.
CELLS = {"layer_cam": 14, "grad_cam": 7}
METHODS = tuple(CELLS)


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
    model : keras.Model of `build_model` or `combine_models`
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
