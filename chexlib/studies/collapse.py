"""How good would this training be if it were ended now? A collapse from any of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from chexlib.collectives import World
from chexlib.errors import ConfigError, WeightsError
from chexlib.models.weights import create_model, save_model
from chexlib.training.callbacks import PooledScorer, Position
from chexlib.training.config import TrainConfig
from chexlib.training.fit import TrainResult, fit
from chexlib.training.input import divide
from chexlib.training.optimizers import has_table, values_at
from chexlib.training.state import checkpoint_files, load_checkpoint

# Weight decay of the collapse over that before it: 5e-5 -> 1e-4 in solver_collapse.prototxt of 448
# nodes.
RAISED = 2.0


def collapse(
    checkpoint: str | Path,
    *,
    run_dir: str | Path,
    epochs: int = 1,
    **changes,
) -> TrainResult:
    """Train on from a checkpoint for a few epochs, with a rate that falls to 0 and random area and
    aspect off.

    The rate falls from the one that the training has come to, as a polynomial of power 2; the
    weight decay is `RAISED` times what the training has come to. The weights and moving statistics
    are taken over as they are, the optimizer's slots are not, as in the study
    (`solver_collapse.prototxt` is started with `--weights`).

    Parameters
    ----------
    checkpoint : path
        A checkpoint's file.
    run_dir : path
        For what the collapse leaves; `start.keras` there is the model it began with.
    epochs : int
    changes
        Other settings of `TrainConfig` than those of the training.

    Raises
    ------
    WeightsError
        The file is no sound checkpoint.
    ConfigError
        The training's rate has come to 0; or a setting is not accepted.

    Examples
    --------
    >>> file = "runs/latest/03_train_baseline/checkpoints/step-000000100.npz"
    >>> collapse(file, run_dir="runs/collapsed", epochs=2)
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise WeightsError(
            f"there is no checkpoint {path}. Name a file such as "
            "runs/latest/03_train_baseline/checkpoints/step-000000100.npz."
        )
    arrays, facts = load_checkpoint(path)
    config = TrainConfig.from_dict(facts["config"])
    rate, decay = rate_reached(config, arrays, facts)
    if not rate > 0:
        raise ConfigError(
            f"the rate of {path} has come to 0, from where nothing can collapse. Take an earlier "
            "checkpoint."
        )
    phase = {
        "kind": "collapse",
        "length": epochs,
        "rate": rate,
        "power": 2.0,
        "weight_decay": RAISED * decay,
    }
    settings = {
        "run_dir": str(run_dir),
        "schedule": {"unit": "epochs", "phases": [phase]},
        "weights": str(Path(run_dir) / "start.keras"),
        "epochs": epochs,
        "resume": False,
        "weight_decay": 0.0,
        # What the training did to the weights that it began with.
        "fresh_head": False,
        "recalibrate": 0,
    }
    config = config.replace(**{**settings, **changes})
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    card = {**config.network(), "checkpoint": path.name, "position": facts["position"]}
    save_model(model_of(config, arrays), config.weights, card=card)
    return fit(config)


def score_checkpoints(checkpoints: Sequence[Path]) -> np.ndarray:
    """Scores of the test part by each of a training's checkpoints, (checkpoints, n, 14) float32.

    The settings are those of the first one; moving statistics are averaged over ranks, as at the
    end of an epoch.
    """
    arrays, facts = load_checkpoint(checkpoints[0])
    config = TrainConfig.from_dict(facts["config"])
    parts, model = divide(config)[1], model_of(config, arrays)
    predict = tf.function(lambda pixels: model(pixels, training=False))
    scorer = PooledScorer(parts, World(), size=config.size)
    scores = []
    for checkpoint in checkpoints:
        arrays, _ = load_checkpoint(checkpoint)
        _fill(model, arrays)
        scores.append(scorer("test", predict))
    return np.stack(scores)


def epoch_ends(folder: Path, *, epochs: int) -> dict[int, Path]:
    """The checkpoint of each epoch's end, by epoch from 1 on, without those within an epoch, which
    a stop leaves.

    Raises
    ------
    WeightsError
        One is not there.
    """
    ends = {}
    for path in checkpoint_files(folder):
        position = load_checkpoint(path)[1]["position"]
        if not position["image"]:
            ends[position["epoch"]] = path
    if missing := [str(epoch) for epoch in range(1, epochs + 1) if epoch not in ends]:
        raise WeightsError(
            f"{folder} has no checkpoint of the end of epoch {', '.join(missing)}, from where to "
            f"collapse. Remove {folder.parent}, and train anew."
        )
    return {epoch: ends[epoch] for epoch in range(1, epochs + 1)}


def rate_reached(config: TrainConfig, arrays: dict, facts: dict) -> tuple[float, float]:
    """Rate and weight decay of the step that would have come next."""
    if has_table(config):
        at = Position(**facts["position"])
        values = values_at(config, at)
        now = min(at.step, len(values) - 1)
        return float(values.rate[now]), float(values.weight_decay[now])
    # A constant rate, or what a plateau has left of it.
    return float(arrays["optimizer/1"]), config.weight_decay


def model_of(config: TrainConfig, arrays: dict):
    """The network of a checkpoint, with its weights and statistics."""
    norm = {"norm": config.norm, "ghost_size": config.ghost_size, "momentum": config.norm_momentum}
    model = create_model(**config.network(), precision=config.precision, **norm)
    _fill(model, arrays)
    return model


def _fill(model, arrays: dict) -> None:
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(arrays[f"weights/{i}"])
    for i, variable in enumerate(model.non_trainable_variables):
        variable.assign(np.mean(arrays[f"statistics/{i}"], axis=0))
