"""The compiled trainer of a config, and its reuse by the next training of a grid."""

from __future__ import annotations

import numpy as np

from chexlib.collectives import World
from chexlib.models.arrays import HEAD
from chexlib.models.data_parallel import DataParallelTrainer
from chexlib.models.topologies import redraw, stages_above
from chexlib.models.weights import create_model, load_weights
from chexlib.training.config import FREE, TrainConfig
from chexlib.training.optimizers import has_table, make_optimizer

# Settings that no graph depends on; any other, also one that is new, means another trainer.
_SAME_GRAPH = {
    *FREE,
    *("augment", "fresh_head", "head_bias", "learning_rate", "max_images", "max_steps", "mirror"),
    *(
        "plateau_delta",
        "plateau_factor",
        "recalibrate",
        "schedule",
        "seed",
        "shuffle_labels",
        "snapshots",
        "split",
    ),
    *("split_seed", "train_images", "weights"),
}


class Reuse:
    """Keeps the trainer of the training before, and makes it as good as new for one that needs the
    same graph.

    Building DenseNet-121 and tracing its step takes some 20 s, as long as a short training itself:
    a grid of many is best taken in an order in which those of one topology and `norm` follow each
    other. Only the last trainer is kept.

    Parameters
    ----------
    accumulates : bool
        One graph for any number of micro-batches, also for one, which would else have its own.

    Examples
    --------
    >>> reuse = Reuse()
    >>> results = [fit(config.replace(seed=seed), reuse=reuse) for seed in range(3)]
    """

    def __init__(self, *, accumulates: bool = False):
        self.accumulates = accumulates
        self._key, self._trainer, self._start = None, None, ()

    def __getstate__(self) -> dict:  # another process makes graphs of its own
        return vars(Reuse(accumulates=self.accumulates))

    def trainer(self, config: TrainConfig, world: World) -> DataParallelTrainer:
        """What `make_trainer` gives, or the last one that it gave, in the state in which it would
        give it now.
        """
        accumulates = self.accumulates or config.accumulation > 1
        # Keras can give ImageNet's weights to a new model only.
        imagenet_seed = config.seed if config.weights == "imagenet" else None
        settings = config.to_dict().items()
        key = {name: value for name, value in settings if name not in _SAME_GRAPH} | {
            "has_table": has_table(config),
            "accumulates": accumulates,
            "imagenet_seed": imagenet_seed,
            "filled": bool(config.weights),  # what a file leaves in batch norm is not drawn anew
            "world": world,
        }
        if key != self._key:
            self._trainer = self._start = None  # room for the new one
            self._trainer = make_trainer(config, world, accumulates=accumulates)
            self._key, self._start = key, [v.numpy() for v in self._variables()]
            return self._trainer
        for variable, value in zip(self._variables(), self._start, strict=True):
            variable.assign(value)
        if imagenet_seed is None:
            redraw(self._trainer.model, config.seed)
            if config.weights:
                head = self._trainer.model.get_layer(HEAD)
                head.bias.assign(np.zeros(head.bias.shape, np.float32))
                load_weights(self._trainer.model, config.weights, fresh_head=config.fresh_head)
        if not has_table(config):
            self._trainer.optimizer.learning_rate = config.learning_rate
        self._trainer.accumulation.assign(config.accumulation)
        self._trainer.asking.assign(0.0)
        return self._trainer

    def _variables(self) -> list:
        return [*self._trainer.model.variables, *self._trainer.optimizer.variables]


def make_trainer(config: TrainConfig, world: World, *, accumulates: bool) -> DataParallelTrainer:
    """The compiled trainer of a config, with the starting weights that this process has drawn."""
    model = create_model(
        **config.network(),
        weights=config.weights,
        precision=config.precision,
        norm=config.norm,
        ghost_size=config.ghost_size,
        group_share=config.group_share,
        momentum=config.norm_momentum,
        seed=config.seed,
        fresh_head=config.fresh_head,
    )
    multipliers = [config.stage_rate**above for above in stages_above(model)]
    trainer = DataParallelTrainer(
        model,
        world,
        accumulation=config.accumulation,
        accumulates=accumulates,
        trained=[multiplier > 0 for multiplier in multipliers],
    )
    optimizer = make_optimizer(config)
    optimizer.build(model.trainable_variables)
    optimizer.multipliers = tuple(multipliers)
    trainer.compile(optimizer=optimizer, jit_compile=False)
    return trainer
