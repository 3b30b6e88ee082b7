"""What a network asks of a cluster, counted from its layers: operations, gradients, and when in the
backward pass each of these is ready.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def training_gflop(model) -> float:
    """Floating-point operations of one training step for one image, in 10^9, a multiply-add being
    two.

    Those of convolutions and dense layers, forward and backward: the gradient of the inputs and
    that of the kernel cost as much as the forward pass each, but the first convolution has no
    gradient of its inputs. What else there is (normalisation, activations, pooling) is under 2 % in
    these networks.

    Parameters
    ----------
    model : keras.Model
        Built for images of a fixed size.
    """
    return sum(forward + backward for _, forward, backward in layer_costs(model)) / 1e9


def layer_costs(model) -> list[tuple]:
    """The layers of a network in the order of its forward pass, with what each costs a step.

    Returns
    -------
    list of (keras.Layer, float, float)
        Operations for one image, forward and backward. The backward pass of the first layer that
        has any is that of its kernel alone: nothing needs the gradient of the pixels.
    """
    costs = [(layer, *layer_flops(layer)) for layer in _ordered_layers(model)]
    for place, (layer, forward, backward) in enumerate(costs):
        if forward:
            costs[place] = (layer, forward, backward - forward)
            break
    return costs


def _ordered_layers(model):
    """The layers of a network, those of a network inside it in its place.

    Keras' own `_flatten_layers` gives the layers of a network inside another one last layer first.
    """
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _ordered_layers(layer)
        else:
            yield layer


def layer_flops(layer) -> tuple[float, float]:
    """Operations of one Keras layer for one image, forward and backward; 0 of what is no
    convolution and not dense.
    """
    import keras

    if not isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
        return 0.0, 0.0
    *places, _ = layer.output.shape[1:]
    forward = 2.0 * math.prod(layer.kernel.shape) * math.prod(places)
    return forward, 2 * forward


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
