"""The config of a training that takes seconds."""

from chexlib.training.config import TrainConfig


def config_for(data_dir, run_dir, **changes):
    """Of VGG-16 on 32-pixel radiographs, as `changes` ask for."""
    settings = dict(topology="vgg16", size=32, epochs=2, batch_size=8, learning_rate=1e-4, split="patient")
    settings["precision"] = "float32"  # whatever the processor is made for
    return TrainConfig(data_dir=str(data_dir), run_dir=str(run_dir), **{**settings, **changes})
