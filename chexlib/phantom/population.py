"""Population of the phantom: patients, views and findings, sampled from the table of the 112,120 NIH
films.

Each combination of findings is as frequent as there, given the view position, so prevalence and
co-occurrence are those of the table (`nih_label_combinations.csv`: films per combination, in all
and by view).
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from chexlib.errors import ConfigError
from chexlib.findings import FINDINGS, NO_FINDING

# Probability that a follow-up copies view and findings of the film before (0.155 in the NIH table).
# Drawn anew they often agree too, mostly in no finding: in all 34 to 40 % have the findings before.
REPEAT = 0.16
# NIH patients with 1, 2, ... 20 films; the 803 with more (up to 184) are left out.
FILMS = (
    17503,
    4113,
    2100,
    1330,
    938,
    787,
    608,
    494,
    387,
    320,
    281,
    235,
    165,
    181,
    121,
    120,
    91,
    77,
    77,
    74,
)


@dataclass(frozen=True)
class Difficulty:
    """How plain the signs are.

    Strength 1 is a textbook sign, 0.2 is hard to see even for one who knows.
    """

    strength: float  # median strength of a sign
    spread: float  # standard deviation of the logarithm of the strength
    # Strength of what mimics findings on normal films: haze, skin folds, nipples, heart size.
    lookalikes: float
    noise: float  # standard deviation of the quantum noise, as a fraction of the grey scale
    absent: float  # probability that a labelled finding shows no sign (an error of the label)
    unlabelled: float  # signs without a label, as a fraction of the finding's prevalence


DIFFICULTIES = {
    "easy": Difficulty(
        strength=1.1, spread=0.25, lookalikes=0.4, noise=0.008, absent=0.0, unlabelled=0.0
    ),
    "standard": Difficulty(
        strength=0.75, spread=0.5, lookalikes=1.0, noise=0.014, absent=0.06, unlabelled=0.04
    ),
    "hard": Difficulty(
        strength=0.5, spread=0.6, lookalikes=1.4, noise=0.022, absent=0.1, unlabelled=0.08
    ),
}


@dataclass(frozen=True)
class Description:
    """All that decides a picture but size and difficulty.

    `findings` are labels, `shown` the signs drawn.
    """

    seed: int
    patient: int
    follow_up: int
    sex: str
    age: int
    view: str
    findings: tuple[str, ...]
    shown: tuple[str, ...]

    @property
    def image(self) -> str:
        """File name of the picture."""
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


def level_of(difficulty) -> Difficulty:
    """The knobs behind a name; a Difficulty of one's own passes through."""
    if isinstance(difficulty, Difficulty):
        return difficulty
    if difficulty not in DIFFICULTIES:
        raise ConfigError(
            f"difficulty={difficulty!r} is not accepted. Use one of {', '.join(DIFFICULTIES)}."
        )
    return DIFFICULTIES[difficulty]


def stream(seed, *key):
    """A generator of its own for each purpose, so that leaving out one finding changes nothing
    else.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, *key)))


@cache
def _table(min_prevalence):
    """(findings, view) pairs of the NIH table, their cumulative probability, each finding's
    prevalence.
    """
    with open(
        Path(__file__).with_name("nih_label_combinations.csv"), newline="", encoding="utf-8"
    ) as file:
        rows = list(csv.DictReader(file))
    pairs, films = [], []
    for view in ("PA", "AP"):
        for row in rows:
            labels = row["Finding Labels"].split("|")
            pairs.append((tuple(label for label in labels if label != NO_FINDING), view))
            films.append(float(row[view]))
    weight, has = (
        np.array(films),
        np.array([[f in labels for f in FINDINGS] for labels, _ in pairs]),
    )
    weight /= weight.sum()
    for _ in range(2000):
        low = weight @ has < min_prevalence
        if not low.any():
            break
        for k in np.flatnonzero(low):
            now = weight[has[:, k]].sum()
            raised = (min_prevalence + 1e-6) * (1 - now)
            weight[has[:, k]] *= raised / (now * (1 - min_prevalence))
            weight /= weight.sum()
    else:
        raise ConfigError(
            f"min_prevalence={min_prevalence}: the NIH combinations cannot be re-weighted that far "
            f"(reached {(weight @ has).min():.3f}). Use a smaller value."
        )
    return pairs, np.cumsum(weight), weight @ has


def sample_patient(
    seed, patient, *, difficulty="standard", min_prevalence=0.0, repeat=REPEAT
) -> list[Description]:
    """All films of one patient, described and not yet drawn.

    View and findings are drawn together from the NIH table; with probability `repeat` a follow-up
    copies those of the film before and is not drawn anew, which leaves the overall frequencies as
    they are. Patients have at most 20 films.
    """
    level = level_of(difficulty)
    pairs, cumulative, prevalence = _table(float(min_prevalence))
    rng = stream(seed, patient, 5)
    patient_number = rng.random() * sum(FILMS)
    films = 1 + int(np.searchsorted(np.cumsum(FILMS), patient_number, side="right"))
    sex = "M" if rng.random() < 0.58 else "F"
    age, gap = float(np.clip(rng.normal(46.6, 16.6), 1, 95)), rng.exponential(0.4)
    described, pair = [], None
    for follow_up in range(films):
        luck, pick, flips = rng.random(), rng.random(), rng.random(len(FINDINGS))
        if pair is None or luck >= repeat:
            row = int(np.searchsorted(cumulative, pick, side="right"))
            pair = pairs[min(row, len(pairs) - 1)]
        labels, view = pair
        labelled = np.array([finding in labels for finding in FINDINGS])
        limits = np.where(labelled, 1 - level.absent, level.unlabelled * prevalence)
        shown = tuple(FINDINGS[k] for k in np.flatnonzero(flips < limits))
        years = int(min(age + gap * follow_up, 95))
        described.append(Description(seed, patient, follow_up, sex, years, view, labels, shown))
    return described
