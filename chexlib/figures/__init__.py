"""Figures of the notebooks: `from chexlib import figures`, then `figures.auroc_bars(table)`.

Each function draws what it is given and returns a matplotlib Figure, so that a cell that ends with
it shows it once. No reading depends on colour alone.
"""

# ruff: noqa: F401
from chexlib.figures.data import radiographs
from chexlib.figures.judgement import auroc_bars, forest, heat_figure
from chexlib.figures.mechanisms import (
    batch_norm_statistics,
    data_parallel_step,
    leaking_split,
    ring_allreduce,
)
from chexlib.figures.style import set_theme
from chexlib.figures.training import history
