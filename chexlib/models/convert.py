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

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import WeightsError
from chexlib.findings import ALIASES, FINDINGS
from chexlib.models.arrays import COLUMNS, HEAD, leaves, matches

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
# Keras 3 reads such a file layer by layer into a network of keras.applications, whose weights have
# the order of ours.
FROM_KERAS_2 = (
    "python -c 'import keras; from chexlib.models.topologies import build_model; "
    "old = keras.applications.DenseNet121(weights=None, classes=14); "
    'old.load_weights("weights.h5"); new = build_model("densenet121"); '
    'new.set_weights(old.get_weights()); new.save_weights("new.weights.h5")\''
)
PICKLES = (".pt", ".pth", ".tar", ".pkl", ".bin", ".ckpt")  # as PyTorch's files are called


def require_readable(path: Path) -> None:
    """Refuse the weights formats of others that are not read, with the command that converts them.

    Raises
    ------
    WeightsError
        A pickle of PyTorch, or a file of Keras 2.
    """
    import h5py

    is_pickle = path.suffix in PICKLES
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            is_pickle |= any(name.endswith("/data.pkl") for name in archive.namelist())
    if is_pickle:
        raise WeightsError(
            f"{path} is a pickle of PyTorch. It could run code, so it is not read. Convert it on a "
            f"machine with PyTorch: {TO_SAFETENSORS}."
        )
    with contextlib.suppress(OSError), h5py.File(path) as file:
        if "layer_names" in file.attrs or "model_weights" in file:
            raise WeightsError(
                f"{path} is a file of Keras 2, whose format is not read. Convert it, if it is of a "
                f"DenseNet-121 with our 14 outputs: {FROM_KERAS_2}."
            )


def load_torch_weights(
    model,
    path: str | Path,
    *,
    findings: Sequence[str] | None = None,
    unused: Sequence[str] = (),
    keep_head: bool = False,
) -> pd.DataFrame:
    """Fill a DenseNet-121 from a PyTorch state dict: the model gives the same probabilities.

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
        Tensors and outputs of the file that may be left out, as patterns: `op_threshs`, `Fracture`.
    keep_head : bool
        Leave the model's head as it is, and the file's out.

    Returns
    -------
    DataFrame
        A row per weight of the model and per tensor or output left out: tensor (its name in
        torchvision), layer, weight, shape in the file, fate.

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
    kept = [key for key in plan if keep_head and key[0] == HEAD]
    wanted = {key: tensor for key, tensor in plan.items() if key not in kept}
    if lacking := sorted(set(wanted.values()) - tensors.keys()):
        raise WeightsError(
            f"{path} lacks {len(lacking)} tensors of a DenseNet-121, first {lacking[0]!r}. Name a "
            "file with a whole state dict."
        )
    outputs = []
    if keep_head:
        unused = (*unused, "classifier.*")
    else:
        outputs = _outputs(tensors["classifier.weight"], findings, metadata, path)
    left = sorted(tensors.keys() - wanted.values())
    left += [name for name in outputs if name not in FINDINGS]
    if refused := [name for name in left if not matches(name, (*unused, COUNTER))]:
        raise WeightsError(
            f"{path} has {len(refused)} tensors or outputs that this model does not, first "
            f"{refused[0]!r}. Remove them from the file, or fill a model in Python by "
            f"`load_torch_weights` with unused=[{refused[0]!r}, ...]."
        )
    values = {key: _convert(key, tensor, tensors, model, outputs) for key, tensor in wanted.items()}
    for key, value in values.items():
        needed = tuple(weights[key].shape)
        if value.shape != needed or not np.isfinite(value).all():
            raise WeightsError(
                f"{path}: {wanted[key]!r} of shape {tensors[wanted[key]].shape} does not fit "
                f"{'/'.join(key)} of shape {needed}, or is not finite. Name a state dict of "
                "torchvision's DenseNet-121."
            )
    for key, value in values.items():
        weights[key].assign(value.astype(np.float32))
    rows = [(tensor, *key, tensors[tensor].shape, "loaded") for key, tensor in wanted.items()]
    rows += [("", *key, (), "kept as it was") for key in kept]
    for name in left:
        shape = tensors[name].shape if name in tensors else ()
        rows.append((name, "", "", shape, "left out"))
    return pd.DataFrame(rows, columns=COLUMNS)


def _plan() -> Iterator[tuple[str, str, str]]:
    """(layer, weight, tensor) of the whole network: names in Keras and in torchvision."""
    # (name in Keras, convolution and batch norm in torchvision)
    modules = [("conv1", "features.conv0", "features.norm0")]
    for b, count in enumerate(BLOCKS, start=1):
        for i in range(1, count + 1):
            keras, torch = f"conv{b + 1}_block{i}", f"features.denseblock{b}.denselayer{i}"
            modules.append((f"{keras}_0", "", f"{torch}.norm1"))
            modules.append((f"{keras}_1", f"{torch}.conv1", f"{torch}.norm2"))
            modules.append((f"{keras}_2", f"{torch}.conv2", ""))
        if b < len(BLOCKS):
            transition = f"features.transition{b}"
            modules.append((f"pool{b + 1}", f"{transition}.conv", f"{transition}.norm"))
    modules.append(("", "", "features.norm5"))
    for keras, convolution, norm in modules:
        if convolution:
            yield f"{keras}_conv", "kernel", f"{convolution}.weight"
        if norm:
            layer = f"{keras}_bn".lstrip("_")
            for weight, tensor in BATCH_NORM.items():
                yield layer, weight, f"{norm}.{tensor}"
    yield HEAD, "kernel", "classifier.weight"
    yield HEAD, "bias", "classifier.bias"


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by their names in today's torchvision, and the file's metadata."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            stored = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except Exception as error:  # a damaged file makes safetensors raise nearly anything
        raise WeightsError(
            f"{path} cannot be read as a safetensors file ({error}). Convert a PyTorch file into one on "
            f"a machine with PyTorch: {TO_SAFETENSORS}."
        ) from error
    stem = next((name for name in stored if name.endswith("features.conv0.weight")), None)
    if stem is None:
        raise WeightsError(
            f"{path} is not of a torchvision DenseNet-121: none of its {len(stored)} tensors is "
            f"named features.conv0.weight (first {next(iter(stored), 'none')!r}). Other topologies "
            "are not converted."
        )
    prefix, tensors = stem.removesuffix("features.conv0.weight"), {}
    for name, tensor in stored.items():
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
                f"{path}: its metadata 'findings' is not JSON ({error}). Write a JSON list of names there."
            ) from error
    if not isinstance(findings, list | tuple) or not all(
        isinstance(name, str) for name in findings
    ):
        raise WeightsError(
            f"{path}: its findings are {findings!r:.80}, no list of names. Write a JSON list "
            "`findings` in its metadata."
        )
    names = [ALIASES.get(name, name) for name in findings]
    count = kernel.shape[0] if kernel.ndim == 2 else 0
    if len(names) != count:
        raise WeightsError(
            f"{path} has {count} outputs, and {len(names)} names were given for them. Say "
            "what they are, in the file's order, by a JSON list `findings` in its metadata, or "
            "train with a new head: fresh_head=true."
        )
    if wrong := [name for name in FINDINGS if names.count(name) != 1]:
        raise WeightsError(
            f"{path}: {wrong[0]!r} is {names.count(wrong[0])} times among its outputs {names}; "
            "each of the 14 findings is needed once. Correct these names."
        )
    return names


def _convert(key, name, tensors, model, outputs) -> np.ndarray:
    """The value of one weight of the model, float64."""
    layer, weight = key
    value = tensors[name].astype(np.float64)
    if layer == HEAD:
        order = [outputs.index(finding) for finding in FINDINGS]
        return value[order].T if value.shape[:1] == (len(outputs),) else value.reshape(-1)[:0]
    if weight == "gamma":
        variance = tensors[name.removesuffix("weight") + "running_var"].astype(np.float64)
        if variance.shape != value.shape:
            return variance  # refused by its shape
        # So that gamma over the deviation is the same with Keras' epsilon.
        epsilon = next(leaf.epsilon for leaf in leaves(model) if leaf.name == layer)
        return value * np.sqrt((variance + epsilon) / (variance + EPSILON))
    if weight != "kernel" or value.ndim != 4:
        return value  # of another shape, it is refused
    if layer == "conv1_conv" and value.shape[1] == 1:
        value = value * _grey(model)[:, None, None]
    return value.transpose(2, 3, 1, 0)


def _grey(model) -> np.ndarray:
    """Weights of the model's three normalised channels that sum to torchxrayvision's grey.

    That is 2048 x / 255 - 1024 of a pixel x in 0..255.
    """
    normal = model.get_layer("imagenet_normalization")
    channels = np.array([normal.scale, normal.offset])
    return np.linalg.lstsq(channels, np.array([2048 / 255, -1024.0]), rcond=None)[0]
