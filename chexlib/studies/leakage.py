"""What a leak buys: the same test images, scored by a network that has seen their patients and by
one that has not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chexlib.data.nih import EDITIONS, Radiographs, load_radiographs
from chexlib.data.splits import LISTS
from chexlib.errors import DataError
from chexlib.training.config import TrainConfig

HELD_OUT = 0.4  # of the images: half of them test, the other half leaks


def leaking_lists(radiographs: Radiographs, *, seed: int = 0) -> dict[str, dict[str, list[str]]]:
    """Two pairs of lists, train_val and test, that differ by the leak alone.

    Patients with two images or more are held out until they have `HELD_OUT` of all images; half of
    each one's images are the test list of both. "by patient" trains on the other patients. "by
    image" trains on as many images, among them the other half of the held-out patients', in place
    of as many drawn at random.

    Returns
    -------
    dict
        "by image" and "by patient" to {"train_val_list.txt": [...], "test_list.txt": [...]}.
    """
    rng = np.random.default_rng(seed)
    by_patient = radiographs.table.groupby("patient")["image"].agg(list)
    repeated = by_patient[by_patient.map(len) > 1]
    order = repeated.iloc[rng.permutation(len(repeated))]
    held = order[order.map(len).cumsum() <= HELD_OUT * len(radiographs)]
    if len(held) < 2 or len(held) == len(by_patient):
        raise DataError(
            f"{radiographs.root} has {len(repeated)} patients with two images or more among "
            f"{len(by_patient)}: too few to measure a leak. Use more images."
        )
    test, leaked = [], []
    for images in held:
        drawn = rng.permutation(images).tolist()
        test += drawn[: len(drawn) // 2]
        leaked += drawn[len(drawn) // 2 :]
    others = by_patient.drop(held.index).explode().tolist()
    leaked = leaked[: len(others) // 2]
    kept = rng.permutation(others)[: len(others) - len(leaked)].tolist()
    training = {"by image": kept + leaked, "by patient": others}
    return {
        name: dict(zip(LISTS, (images, test), strict=True)) for name, images in training.items()
    }


def leaking_configs(config: TrainConfig, *, seed: int = 0) -> dict[str, TrainConfig]:
    """Two trainings that differ by a leak alone: "by image" and "by patient" to their configs, for
    `fit`.

    Parameters
    ----------
    config : TrainConfig
        Its data_dir has the images. What the two trainings need and leave goes below its run_dir,
        into `by-image` and `by-patient`. Its split is not used.
    seed : int
        Of who is held out.
    """
    radiographs = load_radiographs(config.data_dir, max_images=config.max_images, seed=config.seed)
    configs = {}
    for name, lists in leaking_lists(radiographs, seed=seed).items():
        run_dir = Path(config.run_dir) / name.replace(" ", "-")
        data = _folder(run_dir / "data", radiographs, lists)
        changes = {"split": "official", "max_images": 0, "allow_leak": True}
        configs[name] = config.replace(data_dir=str(data), run_dir=str(run_dir), **changes)
    return configs


def _folder(folder: Path, radiographs: Radiographs, lists: dict[str, list[str]]) -> Path:
    """A folder in the NIH layout with these lists, and links to the labels and the images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in lists.items():
        (folder / name).write_text("\n".join(images) + "\n", encoding="utf-8")
    for source in [
        *(radiographs.root / name for name in EDITIONS),
        *sorted(radiographs.root.glob("images*")),
    ]:
        link = folder / source.name
        link.unlink(missing_ok=True)
        if source.exists():
            link.symlink_to(source.resolve())
    return folder
