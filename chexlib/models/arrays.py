"""Arrays of a Keras weights file into a model, each accounted for: read by name, nothing of the
file is run.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import WeightsError

COLUMNS = ["tensor", "layer", "weight", "shape", "fate"]  # of a report: shape is that in the file
HEAD = "findings"  # the layer whose outputs are the findings
CHANNELS = 2  # the axis of a kernel that is its input's


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a `.keras` or `.weights.h5` file by their names in it.

    Raises
    ------
    WeightsError
        An array lies outside the file, or all together say that they are larger than it is. Keras
        compresses none.
    """
    import h5py

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = path
        # Inside the archive every step back would be read anew from its beginning.
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                plain = archive.extract("model.weights.h5", folder)
        with h5py.File(plain) as file:
            file.visititems(
                lambda name, item: (
                    found.update({name: item}) if isinstance(item, h5py.Dataset) else None
                )
            )
            # HDF5 makes up what was never written, unpacks filters, and lets a thousand names share
            # the same bytes.
            size, needed = os.path.getsize(plain), sum(item.nbytes for item in found.values())
            if needed > size:
                raise WeightsError(
                    f"{path} has arrays of {needed:,} bytes in {size:,}. Save it again, "
                    "uncompressed."
                )
            if foreign := [
                name for name, x in found.items() if x.dtype.hasobject or x.is_virtual or x.external
            ]:
                raise WeightsError(
                    f"{path} keeps {foreign[0]} elsewhere than in an array. Save it again with "
                    "Keras."
                )
            return {name: item[()] for name, item in found.items()}


def fill_model(
    places: dict[str, tuple],
    arrays: dict[str, np.ndarray],
    *,
    unused: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> pd.DataFrame:
    """Give each weight of a model the array that Keras would; nothing is changed if one is left
    over or missing.

    Where a file's first kernel takes one grey channel and the model's takes three, a third of it
    goes to each.

    Parameters
    ----------
    places : the model's `layout`
    arrays : as `read_arrays` gives them
    unused : patterns of arrays, by their names in the file or the layers they are for, that may be
        left out
    missing : patterns of layers that keep the weights they have

    Returns
    -------
    DataFrame
        A row a weight of the model, and a row an array left out: tensor, layer, weight, shape,
        fate.

    Raises
    ------
    WeightsError
        An array that is missing, left over, or of another shape.
    """
    rows, values, wrong = [], [], []
    for name, (layer, weight, variable) in places.items():
        array = arrays.get(name)
        shape = None if array is None else array.shape
        if named(layer, missing):
            rows.append((name if array is not None else "", layer, weight, shape, "kept as it was"))
            continue
        fate, value = "loaded", array
        if (
            array is not None
            and array.ndim == 4
            and shape[CHANNELS] == 1
            and variable.shape[CHANNELS] == 3
        ):
            fate, value = (
                "loaded, grey spread over three channels",
                np.repeat(array / 3, 3, axis=CHANNELS),
            )
        if value is None or value.shape != tuple(variable.shape):
            found = "nothing" if array is None else str(shape)
            wrong.append(
                f"{layer}/{weight} needs {tuple(variable.shape)} and the file has {found} ({name})"
            )
        elif not np.isfinite(value).all():
            wrong.append(f"{layer}/{weight} is not finite ({name})")
        values.append((variable, value))
        rows.append((name, layer, weight, shape, fate))
    left = sorted(arrays.keys() - places.keys())
    wrong += [
        f"{name} of shape {arrays[name].shape} is left over"
        for name in left
        if not named(name, unused)
    ]
    if wrong:
        raise WeightsError(
            f"{wrong[0]}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; the file has "
            f"{len(arrays)} arrays and the model {len(places)} weights"
        )
    for variable, value in values:
        variable.assign(value.astype(np.float32))
    rows += [(name, "", "", arrays[name].shape, "left out") for name in left]
    return pd.DataFrame(rows, columns=COLUMNS)


def layout(model) -> dict[str, tuple[str, str, object]]:
    """Where Keras writes each weight of a model: name in the file -> (layer, weight, variable).

    Keras names arrays by their place in the network. It is asked: a model each of whose weights
    holds its own number is saved, and read back.
    """
    owners = {v.path: (layer.name, v.name) for layer in leaves(model) for v in layer.weights}
    before = model.get_weights()
    try:
        model.set_weights([np.full(w.shape, i, np.float32) for i, w in enumerate(before)])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "layout.weights.h5"
            model.save_weights(file)
            numbers = {name: int(array.flat[0]) for name, array in read_arrays(file).items()}
    finally:
        model.set_weights(before)
    variables = model.weights
    return {name: (*owners[variables[i].path], variables[i]) for name, i in numbers.items()}


def head_differs(places: dict[str, tuple], arrays: dict[str, np.ndarray]) -> bool:
    """Whether the file's head has another number of outputs, and takes the same features."""
    for name, (layer, weight, variable) in places.items():
        if (layer, weight) == (HEAD, "kernel") and name in arrays:
            shape = arrays[name].shape
            return (
                len(shape) == 2 and shape[0] == variable.shape[0] and shape[1] != variable.shape[1]
            )
    return False


def leaves(model):
    """The layers of a model and of the models inside it."""
    for layer in model.layers:
        yield from leaves(layer) if hasattr(layer, "layers") else [layer]


def named(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is of this name."""
    return any(fnmatch(name, pattern) for pattern in patterns)
