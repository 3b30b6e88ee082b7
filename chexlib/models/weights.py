"""Weights in and out: one `.keras` file that carries its own card, loaded strictly and without running code.

The network is built by `build_model` from the card; of the rest of the file only the arrays are read. Keras' own
`config.json` in it, which can name functions and classes, is for other people's programs and is never looked at here.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np

from chexlib.errors import ChexlibError, WeightsError
from chexlib.files import replacing
from chexlib.findings import FINDINGS
from chexlib.models.topologies import NORMALIZATION, TOPOLOGIES, build_model

ENSEMBLE = "ensemble"  # the topology of several models in one
CARD = "chexlib.json"  # the member of the .keras archive that says what the weights are
LARGEST_CARD = 16 * 2**20  # bytes
LARGEST_SIZE = 1024  # px a side: that of the NIH release


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
    if path.name.endswith(".weights.h5"):
        _require(path)
    elif (name := read_card(path).get("topology")) != topology:
        raise _misfit(path, topology, f"they are of {name}" if name else "their card names no topology")
    model = build_model(topology, **settings)
    _fill(model, path, topology)
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


def read_card(path) -> dict:
    """What a `.keras` file that `save_model` wrote says of itself; no TensorFlow is needed.

    Raises
    ------
    WeightsError
        No such file, not a model of this project, or other findings; a size outside 32 to 1024 px.
    """
    path = Path(path)
    _require(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # Keras and save_model store members as they are, so that a small file cannot hold a large one.
            if packed := [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{packed[0]!r} in it is compressed")
            if (length := archive.getinfo(CARD).file_size) > LARGEST_CARD:
                raise ValueError(f"its card has {length:,} bytes")
            card = json.loads(archive.read(CARD))
        findings = card["findings"]
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError, RuntimeError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not a model written by chexlib ({_first_line(error)}). Name the model.keras of a run, "
            "for instance runs/latest/03_train_baseline/model.keras."
        ) from error
    if findings != list(FINDINGS):
        raise WeightsError(f"{path} predicts {findings!s:.300}; expected the 14 findings {list(FINDINGS)}.")
    if not isinstance(size := card.get("size"), int) or not 32 <= size <= LARGEST_SIZE:
        raise WeightsError(f"{path} is for images of {size!r:.80} px. Accepted: 32 to {LARGEST_SIZE}.")
    return card


def extend_card(path, **facts) -> dict:
    """Add facts to the card of a `.keras` file, or replace them, atomically; gives the new card.

    "calibration" and "operating_points" are where `python -m chexlib card` looks for those.
    """
    path = Path(path).resolve()
    card = {**read_card(path), **facts}
    with zipfile.ZipFile(path) as old, replacing(path) as file, zipfile.ZipFile(file, "w") as new:
        for item in old.infolist():
            if item.filename != CARD:
                with old.open(item) as source, new.open(item, "w") as copy:
                    shutil.copyfileobj(source, copy)
        new.writestr(CARD, json.dumps(card, indent=1))
    return card


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
        No such file, not a model of this project, other findings or another normalisation, or weights that do not fit
        every layer of the topology that the card names.
    """
    path, card = Path(path), read_card(path)
    model, topology = _build(path, card), card["topology"]
    if strange := _classes(_config(path)) - _classes(json.loads(model.to_json())):
        raise _misfit(path, topology, f"they are of a network with {', '.join(sorted(strange))}")
    _fill(model, path, topology)
    return model, card


def _build(path: Path, card: dict):
    """The network that a card describes, with the weights that it is drawn with."""
    topology, config = card.get("topology"), card.get("config") or {}
    if topology == ENSEMBLE:
        from chexlib.models.combine import combine_models

        members = [_build(path, {"size": card["size"], **member}) for member in card["members"]]
        return combine_models(members, how=card["how"], reference=np.zeros((len(members), 1, len(FINDINGS))))
    if topology not in TOPOLOGIES:
        raise WeightsError(f"{path} is of topology {topology!r:.80}. Accepted: {', '.join(TOPOLOGIES)}.")
    if card.get("normalization", NORMALIZATION[topology]) != NORMALIZATION[topology]:
        raise WeightsError(f"{path} is for another normalisation than {topology} has here. Use chexlib as it was then.")
    precision = config.get("precision", "float32")
    if precision not in ("float32", "mixed_bfloat16"):
        raise WeightsError(f"{path} is of precision {precision!r:.80}. Accepted: float32, mixed_bfloat16.")
    norm = {name: config[name] for name in ("norm", "ghost_size") if name in config}
    return build_model(topology, size=card["size"], precision=precision, **norm)


def _config(path: Path) -> dict:
    """Keras' description of the network in the file, as plain JSON."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{path} has no readable config.json ({_first_line(error)}). Copy it again.") from error


def _classes(config) -> set[str]:
    """Names of all classes in a description."""
    if isinstance(config, dict):
        own = {str(config["class_name"])} if "class_name" in config else set()
        return own.union(*map(_classes, config.values()))
    return set().union(*map(_classes, config)) if isinstance(config, list) else set()


def _fill(model, path: Path, topology: str) -> None:
    """Read every weight of `model` from a `.keras` or `.weights.h5` file: arrays only."""
    import h5py

    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            arrays = path
            if path.suffix == ".keras":  # inside the archive every step back would be read anew from its beginning
                with zipfile.ZipFile(path) as archive:
                    arrays = archive.extract("model.weights.h5", folder)
            model.load_weights(arrays)
            if left := [str(note.message) for note in told if "freshly-initialized" in str(note.message)]:
                raise ValueError(left[0])  # Keras only warns that weights stay as they were drawn
            found = []
            with h5py.File(arrays) as file:
                file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        if len(found) != len(model.weights):  # and passes over those of a layer that here has none
            raise ValueError(f"there are {len(found)} arrays, and {len(model.weights)} are needed")
    except Exception as error:  # h5py and Keras raise nearly anything
        raise _misfit(path, topology, _first_line(error)) from error


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
