"""The study's three topologies with a head of 14 sigmoids: grey radiographs in, probabilities out.

A model takes grey pixels of 0 to 255, shape (batch, size, size, 1), and holds its own ImageNet normalisation, so
that training, prediction and other people's code cannot disagree about it.
"""

from __future__ import annotations

import random
import zlib

from chexlib.errors import ConfigError
from chexlib.findings import FINDINGS

TOPOLOGIES = ("densenet121", "resnet50", "vgg16")

# keras.applications.imagenet_utils: "torch" mode is (x / 255 - mean) / deviation in RGB, "caffe" mode x - mean in BGR.
_TORCH = {
    "scale": [1 / (255 * s) for s in (0.229, 0.224, 0.225)],
    "offset": [-m / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)],
}
_CAFFE = {"scale": [1.0, 1.0, 1.0], "offset": [-103.939, -116.779, -123.68]}
NORMALIZATION = {"densenet121": _TORCH, "resnet50": _CAFFE, "vgg16": _CAFFE}


def build_model(
    topology: str = "densenet121",
    *,
    size: int = 224,
    imagenet: bool = False,
    precision: str = "float32",
    momentum: float = 0.9,
    seed: int = 0,
):
    """Build one of `TOPOLOGIES` from keras.applications, with fused batch norm and 14 sigmoid outputs.

    Parameters
    ----------
    topology : {"densenet121", "resnet50", "vgg16"}
    size : int
        Side of the input in pixels, at least 32.
    imagenet : bool
        Start from Keras' ImageNet weights (downloaded by Keras, checksummed there).
    precision : {"float32", "mixed_bfloat16"}
        Type of the backbone's computations; weights, statistics and probabilities stay float32.
    momentum : float
        Of the moving statistics of batch norm. CheXNet's is 0.9 (PyTorch's default, there called 0.1);
        keras.applications' 0.99 trails far behind in a training of a few hundred steps.
    seed : int
        Seed of every initial weight that is drawn; no global generator is touched.

    Returns
    -------
    keras.Model
        float32 (batch, size, size, 1) in 0..255 -> float32 (batch, 14), in the order of `FINDINGS`.

    Raises
    ------
    ConfigError
        Unknown topology, or a size below 32.
    """
    if topology not in TOPOLOGIES:
        raise ConfigError(f"topology {topology!r} is not known. Use one of {', '.join(TOPOLOGIES)}.")
    if size < 32:
        raise ConfigError(f"size {size} is too small for {topology}. Use at least 32 pixels.")
    import keras

    from chexlib.models.convolution import Conv2D
    from chexlib.models.normalization import FusedBatchNormalization

    makers = {
        "densenet121": keras.applications.DenseNet121,
        "resnet50": keras.applications.ResNet50,
        "vgg16": keras.applications.VGG16,
    }
    weights = "imagenet" if imagenet else None
    state = random.getstate()  # Keras' initializers without a seed draw one from Python's generator
    stock = makers[topology](include_top=False, weights=weights, input_shape=(size, size, 3))
    random.setstate(state)

    def clone(layer):
        config = {**layer.get_config(), "dtype": precision}
        kind = type(layer)
        if kind is keras.layers.BatchNormalization:
            kind, config["momentum"] = FusedBatchNormalization, momentum
        if kind is keras.layers.Conv2D:
            kind = Conv2D
        if "kernel_initializer" in config:
            config["kernel_initializer"]["config"]["seed"] = _seed(seed, layer.name)
        return kind.from_config(config)

    backbone = keras.models.clone_model(stock, clone_function=clone)
    if imagenet:
        backbone.set_weights(stock.get_weights())
    grey = keras.Input((size, size, 1), name="radiograph")
    rgb = keras.layers.Concatenate(name="grey_to_rgb")([grey, grey, grey])
    rgb = keras.layers.Rescaling(**NORMALIZATION[topology], dtype="float32", name="imagenet_normalization")(rgb)
    features = keras.layers.GlobalAveragePooling2D(name="pool")(backbone(rgb))
    head = keras.layers.Dense(
        len(FINDINGS),
        activation="sigmoid",
        dtype="float32",
        kernel_initializer=keras.initializers.GlorotUniform(seed=_seed(seed, "findings")),
        name="findings",
    )
    return keras.Model(grey, head(features), name=topology)


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
