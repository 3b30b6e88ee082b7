"""The study of notebook 05: what large batches cost each topology, and whether batch norm is why.

The study of 2018 claims that DenseNet-121 (121 batch-norm layers) loses accuracy by large batches,
and that ResNet-50 (53) and VGG-16 (none) do not. Asked here, and fixed before anything was run,
with A the mean test AUROC by the population's statistics, every cell at its own learning rate,
tuned on validation, at equal passes over the images:

- L(topology) = A(batch 32) - A(batch 512);
- D1 = L(DenseNet) - L(ResNet) and D2 = L(DenseNet) - L(VGG), which the claim says are above 0;
- a topology is studied only where its A(batch 32) is at least `GATE` and above the ridge
  regression's.

The trainings are stages of one grid: `STAGES`. Each is a list of points for `run_grid`, so any
number of processes share them, and what is measured is never measured again.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar, NamedTuple

import pandas as pd

from chexlib.evaluation.verdicts import Verdict, judge, judge_many
from chexlib.files import ROOT
from chexlib.studies.stages import (
    RATES_TRIED,
    TRAIN_IMAGES,
    TUNING_SEEDS,
    Study,
    gate_reason,
    rate_of,
)

ROWS = ROOT / "data" / "reference" / "rows" / "05_large_batch.jsonl"
PHANTOM = {"images": 10_000, "difficulty": "easy", "seed": 0}  # of which these rows are

TOPOLOGIES = ("densenet121", "resnet50", "vgg16")
BATCHES = (32, 128, 512, 2048)  # images per update
SMALL, LARGE = 32, 512  # the two that are compared
OTHERS = {"D1": "resnet50", "D2": "vgg16"}  # what each difference sets beside DenseNet-121
LOCAL_BATCH = 32  # images that are normalised together
PASSES = 8
WARMUP = 0.1  # share of the updates
SEEDS = tuple(range(10))
# D1 and D2 have twenty seeds where the first five show a larger standard deviation than ten are
# made for: with this one ten see a difference of 0.02 in 94 % of all studies.
MORE_SEEDS, LOOK, DEVIATION = tuple(range(20)), 5, 0.016
FEWER_SEEDS = SEEDS[:6]  # of the stages that explain what the first ones find
RECIPE_SEEDS = SEEDS[:5]
RECIPE_RATE = 1e-3  # Adam's, of the script of 2018, whatever the number of ranks
DOSES = (0.75, 0.5, 0.25)  # shares of DenseNet's norms that are group norm
LOCAL_BATCHES = (8, 128, 512)  # images normalised together, beside `LOCAL_BATCH`

# Where tuning starts: the least exponent of its rates.
FIRST_RATE = {
    "densenet121": {32: -2, 128: -2, 512: -1, 2048: -1},
    "resnet50": {32: -2, 128: -2, 512: -1, 2048: -1},
    "vgg16": {32: -4, 128: -4, 512: -3, 2048: -3},
    "vgg16_bn": {32: -3, 512: -2},
}
# Of a training of `PASSES` on one core, mean of the batches.
SECONDS = {"densenet121": 93, "resnet50": 60, "vgg16": 33, "vgg16_bn": 45}


class Cell(NamedTuple):
    """What has a learning rate of its own."""

    topology: str
    batch: int
    norm: str = "batch"

    def __str__(self) -> str:
        """For a sentence."""
        norm = "" if self.norm == "batch" else f" with {self.norm} norm"
        return f"{self.topology}{norm} at batch {self.batch}"


CELLS = tuple(Cell(topology, batch) for topology in TOPOLOGIES for batch in BATCHES)
PAIRS = tuple(Cell(topology, batch) for topology in TOPOLOGIES for batch in (SMALL, LARGE))
# The causal test: batch norm taken from those that have it, and given to the one that has none.
SWAPPED = {"densenet121": ("densenet121", "group"), "resnet50": ("resnet50", "group")}
SWAPPED |= {"vgg16": ("vgg16_bn", "batch")}
SWAPS = tuple(
    Cell(topology, batch, norm) for topology, norm in SWAPPED.values() for batch in (SMALL, LARGE)
)


def settings_of(
    cell: Cell, rate: float, *, seed: int, passes: int = PASSES, local_batch: int = LOCAL_BATCH
) -> dict:
    """A cell's training as settings of `TrainConfig`: Adam, a warm-up, then a rate that falls to 0
    by a cosine, so that moving statistics settle.
    """
    local_batch = min(local_batch, cell.batch)
    warmup = {"kind": "warmup", "length": WARMUP * passes, "rate": rate, "start": rate / 10}
    decay = {"kind": "cosine", "length": (1 - WARMUP) * passes, "rate": rate}
    return {
        "topology": cell.topology,
        "norm": cell.norm,
        "batch_size": local_batch,
        "accumulation": cell.batch // local_batch,
        "epochs": passes,
        "learning_rate": rate,
        "schedule": {"unit": "epochs", "phases": [warmup, decay]},
        "seed": seed,
    }


class Switches(NamedTuple):
    """What the script of 2018 did (True), and what is done elsewhere in this study (False)."""

    # The rate is divided by 10 after an epoch that lowers the validation loss by less than 0.01;
    # else a warm-up, and a decay to 0.
    plateau: bool = True
    # The rate is the same for any number of ranks; else it grows by the root of the batch.
    fixed_rate: bool = True
    # The head's biases start at 1; else at the log-odds of each finding.
    head_at_one: bool = True


def recipe_of(topology: str, switches: Switches, *, seed: int) -> dict:
    """The recipe of 2018 at batch `LARGE`, each part of it on or off, as settings of
    `TrainConfig`.
    """
    rate = RECIPE_RATE if switches.fixed_rate else RECIPE_RATE * (LARGE / LOCAL_BATCH) ** 0.5
    settings = settings_of(Cell(topology, LARGE), rate, seed=seed)
    if switches.plateau:
        settings |= {"schedule": "", "plateau_delta": 0.01}
    return settings | {"head_bias": 1.0 if switches.head_at_one else None}


class LargeBatchStudy(Study):
    """The grid of the study on one data set.

    "pair" (rates by "tune_pair") is the part of "confirm" that answers D1 and D2. The stages after
    "fixed" explain what the first ones find: "swap" (rates by "tune_swap"), "recipe", "dose",
    "updates" and "local".
    """

    NOTEBOOK = "05"
    CELLS: ClassVar = CELLS
    STAGES: ClassVar = (
        *("gate", "tune_pair", "pair", "tune", "confirm", "fixed", "tune_swap", "swap", "recipe"),
        *("dose", "updates", "local"),
    )

    def point(self, cell: Cell, rate: float, **how) -> dict:
        """The point of a training; `how` as for `settings_of`."""
        return self.point_of(settings_of(cell, rate, **how))

    def first_exponent(self, cell: Cell) -> int:
        return FIRST_RATE[cell.topology][cell.batch]

    def seconds_of(self, point: dict) -> float:
        share = point.get("max_steps", 0) * LOCAL_BATCH / TRAIN_IMAGES or point.get("epochs", 0)
        return SECONDS.get(point["topology"], 0) * share / PASSES

    def gate(self) -> list[dict]:
        """The ridge regression, and each topology at the smallest batch, at rates around the middle
        of its ladder.
        """
        points = [self.ridge()]
        for topology in TOPOLOGIES:
            middle = FIRST_RATE[topology][SMALL] + RATES_TRIED // 2
            for exponent in (middle - 2, middle - 1, middle):
                rate = rate_of(exponent)
                points.append(self.point(Cell(topology, SMALL), rate, seed=TUNING_SEEDS[0]))
        return points

    def confirm(self) -> list[dict]:
        """Every cell at its tuned rate, `SEEDS`; a seed of all cells is whole before the next."""
        rates = self.rates()
        return [self.point(cell, rates[cell], seed=seed) for seed in SEEDS for cell in self.CELLS]

    def fixed(self) -> list[dict]:
        """The study's way: the rate of the smallest batch is kept at every larger one."""
        rates = self.rates()
        larger = [cell for cell in self.CELLS if cell.batch > SMALL]
        return [
            self.point(cell, rates[cell._replace(batch=SMALL)], seed=seed)
            for seed in SEEDS
            for cell in larger
        ]

    def tuned_cells(self) -> dict[str, tuple[Cell, ...]]:
        return {"tune_pair": PAIRS, "tune": self.CELLS, "tune_swap": SWAPS}

    def tune_pair(self) -> list[dict]:
        """What the cells of the two compared batches need next to be tuned."""
        return self.tune(PAIRS)

    def pair(self) -> list[dict]:
        """The two compared batches at their tuned rates, `SEEDS` or `MORE_SEEDS`."""
        rates = self.rates(PAIRS)

        def points(seeds):
            return [self.point(cell, rates[cell], seed=seed) for seed in seeds for cell in PAIRS]

        first = self.rows(points(SEEDS[:LOOK]))
        if len(first) < LOOK * len(PAIRS):
            return points(SEEDS)
        differences = differences_of(_by_seed(first)).values()
        return points(MORE_SEEDS if max(d.std() for d in differences) > DEVIATION else SEEDS)

    def tune_swap(self) -> list[dict]:
        """What the cells with another norm need next to be tuned."""
        return self.tune(SWAPS)

    def swap(self) -> list[dict]:
        """Group norm in the place of batch norm, and VGG-16 with batch norm, at their own rates."""
        rates = self.rates(SWAPS)
        return [self.point(cell, rates[cell], seed=seed) for seed in SEEDS for cell in SWAPS]

    def recipe(self) -> list[dict]:
        """The recipe of 2018 on DenseNet-121, each switch on and off; all of it and nothing of it
        on the two others.
        """
        every = [Switches(*on) for on in itertools.product((True, False), repeat=3)]
        arms = [("densenet121", switches) for switches in every]
        arms += [(name, switches) for name in ("resnet50", "vgg16") for switches in every[::7]]
        return [
            self.point_of(recipe_of(topology, switches, seed=seed))
            for seed in RECIPE_SEEDS
            for topology, switches in arms
        ]

    def dose(self) -> list[dict]:
        """DenseNet-121 with group norm in a share of its layers, at the rates of batch norm."""
        rates, cells = self.rates(PAIRS), [Cell("densenet121", batch) for batch in (SMALL, LARGE)]
        return [
            self.point_of(
                settings_of(cell, rates[cell], seed=seed) | {"group_share": share},
            )
            for seed in FEWER_SEEDS
            for share in DOSES
            for cell in cells
        ]

    def updates(self) -> list[dict]:
        """Equal updates: batch 32 for the 64 and 16 updates of batches 512 and 2,048, and batch 512
        for four times the passes.
        """
        rates, points = self.rates(PAIRS), []
        for seed, topology in itertools.product(FEWER_SEEDS, TOPOLOGIES):
            small, large = Cell(topology, SMALL), Cell(topology, LARGE)
            for batch in (512, 2048):
                few = settings_of(small, rates[small], seed=seed, passes=1)
                few["max_steps"] = PASSES * TRAIN_IMAGES // batch
                points.append(self.point_of(few))
            points.append(self.point(large, rates[large], seed=seed, passes=4 * PASSES))
        return points

    def local(self) -> list[dict]:
        """Batch 512 with more and fewer images normalised together."""
        rates, points = self.rates(PAIRS), []
        for seed, topology in itertools.product(FEWER_SEEDS, ("densenet121", "resnet50")):
            cell = Cell(topology, LARGE)
            for local in LOCAL_BATCHES:
                points.append(self.point(cell, rates[cell], seed=seed, local_batch=local))
        return points

    def scores(self, stage: str = "confirm") -> pd.DataFrame:
        """Test AUROC of a stage's rows: index seed, columns (topology, batch), NaN where there is no
        row yet.
        """
        points = getattr(self, stage)()
        cells = [(p["topology"], p["batch_size"] * p["accumulation"]) for p in points]
        columns = pd.MultiIndex.from_tuples(dict.fromkeys(cells), names=["topology", "batch"])
        return _by_seed(self.rows(points)).reindex(columns=columns)

    def recipe_scores(self) -> pd.DataFrame:
        """Test AUROC of "recipe": index seed, columns topology and the names of `Switches`."""
        rows = self.rows(self.recipe())
        columns = {
            "plateau": rows["schedule"].isin(["", None]),
            "fixed_rate": rows["learning_rate"] == RECIPE_RATE,
            "head_at_one": rows["head_bias"] == 1.0,
        }
        rows = rows.assign(**columns)
        return rows.pivot_table(index="seed", columns=["topology", *columns], values="auroc")


def _by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.pivot_table(index="seed", columns=["topology", "batch"], values="auroc")


def losses_of(scores: pd.DataFrame) -> pd.DataFrame:
    """L, the AUROC lost from `SMALL` to `LARGE`, of scores as of `LargeBatchStudy.scores`: index
    seed, columns topology.
    """
    by_batch = scores.swaplevel(axis="columns")
    return by_batch[SMALL] - by_batch[LARGE]


def differences_of(scores: pd.DataFrame) -> dict[str, pd.Series]:
    """D1 and D2 by seed, of scores as of `LargeBatchStudy.scores`."""
    lost = losses_of(scores)
    return {claim: lost["densenet121"] - lost[other] for claim, other in OTHERS.items()}


def answers_of(scores: pd.DataFrame, *, baseline: float) -> dict[str, Verdict | str]:
    """D1 and D2, which the claim of 2018 says are above 0, each judged by itself.

    Where a topology has not passed the gate there is no verdict, but the reason why.

    Parameters
    ----------
    scores : as of `LargeBatchStudy.scores`
    baseline : mean test AUROC of the ridge regression
    """
    answers = {}
    for claim, differences in differences_of(scores).items():
        reasons = [
            gate_reason(f"{name} at batch {SMALL}", scores[(name, SMALL)].mean(), baseline)
            for name in ("densenet121", OTHERS[claim])
        ]
        answers[claim] = "; ".join(filter(None, reasons)) or judge(differences)
    return answers


def swap_effects(confirmed: pd.DataFrame, swapped: pd.DataFrame) -> dict[str, Verdict]:
    """How much less each topology loses by its large batch without batch norm, by topology: above
    0 where batch norm is a cause. Corrected for three looks.

    Parameters
    ----------
    confirmed, swapped : as of `LargeBatchStudy.scores` of "confirm" and "swap"
    """
    with_norm, without = losses_of(confirmed), losses_of(swapped)
    effects = {}
    for topology, (other, norm) in SWAPPED.items():
        less = with_norm[topology] - without[other]
        effects[topology] = less if norm == "group" else -less
    return judge_many(effects)


def recipe_effects(scores: pd.DataFrame) -> dict[str, Verdict]:
    """What each switch of the recipe costs DenseNet-121, the mean over the other two: above 0 where
    it costs AUROC. Corrected for three looks.

    Parameters
    ----------
    scores : as of `LargeBatchStudy.recipe_scores`
    """
    densenet = scores["densenet121"]
    effects = {}
    for name in Switches._fields:
        by_switch = densenet.T.groupby(level=name).mean().T
        effects[name] = by_switch[False] - by_switch[True]
    return judge_many(effects)


def study_on(data: str | Path, *, table: str | Path = ROWS) -> LargeBatchStudy:
    """`Study.on` of this study."""
    return LargeBatchStudy.on(data, table)


def committed_study() -> LargeBatchStudy:
    """`Study.committed` of this study."""
    return LargeBatchStudy.committed(ROWS)
