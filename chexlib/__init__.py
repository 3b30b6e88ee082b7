"""chexlib: the thin package behind the AI-radiologist notebooks."""

import os

# TensorFlow uses oneDNN by itself only on CPUs with AVX512-VNNI or newer; on others it is faster
# too (benchmarks/). It is read when TensorFlow is imported, so it must be set before.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# HDF5 locks what it opens, which NFS and Lustre may refuse; no such file is shared here.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
