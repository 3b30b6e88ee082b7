"""Reference results: what a run found, kept as `data/reference/<notebook>.json`, and a fresh run
compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

# Of Student's t: a hundred times as fast as scipy.stats.
from scipy.special import logit, stdtr, stdtrit

from chexlib.errors import ConfigError, DataError
from chexlib.evaluation.intervals import holm
from chexlib.files import ROOT, atomic_write, read_json, write_json
from chexlib.machine import command

VERDICTS = ALIKE, APART, UNKNOWN = "no difference shown", "DIFFERENT", "no interval"
COLUMNS = ["reference", "low", "high", "run", "run low", "run high", "p"]
COUNTS = ("seeds", "rounds", "positives", "patients")  # of what an interval was made of
# Three seeds of one training had mean AUROCs with a standard deviation of 0.012, beside a standard
# error of 0.008 over patients (benchmarks/README.md): what another seed adds to the variance of a
# figure whose interval is over patients.
TRAINING = 2.0
ERROR = 0.05  # of comparisons of two honest runs, in how many any figure may be called different


@dataclass(frozen=True)
class Estimate:
    """A figure that has an interval, or would have one with more seeds or patients.

    Attributes
    ----------
    value : float
    low, high : float or None
    count : int or None
        Seeds, rounds, positives or patients that the interval was made of.
    repeated : bool
        Whether the interval is over seeds or rounds, so that other trainings are in it.
    """

    value: float
    low: float | None
    high: float | None
    count: int | None = None
    repeated: bool = False

    @property
    def known(self) -> bool:
        """Whether it has an interval; one of no width says that nothing varied, not that it is
        certain.
        """
        return None not in (self.low, self.high) and self.low < self.high

    def error(self, *, upwards: bool) -> float:
        """Standard error on the side of larger values, or of smaller ones, over patients and
        trainings.
        """
        reach = self.high - self.value if upwards else self.value - self.low
        error = max(reach, 0.0) / stdtrit(self.freedom, 0.975)
        return error if self.repeated else error * math.sqrt(1 + TRAINING)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of its interval."""
        return math.inf if self.count is None else max(self.count - 1, 1)


def keep_reference(folder: Path, profile: str, *, root: Path = ROOT) -> None:
    """One file with what a notebook found and how (metrics, parameters, environment, profile), and
    its main figure.

    A run that differs from the one kept by its seed alone does not replace it: its figures are
    added to `seeds`, from which `compare_run` takes how far two seeds are apart.
    """
    results = {}
    for name in ("metrics", "params", "environment"):
        results[name] = read_json(folder / f"{name}.json")
    results["environment"]["command"] = command()  # not the kernel's, which says nothing
    target = root / "data" / "reference" / f"{folder.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = read_json(target)
    again = bool(kept) and _is_of_one_code(kept, results, profile)
    seed = results["params"].get("seed")
    if again and kept["params"].get("seed") != seed:
        values = {name: estimate.value for name, estimate in estimates(results["metrics"])}
        kept.setdefault("seeds", {})[str(seed)] = values
        write_json(target, kept)
        return
    if again and "seeds" in kept:
        results["seeds"] = kept["seeds"]
    write_json(target, {"notebook": folder.name, "profile": profile, **results})
    if (figure := folder / "figures" / "auroc.png").exists():
        with atomic_write(target.with_suffix(".png")) as file:
            file.write(figure.read_bytes())


def _is_of_one_code(kept: Mapping, results: Mapping, profile: str) -> bool:
    """Whether two runs are of one known code and one setting, seeds apart."""
    commit = results["environment"].get("commit")
    if commit is None or commit.endswith("-dirty"):
        return False
    if commit != kept["environment"].get("commit") or profile != kept["profile"]:
        return False
    return _without_seeds(kept["params"]) == _without_seeds(results["params"])


def _without_seeds(params):
    if not isinstance(params, Mapping):
        return params
    return {name: _without_seeds(value) for name, value in params.items() if name != "seed"}


def compare_run(run: str | Path, *, reference: str | Path = "") -> dict[str, dict]:
    """Set what a run found beside the reference results, notebook by notebook.

    Two figures are compared by their difference over its standard error. This comes from their 95 %
    intervals, each on the side of the other (Zou and Donner 2008), with Student's t for the seeds
    or patients behind them (Welch 1947). One over patients is widened by `TRAINING`, as another
    seed changes more than the patients. Where the reference has three seeds or more, the error
    comes from their spread instead. Since many figures are looked at, p is corrected over all of
    the run (Holm 1979): of two honest runs 5 % at most show any difference.

    Parameters
    ----------
    run : folder of a run, with one folder per notebook
    reference : folder of the reference results; empty for `data/reference` of the project

    Returns
    -------
    dict
        Of each notebook that is in both: profile, of the reference; parameters, {name: (reference,
        run)} of those that differ; estimates, a DataFrame with a row for each figure that has an
        interval in one of them: reference and run, each with low and high, p (corrected), and
        verdict: `ALIKE`, `APART`, or `UNKNOWN` where there is no interval in one of them.

    Raises
    ------
    ConfigError
        There is no such folder, or no notebook is in both.
    DataError
        A file of the run or of the reference is damaged.
    """
    folder = Path(reference or ROOT / "data" / "reference")
    compared = {}
    if not Path(run).is_dir():
        raise ConfigError(
            f"there is no run folder {run}. Name a run's folder, such as runs/latest."
        )
    for file in sorted(Path(run).glob("[0-9]*/metrics.json")):
        kept = read_json(folder / f"{file.parent.name}.json")
        if not kept:
            continue
        try:
            before, now = kept["params"], read_json(file.with_name("params.json"))
            parameters = {}
            for name in {**before, **now}:
                if before.get(name) != now.get(name):
                    parameters[name] = (before.get(name), now.get(name))
            compared[file.parent.name] = {
                "profile": kept["profile"],
                "parameters": parameters,
                "estimates": _side_by_side(kept, read_json(file)),
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} cannot be compared with its reference: one of them is damaged ({error!r}). "
                "Restore it, or move its folder away."
            ) from error
    if not compared:
        names = ", ".join(file.stem for file in sorted(folder.glob("*.json"))) or "none"
        raise ConfigError(
            f"{run} has no results that can be compared. Name the folder of a run, such as "
            f"runs/latest, with one of these notebooks: {names}."
        )
    tables = [notebook["estimates"] for notebook in compared.values()]
    corrected = holm(np.concatenate([table["p"].to_numpy(float) for table in tables]))
    ends = np.cumsum([len(table) for table in tables])
    for table, p in zip(tables, np.split(corrected, ends[:-1]), strict=True):
        table["p"] = p
        table["verdict"] = np.select([np.isnan(p), p < ERROR], [UNKNOWN, APART], ALIKE)
    return compared


def _side_by_side(kept: Mapping, metrics: Mapping) -> pd.DataFrame:
    """Figures that are in the reference results and in a run's metrics, with p uncorrected."""
    reference, fresh = dict(estimates(kept["metrics"])), dict(estimates(metrics))
    seeds = kept.get("seeds", {}).values()
    rows = {}
    for name, then in reference.items():
        if name not in fresh:
            continue
        now = fresh[name]
        others = [values[name] for values in seeds if values.get(name) is not None]
        p = difference_p(then, now, others)
        rows[name] = [then.value, then.low, then.high, now.value, now.low, now.high, p]
    return pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)


def difference_p(one: Estimate, other: Estimate, seeds: list[float]) -> float:
    """How often chance alone sets two figures so far apart; NaN if neither seeds nor intervals
    tell.

    `seeds` are values of the first one with other seeds.
    """
    if len(seeds) >= 2:
        values, value = np.array([one.value, *seeds]), other.value
        inside = all(0 < v < 1 for v in (*values, value))
        if inside and one.known and one.low > 0 and one.high < 1:
            values, value = logit(values), logit(value)  # where those of an AUROC near 1 lie evenly
        apart = value - values.mean()
        errors = [values.std(ddof=1) * np.sqrt(1 + 1 / len(values))]
        freedoms = [len(values) - 1]
    elif one.known and other.known:
        apart = other.value - one.value
        errors = [one.error(upwards=apart > 0), other.error(upwards=apart < 0)]
        freedoms = [one.freedom, other.freedom]
    else:
        return np.nan
    if apart == 0:
        return 1.0
    variance = np.square(errors)
    if not variance.sum():
        return 0.0
    freedom = variance.sum() ** 2 / max((variance**2 / freedoms).sum(), np.finfo(float).tiny)
    return float(2 * stdtr(freedom, -abs(apart) / np.sqrt(variance.sum())))


def estimates(metrics, path: str = "") -> Iterator[tuple[str, Estimate]]:
    """(path, estimate) of every figure in the metrics of a notebook that has an interval, whatever
    it is named.

    An interval is two keys that are alike but for `low` and `high`. Its figure has their name
    without this word, such as `ap` of `ap_low`; or else it is the last number before them that lies
    between them.
    """
    if isinstance(metrics, list):
        metrics = dict(zip(_labels(metrics), metrics, strict=True))
    if not isinstance(metrics, Mapping):
        return
    counts = [metrics[name] for name in COUNTS if isinstance(metrics.get(name), int | float)]
    for name, low, high in _intervals(metrics):
        count = int(counts[0]) if counts else None
        repeated = "seeds" in metrics or "rounds" in metrics
        yield f"{path}{name}", Estimate(metrics[name], metrics[low], metrics[high], count, repeated)
    for name, value in metrics.items():
        yield from estimates(value, f"{path}{name} / ")


def _intervals(row: Mapping) -> Iterator[tuple[str, str, str]]:
    """Names of each figure of a row and of the ends of its interval."""
    names = list(row)
    for index, low in enumerate(names):
        words = low.split("_")
        if "low" not in words:
            continue
        at = words.index("low")
        high = "_".join([*words[:at], "high", *words[at + 1 :]])
        base = "_".join(words[:at] + words[at + 1 :])
        if high not in row:
            continue
        no_interval = None in (row[low], row[high])
        candidates = [base]
        if base not in row:
            candidates = [name for name in names[:index][::-1] if _may_be_a_figure(name, row[name])]
            if not no_interval:
                candidates = [n for n in candidates if _lies_between(row[low], row[n], row[high])]
        if candidates and _is_number(row[candidates[0]]):
            yield candidates[0], low, high


def _may_be_a_figure(name: str, value) -> bool:
    """Whether it is no end of an interval and no count."""
    return not {"low", "high"} & set(name.split("_")) and not isinstance(value, int)


def _lies_between(low: float, value, high: float) -> bool:
    return _is_number(value) and low <= value <= high


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _labels(rows: list) -> list[str]:
    """The rows of a table are known by their settings, which stand before their first figure, not
    by their place.
    """
    for kinds in ((str, int, list), (str, int, list, float)):
        labels = [_label(row, kinds) or str(index) for index, row in enumerate(rows)]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}, {index}" for index, label in enumerate(labels)]


def _label(row, kinds: tuple) -> str:
    """Settings of a row, "" if it has none."""
    if not isinstance(row, Mapping):
        return ""
    names = list(row)
    first_figure = min((names.index(name) for name, _, _ in _intervals(row)), default=None)
    settings = []
    for name in names[:first_figure]:
        if isinstance(row[name], kinds) and name != "seeds":
            settings.append(f"{name} {row[name]}")
    return ", ".join(settings)
