"""Weights in and out: one `.keras` file that carries its own card, loaded strictly and without running code."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

from chexlib.errors import ChexlibError, WeightsError
from chexlib.files import replacing
from chexlib.findings import FINDINGS
from chexlib.models.topologies import build_model

CARD = "chexlib.json"  # the member of the .keras archive that says what the weights are


def create_model(
    topology: str,
    *,
    size: int,
    weights: str | None = None,
    seed: int = 0,
    **settings,
):
    """Build a topology and fill it from `weights`.

    Parameters
    ----------
    weights : None, "imagenet", or the path of a `.keras` or `.weights.h5` file
    settings
        Others of `build_model`: precision, norm, ghost_size, momentum. Weights with batch norm fill every norm that has
        statistics (batch, sync, ghost, frozen), and no other.

    Raises
    ------
    WeightsError
        The weights cannot be had, or do not fit every layer of the topology.
    """
    settings |= {"size": size, "seed": seed}
    if weights is None:
        return build_model(topology, **settings)
    if weights == "imagenet":
        try:
            return build_model(topology, imagenet=True, **settings)
        except ChexlibError:
            raise
        except Exception as error:  # Keras raises a bare Exception when its download fails
            raise WeightsError(
                f"the ImageNet weights of {topology} could not be downloaded ({_first_line(error)}). Connect to the "
                "internet once (Keras keeps them in ~/.keras/models), use weights=None, or name a file."
            ) from error
    path = Path(weights)
    model = build_model(topology, **settings)
    if path.name.endswith(".weights.h5"):
        _require(path)
        try:
            model.load_weights(path)
            found = _arrays_in(path)
        except Exception as error:
            raise _misfit(path, topology, _first_line(error)) from error
        if found != len(model.weights):  # Keras passes over the weights of a layer that here has none
            raise _misfit(path, topology, f"there are {found} arrays, and {len(model.weights)} are needed")
        return model
    source, card = load_model(path)
    name = card.get("topology", source.name)
    if name != topology:
        raise _misfit(path, topology, f"they are of {name}")
    try:
        model.set_weights(source.get_weights())
    except ValueError as error:
        raise _misfit(path, topology, _first_line(error)) from error
    return model


def save_model(model, path, *, card: dict) -> Path:
    """Write `model` and its card to one `.keras` file, atomically."""
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder, replacing(path) as file:
        draft = Path(folder) / "model.keras"  # Keras writes to a name with this ending only
        model.save(draft)
        with zipfile.ZipFile(draft, "a") as archive:
            archive.writestr(CARD, json.dumps({"findings": list(FINDINGS), **card}, indent=1))
        with open(draft, "rb") as whole:
            shutil.copyfileobj(whole, file)
    return path


def load_model(path):
    """Load a `.keras` file that `save_model` wrote.

    Returns
    -------
    model : keras.Model
    card : dict
        Topology, size, findings, split and origin of the weights.

    Raises
    ------
    WeightsError
        No such file, not a model of this project, other findings, or a file that would run code.
    """
    path = Path(path)
    _require(path)
    import keras

    import chexlib.models.combine  # register the layers that the file names
    import chexlib.models.convolution
    import chexlib.models.normalization  # noqa: F401

    try:
        with zipfile.ZipFile(path) as archive:
            card = json.loads(archive.read(CARD))
        findings = card["findings"]
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError) as error:
        raise WeightsError(
            f"{path} is not a model written by chexlib ({_first_line(error)}). Name the model.keras of a run, "
            "for instance runs/latest/03_train_baseline/model.keras."
        ) from error
    if findings != list(FINDINGS):
        raise WeightsError(f"{path} predicts {findings}; expected the 14 findings {list(FINDINGS)}.")
    return model, card


def _arrays_in(path: Path) -> int:
    import h5py

    found = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return len(found)


def _require(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(
            f"there is no weights file {path}. Accepted: a .keras or .weights.h5 file, 'imagenet', or none at all."
        )


def _misfit(path: Path, topology: str, why: str) -> WeightsError:
    return WeightsError(
        f"the weights in {path} do not fit {topology}: {why}. Choose the topology they were trained with."
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
