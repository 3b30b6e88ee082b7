"""What is slow to make before a training, kept for the next one: model, optimizer and their
compiled graphs.
"""

from __future__ import annotations

import numpy as np

from chexlib.collectives import World
from chexlib.models.arrays import HEAD
from chexlib.models.topologies import redraw, stages_above
from chexlib.models.weights import create_model, load_weights
from chexlib.training.config import FREE, TrainConfig
from chexlib.training.optimizers import has_table, make_optimizer
from chexlib.training.trainer import DataParallelTrainer

# Settings that no graph depends on; any other, also one that is new, means another trainer.
_SAME_GRAPH = {
    *FREE,
    "max_steps",
    "max_images",
    "learning_rate",
    "plateau_factor",
    "plateau_patience",
    "mirror",
}
_SAME_GRAPH |= {
    "split",
    "shuffle_labels",
    "seed",
    "split_seed",
    "schedule",
    "augment",
    "fresh_head",
    "recalibrate",
    "early_stop",
}
_SAME_GRAPH |= {"stream_images", "snapshots", "weights"}


class Reuse:
    """Keeps the trainer of the training before, and makes it as good as new for one that needs the
    same graph.

    Building DenseNet-121 and tracing its step takes some 20 s, as long as a short training itself:
    a grid of many is best taken in an order in which those of one topology and `norm` follow each
    other. Only the last trainer is kept.

    Parameters
    ----------
    virtual : bool
        One graph for any number of virtual ranks, also for none, where each number would else be
        told apart from none.

    Examples
    --------
    >>> reuse = Reuse()
    >>> results = [fit(config.replace(seed=seed), reuse=reuse) for seed in range(3)]
    """

    def __init__(self, *, virtual: bool = False):
        self.virtual = virtual
        self._key, self._trainer, self._start = None, None, ()

    def trainer(self, config: TrainConfig, world: World) -> DataParallelTrainer:
        """What `make_trainer` gives, or the last one that it gave, in the state in which it would
        give it now.
        """
        settings = config.to_dict()
        key = {name: value for name, value in settings.items() if name not in _SAME_GRAPH}
        virtual = self.virtual or config.accumulation > 1
        # Which only a new model can be filled with.
        imagenet = config.seed if config.weights == "imagenet" else None
        key |= {
            "table": has_table(config),
            "virtual": virtual,
            "imagenet": imagenet,
            "world": world,
        }
        # What a file leaves in batch norm is not drawn anew.
        key |= {"filled": bool(config.weights)}
        if key != self._key:
            self._trainer = self._start = None  # room for the new one
            self._trainer = make_trainer(config, world, virtual=virtual)
            self._key, self._start = key, [v.numpy() for v in self._variables()]
            return self._trainer
        for variable, value in zip(self._variables(), self._start, strict=True):
            variable.assign(value)
        if imagenet is None:
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


def make_trainer(config: TrainConfig, world: World, *, virtual: bool) -> DataParallelTrainer:
    """The trainer of a config, compiled, with the starting weights of this process' own."""
    model = create_model(
        **config.network(),
        weights=config.weights,
        precision=config.precision,
        norm=config.norm,
        ghost_size=config.ghost_size,
        momentum=config.norm_momentum,
        seed=config.seed,
        fresh_head=config.fresh_head,
    )
    shares = [config.stage_rate**above for above in stages_above(model)]
    trainer = DataParallelTrainer(
        model, world, accumulation=config.accumulation, virtual=virtual, shares=shares
    )
    trainer.compile(optimizer=make_optimizer(config), jit_compile=False)
    trainer.optimizer.build(model.trainable_variables)
    return trainer
