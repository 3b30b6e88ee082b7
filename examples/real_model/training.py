"""The best model that a few real radiographs allow: phantom pre-training, cross-validation by
patient, an ensemble.

`python -m examples.real_model --data DIR` runs it, and goes on where it was stopped. The ensemble
is of the networks of the cross-validation's first seed: each has seen four fifths of the images,
together they have seen all, and what their out-of-fold scores say is not too good for it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from chexlib.app.report import write_card
from chexlib.data.nih import Radiographs, load_radiographs
from chexlib.data.splits import Split
from chexlib.evaluation.ensembles import save_ensemble
from chexlib.evaluation.intervals import with_interval
from chexlib.files import atomic_write, file_lock, write_json
from chexlib.machine import environment
from chexlib.models.topologies import NORMALIZATION
from chexlib.models.weights import extend_card, save_model, split_of
from chexlib.phantom.write import write_phantom
from chexlib.studies.transfer import fine_schedule
from chexlib.training.config import TrainConfig
from chexlib.training.fit import fit, learn
from chexlib.training.trainer import Reuse
from examples.real_model.collection import collect
from examples.real_model.cross_validation import FEWEST, arm_gains, cross_validate, pooled

SCRATCH, PHANTOM = "scratch", "phantom"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """What decides the model. The defaults take about an hour on 2 cores for some 1,400 images."""

    topology: str = "densenet121"
    size: int = 48  # px
    pretrain_images: int = 12_000  # phantoms, of which seven tenths train
    pretrain_passes: int = 8
    pretrain_rate: float = 1e-3  # Adam's highest
    pretrain_batch: int = 32
    folds: int = 5
    seeds: int = 3
    epochs: int = 5
    batch_size: int = 32
    rate: float = 3e-4  # highest, from the phantom
    scratch_rate: float = 1e-3  # highest, from random weights
    warmup: float = 4.0  # epochs for each 256 images of the global batch: half a one, with 32
    stage_rate: float = 1.0
    fresh_head: bool = True  # the phantom's findings are drawings
    recalibrate: int = 512  # training images
    augment: str = "radiograph"


QUICK = RealModel(
    topology="vgg16",
    size=32,
    pretrain_images=128,
    pretrain_passes=2,
    folds=2,
    seeds=1,
    epochs=1,
    batch_size=16,
    pretrain_rate=1e-4,
    rate=1e-4,
    scratch_rate=1e-4,
)


def train_real_model(
    folders: Sequence[str | Path], out: str | Path, *, settings: RealModel = RealModel()
) -> dict:
    """Pre-train, cross-validate from the phantom and from random weights, and write the ensemble
    with its card.

    Two processes on one `out` share the cross-validation; the second waits while the first
    pre-trains.

    Parameters
    ----------
    folders : folders in the NIH layout, of one release
    out : path
        Of all that is made: model.keras, MODEL_CARD.md, metrics.json, predictions.parquet (out of
        fold), and what it needs to go on. Use another one for other data or settings.

    Returns
    -------
    dict
        What metrics.json holds: settings, data, split, gains (of `arm_gains`), by_seed, model,
        minutes.
    """
    out, s = Path(out).absolute(), settings
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with file_lock(out / "prepare.lock"):
        data = collect(folders, out / "data")
        start = _pretrained(out, s)
    if not start:
        return {"stopped": True}
    radiographs = load_radiographs(data)
    config = TrainConfig(
        data_dir=str(data),
        run_dir=str(out),
        topology=s.topology,
        size=s.size,
        batch_size=s.batch_size,
        epochs=s.epochs,
        augment=s.augment,
        keep_checkpoints=0,
        resume=True,
    )
    reuse = {SCRATCH: Reuse(), PHANTOM: Reuse()}
    warmup = s.warmup * s.batch_size / 256
    alone = fine_schedule(s.scratch_rate, epochs=s.epochs, warmup=warmup)

    def from_scratch(config):
        return learn(config.replace(schedule=alone), reuse=reuse[SCRATCH])

    def from_phantom(config):
        config = config.replace(
            weights=start,
            schedule=fine_schedule(s.rate, epochs=s.epochs, warmup=warmup),
            stage_rate=s.stage_rate,
            fresh_head=s.fresh_head,
            recalibrate=s.recalibrate,
        )
        return learn(config, reuse=reuse[PHANTOM])

    digest = Split("all", None, {"all": tuple(radiographs.table["image"])}).digest
    told = {"data": digest, **asdict(s)}
    keep = functools.partial(_keep_member, out / "members", config, digest)
    arms, work = {SCRATCH: from_scratch, PHANTOM: from_phantom}, out / "cross-validation"
    rows = cross_validate(
        arms, config, work, told=told, folds=s.folds, seeds=range(s.seeds), keep=keep
    )
    if len(rows) < len(arms) * s.folds * s.seeds:
        return {"stopped": True}
    found = _judge(rows, work) | {
        "settings": asdict(s),
        "data": {"digest": digest, **describe(radiographs)},
    }
    split = {
        "name": f"{s.folds}-fold by patient",
        "digest": digest,
        "images": {"all": len(radiographs)},
    }
    found |= {"split": split}
    members = [out / "members" / f"fold-{fold}.keras" for fold in range(1, s.folds + 1)]
    _write(out, members, found, pooled(rows, work, PHANTOM)[0], config)
    found |= {"model": str(out / "model.keras"), "minutes": (time.monotonic() - began) / 60}
    write_json(out / "metrics.json", found)
    return found


def _pretrained(out: Path, s: RealModel) -> str:
    """The pre-trained network of the best epoch, trained if it is not there yet; empty if that was
    stopped.
    """
    model = out / "pretraining" / "model.keras"
    history = model.with_name("history.parquet")
    if history.is_file() and len(pd.read_parquet(history)) == s.pretrain_passes:
        return str(model)
    log.info("pre-training on %d phantoms ...", s.pretrain_images)
    phantom = write_phantom(
        out / "phantom", n_images=s.pretrain_images, size=s.size, min_prevalence=0.06, seed=1
    )
    rate = s.pretrain_rate
    rise = {"kind": "warmup", "length": 0.25, "start": rate / 10, "rate": rate}
    fall = {"kind": "cosine", "length": s.pretrain_passes - 0.25, "rate": rate, "end": rate / 100}
    first = TrainConfig(
        data_dir=str(phantom),
        run_dir=str(model.parent),
        topology=s.topology,
        size=s.size,
        batch_size=s.pretrain_batch,
        epochs=s.pretrain_passes,
        augment=s.augment,
        keep_checkpoints=1,
        schedule={"unit": "epochs", "phases": [rise, fall]},
        split="patient",
        resume=True,
    )
    return "" if fit(first).stopped else str(model)


def describe(radiographs: Radiographs) -> dict:
    """How large a data set is: images, patients, positives of each finding."""
    labels = radiographs.labels.sum(axis=0).astype(int).tolist()
    names = radiographs.table.columns[-len(labels) :]
    counts = dict(zip(names, labels, strict=True))
    return {
        "images": len(radiographs),
        "patients": int(radiographs.table["patient"].nunique()),
        "positives": counts,
    }


def _keep_member(folder: Path, config: TrainConfig, digest: str, point, model) -> None:
    """Keep the network of a fold of the first seed for the ensemble."""
    if point["arm"] == PHANTOM and point["seed"] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        card = {
            "topology": config.topology,
            "size": config.size,
            "normalization": NORMALIZATION[config.topology],
        }
        card |= {
            "config": {"precision": config.precision, "seed": 0},
            "split": {"name": f"fold {point['fold']}"},
        }
        save_model(model, folder / f"fold-{point['fold']}.keras", card=card | {"data": digest})


def _judge(rows: pd.DataFrame, work: Path) -> dict:
    arms = {arm: pooled(rows, work, arm) for arm in (SCRATCH, PHANTOM)}
    seeds = sorted(rows["seed"].unique())
    by_seed = {
        int(seed): arm_gains([ours], [theirs], resamples=200)
        .loc["mean", ["auroc", "other", "difference"]]
        .to_dict()
        for seed, ours, theirs in zip(seeds, arms[PHANTOM], arms[SCRATCH], strict=True)
    }
    return {"gains": arm_gains(arms[PHANTOM], arms[SCRATCH]), "by_seed": by_seed}


def _write(
    out: Path, members: list[Path], found: dict, predictions: pd.DataFrame, config: TrainConfig
) -> None:
    """model.keras, predictions.parquet and MODEL_CARD.md."""
    path, mean, data = (
        save_ensemble(members, out / "model.keras"),
        found["gains"].loc["mean"],
        found["data"],
    )
    rare = [name for name, count in data["positives"].items() if count < FEWEST]
    s, gain = (
        found["settings"],
        with_interval(mean["difference"], mean["low"], mean["high"], "+.3f"),
    )
    about = [
        f"It was trained on {data['images']:,} radiographs of {data['patients']:,} patients, which "
        "is very little: the NIH release has 112,120. Positives: "
        + ", ".join(f"{n} {c}" for n, c in data["positives"].items())
        + ".",
        f"It is the mean of {len(members)} networks, one a fold of a cross-validation by patient. "
        f"The AUROCs below are out of fold ({split_of(found)}): each image was scored by the one "
        "network that had seen none of its patient.",
        f"Each began with {s['pretrain_images']:,} synthetic radiographs. Against random weights "
        f"that changed the mean AUROC over findings with {FEWEST} or more positives by {gain}, "
        f"over resampled patients, from {mean['other']:.3f} to {mean['auroc']:.3f}; means of "
        f"{s['seeds']} seeds, "
        f"{split_of(found)}." + (f" Too rare for that mean: {', '.join(rare)}." if rare else ""),
    ]
    own = {**config.to_dict(), "weights": "phantom pre-training", "learning_rate": s["rate"]}
    facts = {
        "split": found["split"],
        "config": own,
        "ranks": 1,
        "best_epoch": s["epochs"] - 1,
        "about": about,
    }
    extend_card(path, **facts, data=f"{data['images']:,} real radiographs of the NIH release")
    with atomic_write(out / "predictions.parquet") as file:
        predictions.to_parquet(file, index=False)
    write_json(out / "environment.json", environment())
    write_json(out / "metrics.json", {"split": found["split"], "gains": found["gains"]})
    write_card(out)
