"""What a training step costs."""

from __future__ import annotations

import math


def training_gflop(model) -> float:
    """Floating-point operations of one training step for one image, in 10^9, a multiply-add being two.

    Those of convolutions and dense layers, forward and backward: the gradient of the inputs and that of the kernel
    cost as much as the forward pass each, but the first convolution has no gradient of its inputs. What else there is
    (normalisation, activations, pooling) is under 2 % in these networks.

    Parameters
    ----------
    model : keras.Model
        Built for images of a fixed size.
    """
    import keras

    total, first = 0.0, True
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            *places, _ = layer.output.shape[1:]
            forward = 2.0 * math.prod(layer.kernel.shape) * math.prod(places)
            total += forward * (2 if first else 3)
            first = False
    return total / 1e9
