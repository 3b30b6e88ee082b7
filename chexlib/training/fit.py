"""`fit(config)`: one training, the same function in a notebook, under `mpiexec -n N` and on MPI engines.

python -m chexlib train --config config.json                 # 1 process
mpiexec -n 2 python -m chexlib train --config config.json    # 2 ranks
engines.run(fit, config)                                     # from a notebook, on its engines
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from chexlib.data.nih import Radiographs, check_images, load_radiographs
from chexlib.data.pipeline import ImageStore, steps_per_epoch, training_batches
from chexlib.data.splits import Split, audit, make_split
from chexlib.errors import ConfigError
from chexlib.files import replacing
from chexlib.findings import FINDINGS
from chexlib.models.weights import create_model, save_model
from chexlib.training.collectives import World, join_world
from chexlib.training.config import TrainConfig
from chexlib.training.monitor import PooledValidation, Progress, pooled_scorer
from chexlib.training.optimizers import FusedAdam


@dataclass(frozen=True)
class TrainResult:
    """What a training left: its history, and where model and predictions lie. Equal on every rank."""

    config: dict
    ranks: int
    split: dict  # name, digest, images per part
    history: list[dict]  # one row an epoch: loss, val_loss, val_auroc, learning_rate, images_per_second
    best_epoch: int  # counted from 0; the saved weights are of this epoch
    seconds: float
    model: str
    predictions: str

    def to_dict(self) -> dict:
        """Plain values, for `metrics.json`."""
        return asdict(self)


class DataParallelTrainer(keras.Model):
    """Keras' own `fit` loop around a model whose gradients are averaged over ranks at every step.

    The loss is binary cross-entropy, averaged over findings and over all images of the global batch; a rank with
    fewer images, or with a stand-in of weight 0, counts for what it holds.
    """

    def __init__(self, model: keras.Model, world: World):
        super().__init__()
        self.model, self.world = model, world
        self.loss_tracker = keras.metrics.Mean("loss")

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def train_step(self, data):
        pixels, labels, weights = data
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            scores = self.model(pixels, training=True)
            loss = tf.reduce_sum(weights * keras.losses.binary_crossentropy(labels, scores))
        gradients = tape.gradient(loss, variables)
        *gradients, loss, images = self.world.sum([*gradients, loss, tf.reduce_sum(weights)])
        self.optimizer.apply([g / images for g in gradients], variables)
        self.loss_tracker.update_state(loss / images, sample_weight=images)
        return {"loss": self.loss_tracker.result()}


def fit(config: TrainConfig, *, report: Callable[[dict], None] | None = None, verbose: int | str = 0) -> TrainResult:
    """Train on the train part, choose by the validation part, score validation and test with the best weights.

    Parameters
    ----------
    config : TrainConfig
    report : callable, optional
        Called on the first rank with a dict of live numbers: epoch, epochs, step, steps, loss, and history (one
        dict for each epoch that has ended).
    verbose : 0, 1, 2 or "auto"
        Keras' progress bar, on the first rank.

    Returns
    -------
    TrainResult
        The first rank has written `model.keras`, `history.parquet` and `predictions.parquet` to `run_dir`.

    Raises
    ------
    DataError
        The data cannot be read, or the split leaks patients.
    ConfigError
        More ranks than training images.
    WeightsError
        The starting weights do not fit.
    """
    began = time.perf_counter()
    world = join_world()
    split, parts = divide(config)
    train = parts["train"]
    if world.ranks > len(train):
        raise ConfigError(f"{world.ranks} ranks cannot share {len(train)} images. Use at most {len(train)} engines.")
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)

    # Grappler's rewriting takes seconds of every start and makes no step of these graphs faster (measured).
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    model = create_model(
        config.topology,
        size=config.size,
        weights=config.weights,
        precision=config.precision,
        momentum=config.norm_momentum,
        seed=config.seed,
    )
    labels = train.labels
    if config.weights is None:
        _start_head_at_prevalence(model, labels)
    if config.shuffle_labels:
        labels = np.random.default_rng(config.seed).permutation(labels)
    trainer = DataParallelTrainer(model, world)
    makers = {"adam": FusedAdam, "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9)}
    trainer.compile(optimizer=makers[config.optimizer](config.learning_rate), jit_compile=False)
    trainer.optimizer.build(model.trainable_variables)
    world.broadcast([*model.variables, *trainer.optimizer.variables])

    global_batch = config.batch_size * world.ranks
    steps = steps_per_epoch(len(train), global_batch=global_batch)
    steps = min(steps, config.max_steps or steps)
    batches = training_batches(
        ImageStore(train.table["path"], size=config.size),
        labels,
        global_batch=global_batch,
        seed=config.seed,
        rank=world.rank,
        ranks=world.ranks,
        mirror=config.mirror,
        max_steps=config.max_steps,
    )
    score = pooled_scorer(model, parts, world, size=config.size)
    validation = PooledValidation(score, parts["validation"].labels)
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", config.plateau_factor, config.plateau_patience, min_delta=0)
    speak = report if world.first else None
    images = min(len(train), steps * global_batch)
    progress = Progress(speak, images=images, steps=steps, epochs=config.epochs)
    history = trainer.fit(
        batches,
        epochs=config.epochs,
        steps_per_epoch=steps,
        callbacks=[validation, plateau, progress],
        verbose=verbose if world.first else 0,
        shuffle=False,
    ).history
    if validation.best_weights is not None:
        model.set_weights(validation.best_weights)

    predictions = pd.concat([_predictions(parts[part], score(part), part) for part in ("validation", "test")])
    rows = pd.DataFrame(history).astype(float).rename_axis("epoch").reset_index()
    result = TrainResult(
        config=config.to_dict(),
        ranks=world.ranks,
        split={"name": split.name, "digest": split.digest, "images": {name: len(part) for name, part in parts.items()}},
        history=rows.to_dict("records"),
        best_epoch=validation.best_epoch,
        seconds=time.perf_counter() - began,
        model=str(run_dir / "model.keras"),
        predictions=str(run_dir / "predictions.parquet"),
    )
    if world.first:
        card = {"topology": config.topology, "size": config.size, "split": result.split, "ranks": world.ranks}
        save_model(model, result.model, card={**card, "config": result.config, "best_epoch": result.best_epoch})
        for table, name in ((rows, "history.parquet"), (predictions, "predictions.parquet")):
            with replacing(run_dir / name) as draft:
                table.to_parquet(draft, index=False)
    return result


def divide(config: TrainConfig) -> tuple[Split, dict[str, Radiographs]]:
    """The audited split that a config asks for, and the radiographs of each of its parts."""
    radiographs = load_radiographs(config.data_dir, max_images=config.max_images, seed=config.seed)
    if config.skip_broken:
        radiographs = check_images(radiographs, skip_broken=True)
    split = make_split(radiographs, kind=config.split, seed=config.seed)
    audit(split, radiographs, allow_leak=config.allow_leak)
    return split, {part: radiographs.select(split.images(part)) for part in split.parts}


def _start_head_at_prevalence(model, labels: np.ndarray) -> None:
    """Bias of the 14 sigmoids at the log-odds of each finding (Lin et al. 2017, section 4.1), one pseudo-count each."""
    positives = labels.sum(0) + 1
    kernel, _ = model.get_layer("findings").get_weights()
    model.get_layer("findings").set_weights([kernel, np.log(positives / (len(labels) + 2 - positives))])


def _predictions(radiographs, scores: np.ndarray, part: str) -> pd.DataFrame:
    """One row an image: image, patient, part, the 14 labels as `label_*` and the 14 probabilities as `score_*`."""
    table = radiographs.table
    frame = table[["image", "patient"]].assign(part=part)
    frame[[f"label_{f}" for f in FINDINGS]] = table[list(FINDINGS)].to_numpy()
    frame[[f"score_{f}" for f in FINDINGS]] = scores
    return frame
