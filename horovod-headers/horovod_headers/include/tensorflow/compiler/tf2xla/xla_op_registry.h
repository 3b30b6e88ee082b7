// Empty on purpose: Horovod's XLA file includes this header, and uses it on GPUs only.
