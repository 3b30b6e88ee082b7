"""Weights in and out: one `.keras` file that carries its own card, loaded strictly and without
running code.

The network is built by `build_model` from the card; of the rest of the file only the arrays are
read. Keras' own `config.json` in it, which can name functions and classes, is for other people's
programs and is never looked at here.
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from chexlib.errors import ChexlibError, ConfigError, WeightsError, first_line
from chexlib.files import atomic_write, require_plain_zip, scratch_folder
from chexlib.findings import FINDINGS
from chexlib.models.arrays import fill_model, head_differs, layout, read_arrays, room_for
from chexlib.models.convert import load_torch_weights, require_readable
from chexlib.models.topologies import NORMALIZATION, SIZES, TOPOLOGIES, WIDTHS, build_model

CARD = "chexlib.json"  # the member of the archive
LARGEST_CARD = 16 * 2**20  # bytes
MEMBER = "member_"  # a model in a model of models is called so, and numbered
ENSEMBLE = "ensemble"  # the topology of several models in one
LEAST_MEMBER = 2**24  # bytes at width 1: the smallest topology, DenseNet-121, has 28 million
# The network of a card that names none, as chexlib 0.1 wrote it.
PUBLISHED = {"width": 1.0, "stem": "full"}
WITH_CARD = (
    "python -c 'from chexlib.models.weights import create_model, save_model; "
    'network = {"topology": "densenet121", "size": 224}; '
    'model = create_model(**network, weights="weights.safetensors"); '
    'save_model(model, "model.keras", card=network)\''
)
log = logging.getLogger(__name__)


def create_model(
    topology: str,
    *,
    size: int,
    weights: str | None = None,
    seed: int = 0,
    fresh_head: bool = False,
    **settings,
):
    """Build a topology and fill it from `weights`.

    Parameters
    ----------
    weights : None, "imagenet", or a path that `load_weights` takes
    fresh_head : bool
        Draw the head anew, whatever the weights hold.
    settings
        Others of `build_model`: width, stem, precision, norm, ghost_size, momentum. Weights with
        batch norm fill every norm that has statistics (batch, sync, ghost, frozen), and no other.

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
                f"the ImageNet weights of {topology} could not be downloaded "
                f"({first_line(error)}). Connect to the internet once, or copy the folder "
                "~/.keras/models from a machine that has them. Or start from random weights, or from "
                "a file of your own."
            ) from error
    path = find_weights(weights)
    if path.suffix == ".keras":  # before the slow building
        asked = {name: settings.get(name, usual) for name, usual in PUBLISHED.items()}
        _require_network(path, read_card(path, any_findings=True), topology, **asked)
    model = build_model(topology, **settings)
    load_weights(model, path, fresh_head=fresh_head)
    return model


def load_weights(
    model,
    weights: str | Path,
    *,
    fresh_head: bool = False,
    unused: Sequence[str] = (),
) -> pd.DataFrame:
    """Load weights from a file into a model of `build_model`, and account for every array.

    The head stays as it was drawn if the file's findings are others. A first kernel for one grey
    channel fills that for three. The size of the input is free: no weight depends on it.

    Parameters
    ----------
    model : keras.Model
    weights : a `.keras` file of ours, a `.weights.h5` of Keras, a `.safetensors` of PyTorch, or a
        run's folder
    fresh_head : bool
        Leave the head as it is, although the file has one for our findings.
    unused : patterns of arrays in the file that may be left out, such as `optimizer/*`

    Returns
    -------
    DataFrame
        A row for each weight, and for each array left out: tensor, layer, weight, shape in the
        file, fate.

    Raises
    ------
    WeightsError
        There is no such file, or an array is left over, missing or of another shape, and was not
        named.
    """
    path, topology = find_weights(weights), model.name
    if path.suffix == ".safetensors":
        report = load_torch_weights(model, path, unused=unused, keep_head=fresh_head)
    else:
        if path.suffix == ".keras":
            card = read_card(path, any_findings=True)
            _require_network(path, card, topology, **_stem_of(model))
            fresh_head |= card["findings"] != list(FINDINGS)
        arrays, variables = _arrays(path, topology), layout(model)
        keep_head = fresh_head or head_differs(variables, arrays)
        try:
            report = fill_model(variables, arrays, unused=unused, keep_head=keep_head)
        except WeightsError as error:
            raise _misfit(path, topology, str(error)) from error
    fates = ", ".join(f"{count} {fate}" for fate, count in report["fate"].value_counts().items())
    log.info("weights of %s from %s: %s", topology, path.name, fates)
    return report


def save_model(model, path, *, card: dict) -> Path:
    """Write `model` and its card to one `.keras` file, atomically."""
    path = Path(path)
    with scratch_folder(room_for(model)) as folder, atomic_write(path) as file:
        draft = Path(folder) / "model.keras"  # Keras writes to a name with this ending only
        model.save(draft)
        with zipfile.ZipFile(draft, "a") as archive:
            archive.writestr(CARD, json.dumps({"findings": list(FINDINGS), **card}, indent=1))
        with open(draft, "rb") as whole:
            shutil.copyfileobj(whole, file)
    return path


def load_model(path):
    """Load a `.keras` file that `save_model` wrote, or that of a run's folder.

    Returns
    -------
    model : keras.Model
    card : dict
        Topology, size, findings, split and origin of the weights.

    Raises
    ------
    WeightsError
        No such file, not a model of this project, other findings or another normalisation, or
        weights that do not fit every layer of the topology that the card names.
    """
    path, card = find_weights(path), read_card(path)
    model, topology = _build(path, card), card["topology"]
    if strange := _classes(_config(path)) - _classes(json.loads(model.to_json())):
        raise _misfit(path, topology, f"they are of a network with {', '.join(sorted(strange))}")
    _fill(model, path, topology)
    return model, card


def _build(path: Path, card: dict):
    """The network that a card describes, with the weights that it is drawn with."""
    if card.get("topology") != ENSEMBLE:
        return _build_one(path, card)
    members, size = card.get("members"), card["size"]
    listed = isinstance(members, list) and all(isinstance(member, dict) for member in members)
    # Each is built before its weights are looked for.
    room = (
        path.stat().st_size >= sum(_least_bytes(member) for member in members) if listed else False
    )
    if not room or not members:
        raise WeightsError(
            f"{path} is an ensemble of {members!r:.80}. Accepted: a list of cards, of no more "
            "networks than a file of this length holds. Write it again with `save_ensemble`."
        )
    models = [_build_one(path, {**member, "size": size}) for member in members]
    return combine_models(models)


def _least_bytes(card: dict) -> float:
    """What a file of the network of a card has at least; kernels shrink with the square of their
    width.
    """
    return LEAST_MEMBER * (min(WIDTHS) if card.get("width") == min(WIDTHS) else 1) ** 2


def _build_one(path: Path, card: dict):
    """The network of a card that is of one topology."""
    topology, config = card.get("topology"), config_of(path, card)
    if topology not in TOPOLOGIES:
        raise WeightsError(
            f"{path} is of topology {topology!r:.80}. Accepted: {', '.join(TOPOLOGIES)}."
        )
    if card.get("normalization", NORMALIZATION[topology]) != NORMALIZATION[topology]:
        raise WeightsError(
            f"{path} is for another normalisation than {topology} has here. Use chexlib as it was "
            "then."
        )
    precision = config.get("precision", "float32")
    if precision not in ("float32", "mixed_bfloat16"):
        raise WeightsError(
            f"{path} is of precision {precision!r:.80}. Accepted: float32, mixed_bfloat16."
        )
    norm = {name: config[name] for name in ("norm", "ghost_size", "group_share") if name in config}
    network = {name: card.get(name, usual) for name, usual in PUBLISHED.items()}
    try:
        return build_model(topology, size=card["size"], precision=precision, **network, **norm)
    except (TypeError, ValueError) as error:  # a ConfigError is one
        raise WeightsError(
            f"{path} names a network that cannot be built: {first_line(error)}"
        ) from error


def _config(path: Path) -> dict:
    """Keras' description of the network in the file, as plain JSON."""
    try:
        return _member(path, "config.json")
    except Exception as error:  # zipfile and json raise nearly anything
        raise WeightsError(
            f"{path} has no readable config.json ({first_line(error)}). Copy it again."
        ) from error


def _member(path: Path, name: str):
    """The JSON of a member of a `.keras` file; ValueError for one that is too long."""
    with zipfile.ZipFile(path) as archive:
        if (length := archive.getinfo(name).file_size) > LARGEST_CARD:
            raise ValueError(f"{name} in it has {length:,} bytes")
        return json.loads(archive.read(name))


def _classes(config) -> set[str]:
    """Names of all classes in a description, however deep."""
    names, waiting = set(), [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            names |= {str(part["class_name"])} if "class_name" in part else set()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return names


def _fill(model, path: Path, topology: str) -> None:
    """Read every weight of `model` from a `.keras` file: arrays only."""
    try:
        fill_model(layout(model), _arrays(path, topology))
    except WeightsError as error:
        raise error if str(path) in str(error) else _misfit(path, topology, str(error)) from error


def _arrays(path: Path, topology: str) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path)
    except WeightsError:
        raise
    except Exception as error:  # h5py and zipfile raise nearly anything
        raise _misfit(path, topology, first_line(error)) from error


def _require_network(path: Path, card: dict, topology: str, **asked) -> None:
    """Refuse a card of another topology, or of another width or stem than is asked."""
    if (name := card.get("topology")) != topology:
        raise _misfit(
            path, topology, f"they are of {name}" if name else "their card names no topology"
        )
    for name, value in asked.items():
        if (theirs := card.get(name, PUBLISHED[name])) != value:
            raise _misfit(path, topology, f"they are of {name}={theirs!r:.80}, not {value!r}")


def _stem_of(model) -> dict:
    """The stem that `build_model` noted, which no array of a file tells; a network of another
    making has none.
    """
    return {"stem": model.stem} if hasattr(model, "stem") else {}


def _misfit(path: Path, topology: str, why: str) -> WeightsError:
    return WeightsError(
        f"the weights in {path} do not fit {topology}: {why}. Choose the topology they were "
        "trained with."
    )


def combine_models(models: list):
    """Ensemble of models: the mean of their probabilities.

    Parameters
    ----------
    models : list of keras.Model
        Each from pixels (batch, size, size, 1) to probabilities (batch, findings), as the ensemble.

    Raises
    ------
    ConfigError
        No models, or models of different sizes.
    """
    import keras

    if len({model.input_shape for model in models}) != 1:
        sizes = sorted({model.input_shape[1] for model in models})
        raise ConfigError(
            f"{len(models)} models of sizes {sizes} cannot be one ensemble. Give models of one size."
        )
    pixels = keras.Input(models[0].input_shape[1:], name="radiograph")
    members = [
        keras.Model(model.inputs[0], model.outputs[0], name=f"{MEMBER}{i}")
        for i, model in enumerate(models)
    ]
    mean = keras.layers.Average(dtype="float32", name="mean")
    return keras.Model(pixels, mean([member(pixels) for member in members]), name="ensemble")


def read_card(path, *, any_findings: bool = False) -> dict:
    """What a `.keras` file that `save_model` wrote says of itself; no TensorFlow is needed.

    Parameters
    ----------
    path : of the file, or of a run's folder
    any_findings : bool
        Accept a model of other findings than ours, of which the head is of no use here.

    Raises
    ------
    WeightsError
        No such file, not a model of this project, or other findings; a size outside `SIZES`.
    """
    path = find_weights(path)
    if path.suffix in (".safetensors", ".h5"):
        raise WeightsError(
            f"{path} has weights, but no card that describes their network. Start a training from "
            f"them, or write weights and card into one file: {WITH_CARD}."
        )
    try:
        require_plain_zip(path)  # as Keras and save_model write them
        card = _member(path, CARD)
        findings = card["findings"]
    except Exception as error:  # zipfile and json raise nearly anything
        raise WeightsError(
            f"{path} is not a model written by chexlib ({first_line(error)}). Name the model.keras "
            "of a run, for instance runs/latest/03_train_baseline/model.keras."
        ) from error
    if findings != list(FINDINGS) and not any_findings:
        raise WeightsError(
            f"{path} predicts {findings!s:.300}, not our 14 findings. Name a model of these: "
            f"{', '.join(FINDINGS)}."
        )
    if not isinstance(size := card.get("size"), int) or not SIZES[0] <= size <= SIZES[1]:
        raise WeightsError(
            f"{path} is for images of {size!r:.80} px. Name a model for {SIZES[0]} to {SIZES[1]} px."
        )
    return card


def extend_card(path, **facts) -> dict:
    """Add facts to the card of a `.keras` file, or replace them, atomically; gives the new card.

    "calibration" and "operating_points" are where `python -m chexlib card` looks for those.
    """
    path = find_weights(path).resolve()
    card = {**read_card(path), **facts}
    with (
        zipfile.ZipFile(path) as old,
        atomic_write(path) as file,
        zipfile.ZipFile(file, "w") as new,
    ):
        for item in old.infolist():
            if item.filename != CARD:
                with old.open(item) as source, new.open(item, "w") as copy:
                    shutil.copyfileobj(source, copy)
        new.writestr(CARD, json.dumps(card, indent=1))
    return card


def find_weights(weights: str | Path) -> Path:
    """The weights file that a path means: the file itself, or the `model.keras` of a run's folder.

    Raises
    ------
    WeightsError
        There is none, more than one, or a format that is not read.
    """
    path = Path(weights)
    if path.is_file():
        require_readable(path)
        return path
    if not path.is_dir():
        raise WeightsError(
            f"there is no weights file {path}. Name a .keras, .weights.h5 or .safetensors file, or "
            "a run's folder. A training also takes 'imagenet', or no weights at all."
        )
    found = [f for f in (path / "model.keras", *sorted(path.glob("*/model.keras"))) if f.is_file()]
    if len(found) == 1 or (found and found[0].parent == path):
        return found[0]
    kept = found or sorted(path.glob("snapshots/*.keras"))
    several = (
        f"several models: {', '.join(str(f.relative_to(path)) for f in kept[:9])}"
        if kept
        else "no model.keras"
    )
    raise WeightsError(
        f"{path} has {several}. Name a weights file, or the folder of one training, such as "
        "runs/latest/03_train_baseline."
    )


def config_of(path, card: dict) -> dict:
    """The settings of the training that a card tells of.

    Raises
    ------
    WeightsError
        They are no table of names and values.
    """
    config = card.get("config") or {}
    if not isinstance(config, dict):
        raise WeightsError(
            f"{path} has the config {config!r:.80} in place of names with values. Use a file that "
            "chexlib wrote."
        )
    return config


def split_of(card: dict) -> str:
    """ "patient split 70e7a9376113": where a card, or what was found of a model, says what it was
    trained on.
    """
    split = card.get("split") if isinstance(card.get("split"), dict) else {}
    return f"{split.get('name', 'unknown')!s:.80} split {split.get('digest') or 'without digest'!s:.80}"
