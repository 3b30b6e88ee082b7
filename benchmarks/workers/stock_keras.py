"""The training of stock Keras: keras.applications, `compile`, `fit`, one process.

Serves bench.py as chexlib.scaling.throughput does. Files are read by a loader in Python that
decodes and resizes each image in every epoch, as the 2018 code did.
"""

import json
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

settings = json.loads(sys.argv[1])
keras.config.set_dtype_policy(settings["precision"])
size, batch = settings["size"], settings["batch_per_rank"]
makers = {
    "densenet121": keras.applications.DenseNet121,
    "resnet50": keras.applications.ResNet50,
    "vgg16": keras.applications.VGG16,
}
backbone = makers[settings["topology"]](
    include_top=False, weights=None, input_shape=(size, size, 3), pooling="avg"
)
model = keras.Sequential([backbone, keras.layers.Dense(14, activation="sigmoid", dtype="float32")])
model.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9), loss="binary_crossentropy")


class Loader(keras.utils.PyDataset):
    """Batches of RGB images in [0, 1] and their labels, decoded and resized when asked for."""

    def __init__(self, paths):
        super().__init__()
        self.paths, self.labels = paths, np.random.default_rng(0).random((len(paths), 14)) > 0.9

    def __len__(self):
        return len(self.paths) // batch

    def __getitem__(self, i):
        chosen = slice(i * batch, (i + 1) * batch)
        images = [
            Image.open(path).convert("RGB").resize((size, size)) for path in self.paths[chosen]
        ]
        return np.stack([np.asarray(image, np.float32) / 255 for image in images]), self.labels[
            chosen
        ].astype("float32")


if paths := settings.get("paths"):
    data = Loader(paths)
else:
    rng = np.random.default_rng(0)
    pixels = tf.constant(rng.normal(size=(batch, size, size, 3)), tf.float32)
    labels = tf.constant(rng.random((batch, 14)) > 0.9, tf.float32)
    data = tf.data.Dataset.from_tensors((pixels, labels)).cache().repeat()

ends = []
clock = keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
)
while steps := int(sys.stdin.readline() or 0):
    ends[:] = [time.perf_counter()]
    model.fit(data, steps_per_epoch=steps, callbacks=[clock], verbose=0)
    print(json.dumps(np.diff(ends).tolist()), flush=True)
