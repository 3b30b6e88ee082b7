"""Reference results: what a run found, kept as `data/reference/<notebook>.json`, and a fresh run
compared with it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from chexlib.errors import ConfigError
from chexlib.files import ROOT, write_json
from chexlib.machine import command

ALIKE, APART, UNKNOWN = "no difference shown", "DIFFERENT", "no interval"
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
        from scipy.special import stdtrit  # of Student's t; a hundred times as fast as scipy.stats

        reach = self.high - self.value if upwards else self.value - self.low
        return (
            max(reach, 0.0)
            / stdtrit(self.freedom, 0.975)
            * math.sqrt(1 if self.repeated else 1 + TRAINING)
        )

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
    found = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("metrics", "params", "environment")
    }
    found["environment"]["command"] = command()  # not the kernel's, which says nothing
    target = root / "data" / "reference" / f"{folder.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(target.read_text()) if target.exists() else None
    again = kept is not None and _is_of_one_code(kept, found, profile)
    if again and kept["params"].get("seed") != found["params"].get("seed"):
        own = {name: estimate.value for name, estimate in estimates(found["metrics"])}
        kept.setdefault("seeds", {})[str(found["params"]["seed"])] = own
        write_json(target, kept)
        return
    seeds = {"seeds": kept["seeds"]} if again and "seeds" in kept else {}
    write_json(target, {"notebook": folder.name, "profile": profile, **found, **seeds})
    if (figure := folder / "figures" / "auroc.png").exists():
        shutil.copyfile(figure, target.with_suffix(".png"))


def _is_of_one_code(kept: Mapping, found: Mapping, profile: str) -> bool:
    """Whether two runs are of one known code and one setting, seeds apart."""

    def setting(params):
        if isinstance(params, Mapping):
            return {name: setting(value) for name, value in params.items() if name != "seed"}
        return params

    commits = {run["environment"].get("commit") for run in (kept, found)}
    known = len(commits) == 1 and not any(
        commit is None or commit.endswith("-dirty") for commit in commits
    )
    return (
        known and kept["profile"] == profile and setting(kept["params"]) == setting(found["params"])
    )


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
    run : folder of a run, with one folder a notebook
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
        No notebook is in both.
    """
    import numpy as np
    import pandas as pd

    from chexlib.evaluation.intervals import holm

    folder = Path(reference or ROOT / "data" / "reference")
    found = {}
    for file in sorted(Path(run).glob("[0-9]*/metrics.json")):
        if not (target := folder / f"{file.parent.name}.json").exists():
            continue
        kept = json.loads(target.read_text())
        theirs, ours = (
            dict(estimates(metrics)) for metrics in (kept["metrics"], json.loads(file.read_text()))
        )
        rows = {}
        for name in (name for name in theirs if name in ours):
            one, other = theirs[name], ours[name]
            seeds = [
                own[name] for own in kept.get("seeds", {}).values() if own.get(name) is not None
            ]
            p = difference_p(one, other, seeds)
            rows[name] = [one.value, one.low, one.high, other.value, other.low, other.high, p]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
        before, now = kept["params"], json.loads((file.parent / "params.json").read_text())
        others = {
            n: (before.get(n), now.get(n)) for n in {**before, **now} if before.get(n) != now.get(n)
        }
        found[file.parent.name] = {
            "profile": kept["profile"],
            "parameters": others,
            "estimates": table,
        }
    if not found:
        known = ", ".join(file.stem for file in sorted(folder.glob("*.json"))) or "none"
        raise ConfigError(
            f"{run} has results of no notebook that has reference results. These have: {known}."
        )
    corrected = holm(
        np.concatenate([own["estimates"]["p"].to_numpy(float) for own in found.values()])
    )
    for own in found.values():
        table = own["estimates"]
        table["p"], corrected = corrected[: len(table)], corrected[len(table) :]
        table["verdict"] = np.select(
            [table["p"].isna(), table["p"] < ERROR], [UNKNOWN, APART], ALIKE
        )
    return found


def difference_p(one: Estimate, other: Estimate, seeds: list[float]) -> float:
    """How often chance alone sets two figures so far apart; NaN if neither seeds nor intervals
    tell.

    `seeds` are values of the first one with other seeds.
    """
    import numpy as np
    from scipy.special import logit, stdtr

    if len(seeds) >= 2:
        values, value = np.array([one.value, *seeds]), other.value
        if (
            one.known
            and one.low > 0
            and one.high < 1
            and min(*values, value) > 0
            and max(*values, value) < 1
        ):
            values, value = logit(values), logit(value)  # where those of an AUROC near 1 lie evenly
        apart, errors = value - values.mean(), [values.std(ddof=1) * np.sqrt(1 + 1 / len(values))]
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
    for place, low in enumerate(names):
        words = low.split("_")
        if "low" not in words:
            continue
        at = words.index("low")
        high, own = (
            "_".join([*words[:at], "high", *words[at + 1 :]]),
            "_".join(words[:at] + words[at + 1 :]),
        )
        if high not in row:
            continue
        if own in row:
            before = [own]
        else:
            before = [
                name for name in names[:place][::-1] if not {"low", "high"} & set(name.split("_"))
            ]
            before = [name for name in before if not isinstance(row[name], int)]  # counts
        if None in (row[low], row[high]):
            before = before[:1]
        elif own not in row:
            before = [
                name
                for name in before
                if _is_number(row[name]) and row[low] <= row[name] <= row[high]
            ]
        if before and _is_number(row[before[0]]):
            yield before[0], low, high


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _labels(rows: list) -> list[str]:
    """The rows of a table are known by their settings, which stand before their first figure, not
    by their place.
    """
    for kinds in ((str, int, list), (str, int, list, float)):
        labels = [_label(row, place, kinds) for place, row in enumerate(rows)]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}, {place}" for place, label in enumerate(labels)]


def _label(row, place: int, kinds: tuple) -> str:
    if not isinstance(row, Mapping):
        return str(place)
    figures = [list(row).index(name) for name, _, _ in _intervals(row)]
    own = {
        k: row[k]
        for k in list(row)[: min(figures, default=None)]
        if isinstance(row[k], kinds) and k != "seeds"
    }
    return ", ".join(f"{name} {value}" for name, value in own.items()) or str(place)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--all", "every", is_flag=True, help="Show every figure, not only those that are apart."
)
def compare(run, every):
    """Compare RUN, a run's folder, with the reference results.

    Exits with 1 if a figure is shown to differ.
    """
    worst = 0
    for notebook, found in compare_run(run).items():
        table = found["estimates"]
        counts = table["verdict"].value_counts()
        told = ", ".join(
            f"{counts[verdict]} {verdict}"
            for verdict in (ALIKE, APART, UNKNOWN)
            if verdict in counts
        )
        click.echo(
            f"{notebook}, reference of profile {found['profile']}: "
            f"{told or 'no figure with an interval'}"
        )
        for name, (then, now) in found["parameters"].items():
            click.echo(f"  {name}: {then} then, {now} now")
        shown = table if every else table[table["verdict"] == APART]
        if len(shown):
            click.echo(shown.to_string(float_format=lambda x: f"{x:.3f}", na_rep="-"))
        worst = max(worst, counts.get(APART, 0))
    raise SystemExit(1 if worst else 0)
