"""Run by test_collectives.py under mpiexec: what the ranks of a world do together, printed by rank
0 as JSON.

The argument says what: "agree", "away" (rank 1 never comes to a sum), "alone" (rank 1 ends with an
error while the others wait for it) or "later" (rank 0 goes on by itself when the others have
ended).
"""

import json
import sys
import time

import numpy as np

from chexlib.collectives import carrier, identify, join_world
from chexlib.errors import ConfigError
from chexlib.machine import import_tensorflow


def shares(rank):
    """Tensors of a rank, of shapes as gradients have them."""
    rng = np.random.default_rng(rank)
    return [rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (), (7,), (2, 3, 5))]


def refused():
    raise ConfigError("refused on rank 0")


def agree(world):
    """Each collective, eager and in a graph, on every rank."""
    import_tensorflow()
    import keras
    import tensorflow as tf

    mine = shares(world.rank)
    found = {"eager": [t.numpy().tolist() for t in world.allreduce([tf.constant(a) for a in mine])]}
    signatures = [[tf.TensorSpec([None, *a.shape[1:]] if a.ndim else [], a.dtype) for a in mine]]
    graph = tf.function(lambda tensors: world.allreduce(tensors), input_signature=signatures)
    found["graph"] = [t.numpy().tolist() for t in graph([tf.constant(a) for a in mine])]

    @tf.function
    def independent(x):  # nothing but the order of the calls says which of these comes first
        sums = [world.allreduce([x * float(i)])[0] for i in range(20)]
        return tf.stack([tf.reduce_sum(total) for total in sums]), world.allgather(
            x[: world.rank + 1]
        )

    sums, rows = independent(tf.ones([4]) * (world.rank + 1.0))
    found["order"], found["rows"] = sums.numpy().tolist(), rows.numpy().tolist()
    looped = tf.function(
        lambda x: tf.while_loop(
            lambda i, _: i < 3,
            lambda i, v: (i + 1, world.allreduce([v])[0]),
            (0, x),
            parallel_iterations=1,
        )
    )
    found["loop"] = looped(tf.ones([2]) * (world.rank + 1.0))[1].numpy().tolist()
    variables = [
        keras.Variable(np.full(shape, world.rank + 1.0, np.float32)) for shape in ((2, 2), ())
    ]
    world.average(variables)
    found["average"] = [v.numpy().tolist() for v in variables]
    variables[0].assign(np.full((2, 2), world.rank + 5.0))
    world.broadcast(variables)
    found["broadcast"] = [v.numpy().tolist() for v in variables]
    found["shared"] = world.broadcast_object(lambda: {"of": world.rank})
    found["gathered"] = world.allgather_object("x" * world.rank)
    try:
        world.broadcast_object(refused)
    except ConfigError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    ranks = join_world()
    if sys.argv[1] == "agree":
        every = ranks.allgather_object(agree(ranks))
        if ranks.first:
            print(json.dumps({"ranks": every, "identity": identify(), "carrier": carrier().name}))
    elif sys.argv[1] == "later":
        ranks.barrier()
        if ranks.first:
            time.sleep(8)
            print("rank 0 is done")
    elif ranks.rank == 1 and sys.argv[1] == "away":
        time.sleep(60)
    elif sys.argv[1] == "away":
        import_tensorflow()
        ranks.allreduce([np.ones(2, np.float32)])
    elif ranks.rank == 1:
        raise SystemExit(3)
    else:
        ranks.barrier()
