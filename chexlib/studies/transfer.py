"""Transfer learning: `pretrain` on a stream of phantoms, `finetune` from any point of it, or from
other weights.

The study's three rules (published.md, "Transfer learning"): do not take the last pre-trained
checkpoint; start at the rate it was being trained at; warm up in proportion to the global batch.
"""

from __future__ import annotations

import logging
from pathlib import Path

from chexlib.collectives import join_world
from chexlib.errors import ConfigError
from chexlib.models.weights import find_weights, read_card, save_model
from chexlib.studies.collapse import model_of, rate_reached, read_state
from chexlib.training.config import TrainConfig
from chexlib.training.fit import TrainResult, fit
from chexlib.training.state import checkpoint_files

# Epochs for each `WARMUP_BATCH` images of the global batch: 5 at 8,192 (Goyal et al. 2017).
WARMUP = 5 / 32
WARMUP_BATCH = 256
LONGEST = 0.5  # share of the epochs that a warm-up may take
FLOOR = 0.01  # of the highest rate, where the cosine ends
log = logging.getLogger(__name__)


def pretrain(config: TrainConfig, *, images: int, snapshots: int = 8, **settings) -> TrainResult:
    """Train on phantom radiographs none of which is seen twice, and keep a model now and then.

    Parameters
    ----------
    config : TrainConfig
        Its `data_dir` is a phantom: the stream draws others like it, and the phantom itself
        validates. A training that was stopped goes on with `resume`.
    images : int
        Of the stream, in all.
    snapshots : int
        Models kept, evenly along the way, with rate, step and images seen (`snapshots_of`).
    settings
        Of `fit`: engines, report, reuse.

    Raises
    ------
    ConfigError
        Fewer images than snapshots, or settings that a stream does not go with.

    Examples
    --------
    >>> result = pretrain(TrainConfig(data_dir="data/phantom/p", run_dir="runs/pre", size=64), images=100_000)
    >>> snapshots_of("runs/pre")[["path", "learning_rate", "images"]]
    """
    if not 1 <= snapshots <= images:
        raise ConfigError(
            f"{images} images cannot give {snapshots} snapshots. Use at most one snapshot an image."
        )
    return fit(
        config.replace(stream_images=images // snapshots, epochs=snapshots, snapshots=True),
        **settings,
    )


def finetune(
    checkpoint: str | Path,
    config: TrainConfig,
    *,
    rate: float | None = None,
    warmup: float = WARMUP,
    **settings,
) -> TrainResult:
    """Train on from pre-trained weights on other data: a warm-up, then a cosine from `rate` to a
    hundredth of it.

    How the new domain is met is the config's: `recalibrate` and `norm_momentum` for batch norm,
    `stage_rate` for rates that fall towards the input, `fresh_head`.

    Parameters
    ----------
    checkpoint : path or "imagenet"
        A snapshot, another weights file, a checkpoint, or a run's folder: then its newest
        checkpoint.
    config : TrainConfig
        Of the fine-tuning: data, run_dir, epochs and all else. Without a schedule of its own.
    rate : float, optional
        The highest. None: that at which the checkpoint was being trained.
    warmup : float
        Epochs of warm-up for each 256 images of the global batch, at most half of all epochs; 0:
        none.
    settings
        Of `fit`: engines, report, measure, reuse.

    Raises
    ------
    WeightsError
        There are no such weights, or they do not fit.
    ConfigError
        The checkpoint's rate is not known, or it is another optimizer's, and none was given.

    Examples
    --------
    >>> finetune("runs/pre/snapshots/step-000004000.keras", TrainConfig(data_dir="data/nih", run_dir="runs/fine"))
    """
    if config.schedule:
        raise ConfigError(
            f"schedule={config.schedule!r} beside finetune, which makes one. Use rate and warmup."
        )
    weights, known = starting_point(checkpoint, Path(config.run_dir))
    if rate is None:
        rate = known.get("learning_rate")
        if not rate or known["optimizer"] != config.optimizer:
            raise ConfigError(
                f"the rate of {checkpoint} is {rate} with "
                f"{known.get('optimizer', 'an unknown optimizer')}, from where {config.optimizer} "
                "cannot go on. Name one with rate=..."
            )
    engines = settings.get("engines")
    ranks = len(engines) if engines is not None else join_world().ranks
    global_batch = ranks * config.batch_size * config.accumulation
    schedule = fine_schedule(
        rate, epochs=config.epochs, warmup=warmup * global_batch / WARMUP_BATCH
    )
    log.info(
        "fine-tuning from %s at rate %g, warm-up of %.3g epochs",
        Path(weights).name,
        rate,
        warmup_of(schedule),
    )
    return fit(config.replace(weights=weights, schedule=schedule), **settings)


def fine_schedule(rate: float, *, epochs: int, warmup: float) -> dict:
    """A linear warm-up of so many epochs from a hundredth of `rate`, and a cosine down to a
    hundredth.
    """
    warmup = min(warmup, LONGEST * epochs)
    phases = (
        [{"kind": "warmup", "length": warmup, "start": FLOOR * rate, "rate": rate}]
        if warmup
        else []
    )
    phases.append({"kind": "cosine", "length": epochs - warmup, "rate": rate, "end": FLOOR * rate})
    return {"unit": "epochs", "phases": phases}


def warmup_of(schedule: dict) -> float:
    """Epochs of warm-up in a `fine_schedule`."""
    return sum(phase["length"] for phase in schedule["phases"] if phase["kind"] == "warmup")


def starting_point(checkpoint: str | Path, run_dir: Path) -> tuple[str, dict]:
    """Weights that `create_model` takes, and what is known of how they were trained: learning_rate
    and optimizer.

    A checkpoint is written out as `run_dir/start.keras`.
    """
    if checkpoint == "imagenet":
        return "imagenet", {}
    path = Path(checkpoint)
    state = path.suffix == ".npz" or (
        path.is_dir() and any(map(checkpoint_files, (path, path / "checkpoints")))
    )
    if not state:
        path = find_weights(path)
        return str(path), read_card(path, any_findings=True).get(
            "snapshot", {}
        ) if path.suffix == ".keras" else {}
    path, arrays, facts = read_state(path)
    config = TrainConfig.from_dict(facts["config"])
    known = {"learning_rate": rate_reached(config, arrays, facts)[0], "optimizer": config.optimizer}
    run_dir.mkdir(parents=True, exist_ok=True)
    card = {**config.network(), "checkpoint": path.name, "position": facts["position"]}
    return str(save_model(model_of(config, arrays), run_dir / "start.keras", card=card)), known
