"""The machine's matrix peak: multiplications of two large matrices by oneDNN, float32 or what is
named.

Serves bench.py as chexlib.scaling.throughput does: answers with the seconds of each 2 n^3
operations, n = 2048.
"""

import json
import sys
import time

import tensorflow as tf

a = tf.random.normal((2048, 2048), dtype=sys.argv[1] if len(sys.argv) > 1 else "float32")
multiply = tf.function(lambda: tf.reduce_sum(tf.linalg.matmul(a, a)[:1]))
while steps := int(sys.stdin.readline() or 0):
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        multiply().numpy()
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds), flush=True)
