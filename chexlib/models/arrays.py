"""Read the arrays of a Keras weights file, and fill a model with them; no code of the file is run."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import WeightsError
from chexlib.files import scratch_folder
from chexlib.models.hdf5 import find_arrays, find_arrays_apart

COLUMNS = ["tensor", "layer", "weight", "shape", "fate"]  # of a report: shape is that in the file
HEAD = "findings"  # the layer whose outputs are the findings
CHANNELS = 2  # the axis of a kernel that is its input's


def read_arrays(path: Path, *, ours: bool = False) -> dict[str, np.ndarray]:
    """All arrays of a `.keras` or `.weights.h5` file by their names in it.

    HDF5 says where they lie, in a process of its own unless this process has written the file
    (`ours`); they are read without it.

    Raises
    ------
    WeightsError
        An array is packed or lies outside the file, or all together say that they are larger than
        it is. Keras packs none.
    """
    with scratch_folder(os.path.getsize(path) if path.suffix == ".keras" else 0) as folder:
        plain = path
        # Inside the archive every step back would be read anew from its beginning.
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                plain = archive.extract("model.weights.h5", folder)
        places = (find_arrays if ours else find_arrays_apart)(plain)
        for name, (kind, shape, offset) in places.items():
            empty = shape is not None and 0 in shape
            if np.dtype(kind).kind not in "biuf" or (offset is None and not empty):
                raise WeightsError(
                    f"{path} keeps {name!r:.200} otherwise than as plain numbers in the file. Save "
                    "it again with Keras, uncompressed."
                )
        # A thousand names may share the same bytes.
        size = os.path.getsize(plain)
        needed = sum(
            np.dtype(kind).itemsize * math.prod(shape) for kind, shape, _ in places.values()
        )
        if needed > size:
            raise WeightsError(
                f"{path} has arrays of {needed:,} bytes in {size:,}. Save it again with Keras."
            )
        arrays = {}
        with open(plain, "rb") as file:
            for name, (kind, shape, offset) in places.items():
                file.seek(offset or 0)
                array = np.fromfile(file, kind, math.prod(shape))
                arrays[name] = array.reshape(shape)
        return arrays


def fill_model(
    variables: dict[str, tuple],
    arrays: dict[str, np.ndarray],
    *,
    unused: Sequence[str] = (),
    keep_head: bool = False,
) -> pd.DataFrame:
    """Assign to each weight of a model its array of a Keras file, all of them or none.

    Where a file's first kernel takes one grey channel and the model's takes three, a third of it
    goes to each.

    Parameters
    ----------
    variables : the model's `layout`
    arrays : as `read_arrays` gives them
    unused : patterns of arrays, by their names in the file, that may be left out
    keep_head : bool
        Leave the head as it is.

    Returns
    -------
    DataFrame
        A row per weight of the model, and a row per array left out: tensor, layer, weight, shape,
        fate.

    Raises
    ------
    WeightsError
        An array that is missing, left over, not finite or of another shape. Nothing is changed.
    """
    rows, values, faults = [], [], []
    for name, (layer, weight, variable) in variables.items():
        value = arrays.get(name)
        shape = None if value is None else value.shape
        if layer == HEAD and keep_head:
            rows.append(("" if value is None else name, layer, weight, shape, "kept as it was"))
            continue
        fate = "loaded"
        if value is not None and _is_grey(value, variable):
            fate = "loaded, grey spread over three channels"
            value = np.repeat(value / 3, 3, axis=CHANNELS)
        needed = tuple(variable.shape)
        if value is None or value.shape != needed:
            given = "nothing" if value is None else str(shape)
            faults.append(f"{layer}/{weight} needs {needed} and the file has {given} ({name})")
        elif not np.isfinite(value).all():
            faults.append(f"{layer}/{weight} is not finite ({name})")
        values.append((variable, value))
        rows.append((name, layer, weight, shape, fate))
    for name in sorted(arrays.keys() - variables.keys()):
        rows.append((name, "", "", arrays[name].shape, "left out"))
        if not matches(name, unused):
            faults.append(f"{name} of shape {arrays[name].shape} is left over")
    if faults:
        others = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise WeightsError(
            f"{faults[0]}{others}; the file has {len(arrays)} arrays and the model "
            f"{len(variables)} weights"
        )
    for variable, value in values:
        variable.assign(value.astype(np.float32))
    return pd.DataFrame(rows, columns=COLUMNS)


def _is_grey(kernel: np.ndarray, variable) -> bool:
    """Whether a kernel is for one channel where the model's is for three."""
    return kernel.ndim == 4 and kernel.shape[CHANNELS] == 1 and variable.shape[CHANNELS] == 3


def room_for(model) -> int:
    """Bytes of a file that holds a model's weights, and no more than that many."""
    return 2**20 + sum(int(np.prod(weight.shape)) for weight in model.weights) * 5


def layout(model) -> dict[str, tuple[str, str, object]]:
    """Find where Keras writes each weight of a model: name in the file -> (layer, weight, variable).

    Keras names arrays by their place in the network. It is asked: a model each of whose weights
    holds its own number is saved, and read back.
    """
    owners = {v.path: (layer.name, v.name) for layer in leaves(model) for v in layer.weights}
    before = model.get_weights()
    try:
        model.set_weights([np.full(w.shape, i, np.float32) for i, w in enumerate(before)])
        with scratch_folder(room_for(model)) as folder:
            # In an archive, which Python writes: HDF5 crashes if its disk is full.
            file = Path(folder) / "layout.keras"
            model.save(file)
            arrays = read_arrays(file, ours=True)
    finally:
        model.set_weights(before)
    variables = {}
    for name, array in arrays.items():
        variable = model.weights[int(array.flat[0])]
        variables[name] = (*owners[variable.path], variable)
    return variables


def head_differs(variables: dict[str, tuple], arrays: dict[str, np.ndarray]) -> bool:
    """Whether the file's head has another number of outputs, and takes the same features."""
    for name, (layer, weight, variable) in variables.items():
        if (layer, weight) == (HEAD, "kernel") and name in arrays:
            features, outputs = variable.shape
            shape = arrays[name].shape
            return len(shape) == 2 and shape[0] == features and shape[1] != outputs
    return False


def leaves(model):
    """The layers of a model and of the models inside it."""
    for layer in model.layers:
        yield from leaves(layer) if hasattr(layer, "layers") else [layer]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns, such as `classifier.*`."""
    return any(fnmatch(name, pattern) for pattern in patterns)
