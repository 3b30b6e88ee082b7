"""The study's three topologies, and VGG-16 with batch norm, each with a head of 14 sigmoids: grey
radiographs in, probabilities out.

A model takes grey pixels of 0 to 255, shape (batch, size, size, 1), and holds its own ImageNet
normalisation, so that training, prediction and other people's code cannot disagree about it.
"""

from __future__ import annotations

import functools
import random
import re
import zlib

from chexlib.errors import ConfigError, WeightsError
from chexlib.findings import FINDINGS

TOPOLOGIES = ("densenet121", "resnet50", "vgg16", "vgg16_bn")
# Whose statistics normalise an image in training: those of its rank's batch, of all ranks' batches,
# of a virtual batch inside its rank's; of a group of its own channels; the moving ones; or
# nobody's, the layers being left out.
NORMS = ("batch", "sync", "ghost", "group", "frozen", "none")
WIDTHS = (0.25, 1.0)  # share of the published channels in every layer
SIZES = (32, 1024)  # px a side, least and largest; radiographs of the NIH release have the latter
STEMS = ("full", "small")  # the published one, for 224 px, or one for 32 px
GROUPS = 32  # of channels in group norm at width 1 (Wu and He 2018)

# keras.applications.imagenet_utils: "torch" mode is (x / 255 - mean) / deviation in RGB, "caffe"
# mode x - mean in BGR.
_TORCH = {
    "scale": [1 / (255 * s) for s in (0.229, 0.224, 0.225)],
    "offset": [-m / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)],
}
_CAFFE = {"scale": [1.0, 1.0, 1.0], "offset": [-103.939, -116.779, -123.68]}
NORMALIZATION = {
    "densenet121": _TORCH,
    "resnet50": _CAFFE,
    "vgg16": _CAFFE,
    "vgg16_bn": _CAFFE,
}


def build_model(
    topology: str = "densenet121",
    *,
    size: int = 224,
    width: float = 1.0,
    stem: str = "full",
    blocks: int = 0,
    imagenet: bool = False,
    precision: str = "float32",
    norm: str = "batch",
    ghost_size: int = 0,
    group_share: float = 0.0,
    momentum: float = 0.9,
    seed: int = 0,
):
    """Build one of `TOPOLOGIES` from keras.applications, with fused batch norm and 14 sigmoid
    outputs.

    Parameters
    ----------
    topology : one of `TOPOLOGIES`
        "vgg16_bn" is VGG-16 with batch norm between each convolution and its ReLU (13 layers), as
        torchvision has it.
    size : int
        Side of the input in pixels, within `SIZES`.
    width : one of `WIDTHS`
        Share of the published channels in every layer. Layers and places of batch norm stay the
        same.
    stem : one of `STEMS`
        "small", for images of 32 pixels: the first convolution has stride 1, so that the last stage
        keeps maps of 2 x 2, and the last gamma of each residual branch of ResNet-50 starts at 0
        (Goyal et al. 2017, section 5.1). VGG-16's first convolution has stride 1 already: nothing
        differs.
    blocks : int
        At most so many residual or dense blocks per stage, for tests of a mechanism; 0 means all.
        VGG-16 has none.
    imagenet : bool
        Start from Keras' ImageNet weights (downloaded by Keras, checksummed there).
    precision : {"float32", "mixed_bfloat16"}
        Type of the backbone's computations; weights, statistics and probabilities stay float32.
    norm : one of `NORMS`
        What is done where the published network has batch norm; VGG-16 has none, so for it nothing
        differs. "group": groups of channels, 32 at width 1 (Wu and He 2018). "none": nothing, and
        convolutions that had no bias of their own get one.
    ghost_size : int
        Images of a virtual batch, for norm="ghost".
    group_share : float
        Share of the layers of batch norm, spread evenly, that are group norm instead.
    momentum : float
        Of the moving statistics of batch norm. CheXNet's is 0.9 (PyTorch's default, there called
        0.1); keras.applications' 0.99 trails far behind in a training of a few hundred steps.
    seed : int
        Seed of every initial weight that is drawn; no global generator is touched.

    Returns
    -------
    keras.Model
        float32 (batch, size, size, 1) in 0..255 -> float32 (batch, 14), in the order of `FINDINGS`.

    Raises
    ------
    ConfigError
        Unknown topology, width, stem or norm, a size out of bounds, or a negative number of blocks.
    WeightsError
        ImageNet weights are asked for with another width, stem or number of blocks than the
        published ones, or with a norm that cannot use those of batch norm.
    """
    if topology not in TOPOLOGIES:
        raise ConfigError(
            f"topology={topology!r} is not accepted. Use one of {', '.join(TOPOLOGIES)}."
        )
    if not SIZES[0] <= size <= SIZES[1]:
        raise ConfigError(f"size={size} is not accepted. Use {SIZES[0]} to {SIZES[1]} pixels.")
    if width not in WIDTHS or stem not in STEMS:
        raise ConfigError(
            f"width={width!r} with stem={stem!r} is not accepted. Use a width of "
            f"{' or '.join(map(str, WIDTHS))}, and a stem of {' or '.join(STEMS)}."
        )
    if blocks < 0:
        raise ConfigError(f"blocks={blocks} is not accepted. Use 1 or more, or 0 for all blocks.")
    import keras

    from chexlib.models.layers import STATISTICS, Conv2D, FusedBatchNormalization

    if norm not in NORMS or (norm == "ghost") != (ghost_size > 0):
        raise ConfigError(
            f"norm={norm!r} with ghost_size={ghost_size} is not accepted. Use one of "
            f"{', '.join(NORMS)}, and a ghost_size of 1 or more with ghost alone."
        )
    if not 0 <= group_share <= 1 or (group_share and norm not in STATISTICS):
        raise ConfigError(
            f"group_share={group_share!r} with norm={norm!r} is not accepted. Use a share from 0 to "
            f"1, and one above 0 with {', '.join(STATISTICS)} alone."
        )
    other = (width, stem, blocks, group_share) != (1, "full", 0, 0) or topology == "vgg16_bn"
    if imagenet and other:
        raise WeightsError(
            f"the ImageNet weights of Keras are of the published networks, and do not fit "
            f"{topology} with width={width!r}, stem={stem!r}, blocks={blocks}, "
            f"group_share={group_share!r}. Use width=1, stem='full', blocks=0, group_share=0 and a "
            "topology without batch norm of its own, or random weights."
        )
    if imagenet and norm not in STATISTICS and topology != "vgg16":
        raise WeightsError(
            f"the ImageNet weights of {topology} were trained with batch norm, and mean nothing "
            f"with norm={norm!r}. Use norm={STATISTICS[0]!r}, "
            f"{', '.join(map(repr, STATISTICS[1:]))}, or random weights."
        )

    stock = _published(topology, size, "imagenet") if imagenet else _outline(topology, size)

    adds_norm = topology == "vgg16_bn"
    normalised = keras.layers.Conv2D if adds_norm else keras.layers.BatchNormalization
    names = [layer.name for layer in stock.layers if type(layer) is normalised]
    by_group = {
        name
        for place, name in enumerate(names)
        if norm == "group" or int((place + 1) * group_share) > int(place * group_share)
    }

    def norm_layer(config: dict, *, place: str):
        """What stands where the network has batch norm of this Keras config."""
        if norm == "none":
            return keras.layers.Identity(name=config["name"], dtype=precision)
        if stem == "small" and re.fullmatch(r"conv\d_block\d_3_bn", config["name"]):
            config["gamma_initializer"] = "zeros"
        if place in by_group:
            kept = ("name", "dtype", "epsilon", "gamma_initializer")
            config = {name: config[name] for name in kept} | {"groups": int(GROUPS * width)}
            return keras.layers.GroupNormalization.from_config(config)
        config |= {"momentum": momentum, "statistics": norm, "ghost_size": ghost_size}
        return FusedBatchNormalization.from_config(config)

    def clone(layer):
        config = {**layer.get_config(), "dtype": precision}
        kind = type(layer)
        if kind is keras.layers.BatchNormalization:
            return norm_layer(config, place=layer.name)
        if kind is keras.layers.Conv2D:
            kind = Conv2D
            config["use_bias"] |= norm == "none"
            config["activation"] = "linear" if adds_norm else config["activation"]
            config["filters"] = int(width * layer.filters)
            if stem == "small" and layer.name == "conv1_conv":
                config["strides"] = 1
        if "kernel_initializer" in config:
            config["kernel_initializer"]["config"]["seed"] = _seed(seed, layer.name)
        return kind.from_config(config)

    def call(layer, *tensors, **settings):
        settings.pop("mask", None)  # batch norm's, which what takes its place does not know
        place = re.match(r"conv\d_block(\d+)_", layer.name)
        # The layers of a block left out hand on what they are given.
        if place and 0 < blocks < int(place[1]):
            return keras.tree.flatten(tensors)[0]
        outputs = layer(*tensors, **settings)
        if adds_norm and isinstance(layer, Conv2D):
            config = keras.layers.BatchNormalization(name=f"{layer.name}_bn").get_config()
            outputs = norm_layer({**config, "dtype": precision}, place=layer.name)(outputs)
            outputs = keras.layers.ReLU(name=f"{layer.name}_relu", dtype=precision)(outputs)
        return outputs

    backbone = keras.models.clone_model(stock, clone_function=clone, call_function=call)
    if imagenet:
        backbone.set_weights(stock.get_weights())
    grey = keras.Input((size, size, 1), name="radiograph")
    rgb = keras.layers.Concatenate(name="grey_to_rgb")([grey, grey, grey])
    rgb = keras.layers.Rescaling(
        **NORMALIZATION[topology], dtype="float32", name="imagenet_normalization"
    )(rgb)
    features = keras.layers.GlobalAveragePooling2D(name="pool")(backbone(rgb))
    head = keras.layers.Dense(
        len(FINDINGS),
        activation="sigmoid",
        dtype="float32",
        kernel_initializer=keras.initializers.GlorotUniform(seed=_seed(seed, "findings")),
        name="findings",
    )
    model = keras.Model(grey, head(features), name=topology)
    model.stem = stem  # no shape of a weight tells it
    return model


def _published(topology: str, size: int, weights: str | None):
    """The network of keras.applications, without its head; no global generator is touched."""
    import keras

    makers = {
        "densenet121": keras.applications.DenseNet121,
        "resnet50": keras.applications.ResNet50,
        "vgg16": keras.applications.VGG16,
        "vgg16_bn": keras.applications.VGG16,  # to which batch norm is added
    }
    state = random.getstate()  # Keras' initializers without a seed draw one from Python's generator
    try:
        return makers[topology](include_top=False, weights=weights, input_shape=(size, size, 3))
    finally:
        random.setstate(state)


@functools.lru_cache(maxsize=1)
def _outline(topology: str, size: int):
    """The layers that `build_model` copies, kept for the next model: half of the seconds of a
    build.
    """
    return _published(topology, size, None)


def redraw(model, seed: int) -> None:
    """Give every kernel the values that `build_model` with another `seed` would have given it."""
    for layer in model._flatten_layers(include_self=False):
        if hasattr(layer, "kernel_initializer"):
            maker = layer.kernel_initializer
            again = type(maker).from_config({**maker.get_config(), "seed": _seed(seed, layer.name)})
            layer.kernel.assign(again(layer.kernel.shape))


def stages_above(model) -> list[int]:
    """For each trainable variable of `build_model`, how many stages follow its own: 0 for the head,
    5 for the stem.

    A stage is what works at one resolution, as Keras numbers its layers: conv1_conv,
    conv2_block3_1_conv, pool2_conv.
    """
    places = [re.match(r"(?:conv|block|pool)(\d)", v.path) for v in model.trainable_variables]
    heads = [v.path.startswith("findings/") for v in model.trainable_variables]
    return [
        0 if head else 6 - int(found[1]) if found else 1
        for head, found in zip(heads, places, strict=True)
    ]


def _seed(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
