"""Reference results: what a run found, kept as `data/reference/<notebook>.json`, and a fresh run compared with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from chexlib.errors import ConfigError
from chexlib.runs import ROOT, command, write_json

AGREES, APART, DIFFERS = "intervals overlap", "INTERVALS APART", "no intervals"
COLUMNS = ["reference", "low", "high", "run", "run low", "run high", "verdict"]
VALUES = ("auroc", "difference", "gain", "mean", "loss")  # whose interval is named low and high


def keep_reference(folder: Path, profile: str, *, root: Path = ROOT) -> None:
    """One file with what a notebook found and how (metrics, parameters, environment, profile), and its main figure."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "params", "environment")}
    found["environment"]["command"] = command()  # not the kernel's, which says nothing
    target = root / "data" / "reference" / f"{folder.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {"notebook": folder.name, "profile": profile, **found})
    if (figure := folder / "figures" / "auroc.png").exists():
        shutil.copyfile(figure, target.with_suffix(".png"))


def compare_run(run: str | Path, *, reference: str | Path = "") -> dict[str, dict]:
    """Set what a run found beside the reference results, notebook by notebook.

    Parameters
    ----------
    run : folder of a run, with one folder a notebook
    reference : folder of the reference results; empty for `data/reference` of the project

    Returns
    -------
    dict
        Of each notebook that is in both: profile, of the reference; parameters, {name: (reference, run)} of those that
        differ; estimates, a DataFrame with a row for each figure that has an interval in one of them: reference and
        run, each with low and high, and verdict: `AGREES`, `APART`, or `DIFFERS` where one has no interval.

    Raises
    ------
    ConfigError
        No notebook is in both.
    """
    import pandas as pd

    folder = Path(reference or ROOT / "data" / "reference")
    found = {}
    for file in sorted(Path(run).glob("[0-9]*/metrics.json")):
        if not (target := folder / f"{file.parent.name}.json").exists():
            continue
        kept = json.loads(target.read_text())
        theirs, ours = (dict(estimates(metrics)) for metrics in (kept["metrics"], json.loads(file.read_text())))
        rows = {name: [*theirs[name], *ours[name], _verdict(theirs[name], ours[name])] for name in theirs.keys() & ours}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS).reindex([n for n in theirs if n in rows])
        before, now = kept["params"], json.loads((file.parent / "params.json").read_text())
        others = {n: (before.get(n), now.get(n)) for n in {**before, **now} if before.get(n) != now.get(n)}
        found[file.parent.name] = {"profile": kept["profile"], "parameters": others, "estimates": table}
    if not found:
        known = ", ".join(file.stem for file in sorted(folder.glob("*.json"))) or "none"
        raise ConfigError(f"{run} has results of no notebook that has reference results. These have: {known}.")
    return found


def estimates(metrics, path: str = "") -> Iterator[tuple[str, tuple]]:
    """(path, (value, low, high)) of every estimate in the metrics of a notebook, of those that have an interval."""
    if isinstance(metrics, list):
        metrics = {_label(row, place): row for place, row in enumerate(metrics)}
    if not isinstance(metrics, Mapping):
        return
    for name, value in metrics.items():
        own = ("low", "high") if name in VALUES and "low" in metrics else (f"{name}_low", f"{name}_high")
        if isinstance(value, int | float) and all(end in metrics for end in own):
            yield f"{path}{name}", (value, *(metrics[end] for end in own))
        yield from estimates(value, f"{path}{name} / ")


def _label(row, place: int) -> str:
    """The row of a table is known by its settings, not by its place."""
    if not isinstance(row, Mapping):
        return str(place)
    own = {k: v for k, v in row.items() if k not in (*VALUES, "low", "high", "seeds") and isinstance(v, str | int)}
    return ", ".join(f"{name} {value}" for name, value in own.items()) or str(place)


def _verdict(one: tuple, other: tuple) -> str:
    if None in (*one, *other):
        return DIFFERS
    return AGREES if one[1] <= other[2] and other[1] <= one[2] else APART


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--all", "every", is_flag=True, help="Show every figure, not only those that are apart.")
def compare(run, every):
    """Compare RUN, a run's folder, with the reference results. Exits with 1 if an interval is apart from its own."""
    worst = 0
    for notebook, found in compare_run(run).items():
        table = found["estimates"]
        counts = table["verdict"].value_counts()
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (AGREES, APART, DIFFERS) if verdict in counts)
        click.echo(f"{notebook}, reference of profile {found['profile']}: {told or 'no figure with an interval'}")
        for name, (then, now) in found["parameters"].items():
            click.echo(f"  {name}: {then} then, {now} now")
        shown = table if every else table[table["verdict"] == APART]
        if len(shown):
            click.echo(shown.to_string(float_format=lambda x: f"{x:.3f}", na_rep="-"))
        worst = max(worst, counts.get(APART, 0))
    raise SystemExit(1 if worst else 0)
