"""Public CheXNet weights, PyTorch state dicts of a torchvision DenseNet-121 saved as safetensors,
into our network.

Known are the names of 2017 (`module.densenet121.features.denseblock1.denselayer1.norm.1.weight`,
`module.densenet121.classifier.0.weight`), those of torchvision today
(`features.denseblock1.denselayer1.norm1.weight`, `classifier.weight`), and torchxrayvision's
network, which takes one grey channel from -1024 to 1024 and has 18 outputs. A `.pth` is a pickle,
which can run code when it is read: it is turned into safetensors once, where PyTorch is.

torchvision's ResNet-50 and VGG-16 are refused: its ResNet-50 strides in the 3 x 3 convolution of a
block, Keras' in the 1 x 1 before it, and its VGG-16 has hidden dense layers and another
normalisation. They would load and mean nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import WeightsError
from chexlib.findings import ALIASES, FINDINGS
from chexlib.models.arrays import COLUMNS, leaves, named

# Outputs of torchxrayvision's DenseNets, its `default_pathologies`: give them as `findings`.
TORCHXRAYVISION = (
    "Atelectasis",
    "Consolidation",
    "Infiltration",
    "Pneumothorax",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Effusion",
    "Pneumonia",
    "Pleural_Thickening",
    "Cardiomegaly",
    "Nodule",
    "Mass",
    "Hernia",
    "Lung Lesion",
    "Fracture",
    "Lung Opacity",
    "Enlarged Cardiomediastinum",
)
BLOCKS = (6, 12, 24, 16)  # dense layers in each block of DenseNet-121
EPSILON = 1e-5  # of torchvision's batch norm; Keras' DenseNet has 1.001e-5
BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
COUNTER = "*.num_batches_tracked"  # steps of PyTorch's batch norm, which no output depends on
TO_SAFETENSORS = (
    'python -c \'import torch, safetensors.torch as s; w = torch.load("weights.pth", '
    'map_location="cpu"); '
    's.save_file({k: v.contiguous() for k, v in w.get("state_dict", w).items()}, '
    '"weights.safetensors")\''
)


def load_torch_weights(
    model,
    path: str | Path,
    *,
    findings: Sequence[str] | None = None,
    unused: Sequence[str] = (),
    missing=(),
) -> pd.DataFrame:
    """Fill a DenseNet-121 of `build_model` from a PyTorch state dict, so that it gives the same
    probabilities.

    Every tensor of the file and every weight of the model is accounted for; nothing is changed if
    that fails.

    Parameters
    ----------
    model : keras.Model
        float32 (batch, size, size, 1) in 0..255 -> (batch, 14), of any size.
    path : path
        A `.safetensors` file.
    findings : sequence of str, optional
        What the file's outputs are, in its order. Default: the JSON list `findings` in the file's
        metadata, else CheXNet's order, which is that of `FINDINGS`.
    unused : sequence of str
        Tensors and outputs of the file that may be left out, as patterns: `op_threshs`, `Fracture`,
        `classifier.*`.
    missing : sequence of str
        Layers of the model that may keep the weights they have, as patterns: `findings` is the
        head.

    Returns
    -------
    DataFrame
        A row for each weight of the model and for each tensor or output left over: tensor (its name
        in torchvision), layer, weight, shape in the file, fate.

    Raises
    ------
    WeightsError
        No safetensors file, or a tensor or output that is left over, missing, not finite or of
        another shape.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    plan = {(layer, weight): tensor for layer, weight, tensor in _plan()}
    weights = {
        (layer.name, weight.name): weight for layer in leaves(model) for weight in layer.weights
    }
    if weights.keys() != plan.keys():
        raise WeightsError(
            f"{path}: {model.name} is not the DenseNet-121 that such weights are for. Use "
            "densenet121."
        )
    kept = {key for key in plan if named(key[0], missing)}
    wanted = {key: tensor for key, tensor in plan.items() if key not in kept}
    if lacking := sorted(set(wanted.values()) - tensors.keys()):
        layer = next(layer for (layer, _), tensor in wanted.items() if tensor == lacking[0])
        raise WeightsError(
            f"{path} lacks {len(lacking)} tensors of a DenseNet-121, first {lacking[0]!r}, which "
            f"fills {layer!r}. Name a whole state dict, or leave such layers as they are: "
            f"missing=[{layer!r}, ...]."
        )
    outputs = (
        []
        if ("findings", "kernel") in kept
        else _outputs(tensors["classifier.weight"], findings, metadata, path)
    )
    left = sorted(tensors.keys() - wanted.values()) + [
        name for name in outputs if name not in FINDINGS
    ]
    if refused := [name for name in left if not named(name, (*unused, COUNTER))]:
        raise WeightsError(
            f"{path} has {len(refused)} tensors or outputs that this model does not, first "
            f"{refused[0]!r}. If they may be left out, name them: unused=[{refused[0]!r}, ...]."
        )
    values = {key: _convert(key, tensor, tensors, model, outputs) for key, tensor in wanted.items()}
    for key, value in values.items():
        if value.shape != tuple(weights[key].shape) or not np.isfinite(value).all():
            raise WeightsError(
                f"{path}: {wanted[key]!r} of shape {tensors[wanted[key]].shape} does not fit "
                f"{'/'.join(key)} of shape {tuple(weights[key].shape)}, or is not finite. Name a "
                "state dict of torchvision's DenseNet-121."
            )
    for key, value in values.items():
        weights[key].assign(value.astype(np.float32))
    rows = [(tensor, *key, tensors[tensor].shape, "loaded") for key, tensor in wanted.items()]
    rows += [("", *key, (), "kept as it was") for key in plan if key in kept]
    rows += [
        (name, "", "", tensors[name].shape if name in tensors else (), "left out") for name in left
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _plan() -> Iterator[tuple[str, str, str]]:
    """(layer, weight, tensor) of the whole network: names in Keras and in torchvision."""
    # (Keras' stem, convolution, batch norm).
    modules = [("conv1", "features.conv0", "features.norm0")]
    for b, count in enumerate(BLOCKS, start=1):
        for i in range(1, count + 1):
            ours, theirs = f"conv{b + 1}_block{i}", f"features.denseblock{b}.denselayer{i}"
            modules += [
                (f"{ours}_0", "", f"{theirs}.norm1"),
                (f"{ours}_1", f"{theirs}.conv1", f"{theirs}.norm2"),
            ]
            modules += [(f"{ours}_2", f"{theirs}.conv2", "")]
        if b < len(BLOCKS):
            modules += [
                (f"pool{b + 1}", f"features.transition{b}.conv", f"features.transition{b}.norm")
            ]
    for ours, convolution, norm in [*modules, ("", "", "features.norm5")]:
        if convolution:
            yield f"{ours}_conv", "kernel", f"{convolution}.weight"
        if norm:
            yield from (
                (f"{ours}_bn".lstrip("_"), mine, f"{norm}.{their}")
                for mine, their in BATCH_NORM.items()
            )
    yield "findings", "kernel", "classifier.weight"
    yield "findings", "bias", "classifier.bias"


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by their names in today's torchvision, and the file's metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            found = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file ({error}). A PyTorch file becomes one, "
            f"where PyTorch is, by {TO_SAFETENSORS}."
        ) from error
    stem = next((name for name in found if name.endswith("features.conv0.weight")), None)
    if stem is None:
        raise WeightsError(
            f"{path} is not of a torchvision DenseNet-121: none of its {len(found)} tensors is "
            f"named features.conv0.weight (first {next(iter(found), 'none')!r}). Other topologies "
            "are not converted."
        )
    prefix, tensors = stem.removesuffix("features.conv0.weight"), {}
    for name, tensor in found.items():
        plain = re.sub(r"\b(norm|conv)\.([12])\.", r"\1\2.", name.removeprefix(prefix))
        plain = re.sub(r"^classifier\.0\.", "classifier.", plain)
        if plain in tensors:
            raise WeightsError(f"{path} has {plain} twice, once as {name}. Remove one of the two.")
        tensors[plain] = tensor
    return tensors, metadata


def _outputs(kernel, findings, metadata, path) -> list[str]:
    """What each row of the classifier stands for, in the names of FINDINGS."""
    if findings is None:
        try:
            findings = json.loads(metadata["findings"]) if "findings" in metadata else FINDINGS
        except ValueError as error:
            raise WeightsError(
                f"{path}: its metadata 'findings' is no JSON ({error}). Give findings=[...]."
            ) from error
    names = [ALIASES.get(name, name) for name in findings]
    if len(names) != len(kernel):
        raise WeightsError(
            f"{path} has {len(kernel)} outputs, and {len(names)} names were given for them. Say "
            "what they are, in the file's order, with findings=[...], or keep a fresh head: "
            "missing=['findings'], unused=['classifier.*']."
        )
    if wrong := [name for name in FINDINGS if names.count(name) != 1]:
        raise WeightsError(
            f"{path}: {wrong[0]!r} is {names.count(wrong[0])} times among its outputs {names}; "
            "each of the 14 findings is needed once. Correct findings=[...]."
        )
    return names


def _convert(key, name, tensors, model, outputs) -> np.ndarray:
    """The value of one weight of ours, float64."""
    layer, weight = key
    value = tensors[name].astype(np.float64)
    if layer == "findings":
        order = [outputs.index(finding) for finding in FINDINGS]
        return value[order].T if len(value) == len(outputs) else value[:0]
    if weight == "gamma":  # so that a gain over the deviation is the same with Keras' epsilon
        variance = tensors[name.removesuffix("weight") + "running_var"].astype(np.float64)
        ours = next(leaf.epsilon for leaf in leaves(model) if leaf.name == layer)
        return (
            value * np.sqrt((variance + ours) / (variance + EPSILON))
            if variance.shape == value.shape
            else variance
        )
    if weight != "kernel":
        return value
    if layer == "conv1_conv" and value.shape[1:2] == (1,):
        value = value * _grey(model)[:, None, None]
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def _grey(model) -> np.ndarray:
    """Weights of our three normalised channels whose sum is torchxrayvision's grey, 2048 x / 255 -
    1024.
    """
    normal = model.get_layer("imagenet_normalization")
    return np.linalg.lstsq(
        np.array([normal.scale, normal.offset]), np.array([2048 / 255, -1024.0]), rcond=None
    )[0]
