"""The card of a `.keras` file: a JSON member of the archive that says what the weights are.

No TensorFlow is needed.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from chexlib.errors import WeightsError
from chexlib.files import atomic_write
from chexlib.findings import FINDINGS

CARD = "chexlib.json"  # the member of the archive
LARGEST_CARD = 16 * 2**20  # bytes
LARGEST_SIZE = 1024  # px a side: that of the NIH release


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
        No such file, not a model of this project, or other findings; a size outside 32 to 1024 px.
    """
    path = find_weights(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # Keras and save_model store members as they are, so that a small file cannot hold a
            # large one.
            if packed := [
                item.filename
                for item in archive.infolist()
                if item.compress_type != zipfile.ZIP_STORED
            ]:
                raise ValueError(f"{packed[0]!r} in it is compressed")
            if (length := archive.getinfo(CARD).file_size) > LARGEST_CARD:
                raise ValueError(f"its card has {length:,} bytes")
            card = json.loads(archive.read(CARD))
        findings = card["findings"]
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        TypeError,
        OSError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise WeightsError(
            f"{path} is not a model written by chexlib ({first_line(error)}). Name the model.keras "
            "of a run, for instance runs/latest/03_train_baseline/model.keras."
        ) from error
    if findings != list(FINDINGS) and not any_findings:
        raise WeightsError(
            f"{path} predicts {findings!s:.300}; expected the 14 findings {list(FINDINGS)}."
        )
    if not isinstance(size := card.get("size"), int) or not 32 <= size <= LARGEST_SIZE:
        raise WeightsError(
            f"{path} is for images of {size!r:.80} px. Accepted: 32 to {LARGEST_SIZE}."
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
        There is none, or more than one.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(
            f"there is no weights file {path}. Accepted: a .keras, .weights.h5 or .safetensors "
            "file, a run's folder, 'imagenet', or none at all."
        )
    found = [f for f in (path / "model.keras", *sorted(path.glob("*/model.keras"))) if f.is_file()]
    if len(found) == 1 or (found and found[0].parent == path):
        return found[0]
    kept = found or sorted(path.glob("snapshots/*.keras"))
    several = (
        f"holds several: {', '.join(str(f.relative_to(path)) for f in kept[:9])}"
        if kept
        else "has none"
    )
    raise WeightsError(
        f"{path} is no folder of one model.keras: it {several}. Name a weights file, or one run."
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
            f"{path} has the config {config!r:.80}, no settings by name. Use a file that chexlib "
            "wrote."
        )
    return config


def split_of(card: dict) -> str:
    """ "patient split 70e7a9376113": where a card, or what was found of a model, says what it was
    trained on.
    """
    split = card.get("split") if isinstance(card.get("split"), dict) else {}
    return f"{split.get('name', 'unknown')!s:.80} split {split.get('digest') or 'without digest'!s:.80}"


def first_line(error: BaseException) -> str:
    """Of an error's text, at most 200 characters: for a message of one line."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )[:200]
