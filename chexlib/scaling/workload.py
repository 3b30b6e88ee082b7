"""What a network asks of a cluster: operations, gradients, and when in the backward pass each of
these is ready.
"""

from __future__ import annotations

from dataclasses import dataclass

from chexlib.scaling.throughput import layer_costs


@dataclass(frozen=True)
class Workload:
    """Gradients in the order in which the backward pass makes them."""

    name: str
    gflop: float  # 10^9 operations of a training step for one image
    sizes: tuple[float, ...]  # bytes of each gradient
    ready: tuple[float, ...]  # share of the step's compute after which it is there, 0 to 1

    @property
    def size(self) -> float:
        """Bytes of all gradients."""
        return sum(self.sizes)


def workload_of(model, name: str = "", *, biases: bool = True) -> Workload:
    """Read the workload from the layers of a network.

    The forward pass takes its share of the operations, then layers follow from the last to the
    first, each taking its own; a layer's gradients are ready at its end. Time is taken to follow
    the operations of `training_gflop`.

    Parameters
    ----------
    model : keras.Model
        Built for images of a fixed size.
    biases : bool
        Count biases of convolutions too. Keras' ResNet-50 has them, that of He et al. (2016) has
        not.
    """
    import keras

    costs = layer_costs(model)
    done = sum(forward for _, forward, _ in costs)
    total = done + sum(backward for _, _, backward in costs)
    sizes, ready = [], []
    for layer, _, backward in reversed(costs):
        done += backward
        for variable in layer.trainable_variables:
            if biases or not isinstance(layer, keras.layers.Conv2D) or len(variable.shape) > 1:
                sizes.append(4.0 * variable.value.shape.num_elements())
                ready.append(done / total)
    return Workload(name or model.name, total / 1e9, tuple(sizes), tuple(ready))
