"""Training of the networks: settings, loop, schedules, checkpoints, and grids of trainings."""

# Raise by hand whenever a training of the same settings comes to other weights or scores.
# Rows of grids that another version made are then trained anew (`chexlib.studies.grid`).
TRAINING_VERSION = 3  # rows of release 0.1.0 name none
