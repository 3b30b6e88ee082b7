"""Commands of the command line that `cli` has no room for."""

from __future__ import annotations

import json
import os
import sys

import click

from chexlib.errors import ConfigError
from chexlib.machine import import_tensorflow


@click.command("real-model")
@click.option("--data", "folders", multiple=True, required=True, metavar="DIR[:DIR]",
              help="Folder in the NIH layout; of several, the first counts where an image is in two.")  # fmt: skip
@click.option("--out", default="", help="Where all goes, and goes on.  [default: runs/real-model]")
@click.option("--quick", is_flag=True, help="A minute's rehearsal: a tiny network, and a model worth nothing.")
@click.option("-s", "settings", nargs=2, multiple=True, metavar="NAME VALUE", help="Change a setting of RealModel.")
def real_model(folders, out, quick, settings):
    """Train the best model that real radiographs in DIR allow, and say in its card how good that is.

    Pre-trains on phantoms, cross-validates over patients against random weights, and writes an ensemble. About an
    hour on 2 cores for 1,400 images; stopped, the same command goes on. Not for clinical use.
    """
    import dataclasses

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import_tensorflow()
    from chexlib.app.runs import show_log
    from chexlib.evaluation.real_model import QUICK, RealModel, train_real_model
    from chexlib.files import ROOT, plain
    from chexlib.models.cards import split_of

    base = QUICK if quick else RealModel()
    known = {field.name: type(getattr(base, field.name)) for field in dataclasses.fields(base)}
    try:
        changes = {name: value == "true" if known[name] is bool else known[name](value) for name, value in settings}
    except (KeyError, ValueError) as error:
        raise ConfigError(f"-s {error} is no setting, or not a value of it. Settings: {', '.join(known)}.") from error
    show_log()
    paths = [path for item in folders for path in item.split(os.pathsep) if path]
    chosen = dataclasses.replace(base, **changes)
    found = train_real_model(paths, out or ROOT / "runs" / "real-model", settings=chosen)
    if found.get("stopped"):
        click.echo("Stopped: the same command goes on.")
        return
    click.echo(f"AUROC out of fold, {split_of(found)}: {found['data']['images']:,} images")
    click.echo(found["gains"].to_string(float_format=lambda x: f"{x:.3f}", na_rep="-"))
    click.echo(json.dumps(plain({name: found[name] for name in ("model", "by_seed", "minutes")})))


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--weights", help="A model.keras file, or the folder of its run.  [default: the newest]")
@click.option("--json", "form", flag_value="json", help="Print JSON: probabilities, doubts and errors by image.")
@click.option("--csv", "form", flag_value="csv", help="Print CSV: a row an image, a column a finding.")
@click.option("--heatmaps", metavar="DIR", help="Write where the network looked to DIR, a PNG an image.")
def predict(images, weights, form, heatmaps):
    """Print the probability of each of the 14 findings for every image, calibrated if the weights know how.

    JSON also has the findings called at each operating point that the weights carry. Not for clinical use.

    IMAGES are PNG, JPEG or DICOM files, folders of them, or quoted patterns such as 'films/**/*.dcm'. Exits with 1 if
    some could not be read, 2 if none could.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import pandas as pd

    from chexlib.evaluation.operating import read_by_card
    from chexlib.files import ROOT
    from chexlib.findings import FINDINGS
    from chexlib.models.cards import find_weights, read_card, split_of
    from chexlib.models.predict import newest_weights, predict_all

    weights = find_weights(weights or newest_weights(ROOT / "runs"))
    card = read_card(weights)
    read_by_card(pd.DataFrame(columns=FINDINGS), card, weights=weights)  # what is wrong is told before any scoring
    if heatmaps:
        from chexlib.figures.heat_files import HeatMapFiles
    import_tensorflow()
    found = predict_all(images, weights=weights, each=HeatMapFiles(heatmaps, card=card) if heatmaps else None)
    for error in found.errors.values():
        click.echo(f"Error: {error}", err=True)
    found.probabilities, called = read_by_card(found.probabilities, card)
    scores, calibration = found.probabilities, (card.get("calibration") or {}).get("method")
    if form == "json":
        rows = {image: {f: round(float(p), 6) for f, p in row.items()} for image, row in scores.iterrows()}
        notes = {"doubts": found.doubts, "errors": found.errors}
        what = {"weights": str(weights), "split": card.get("split"), "calibration": calibration}
        click.echo(json.dumps({**what, "probabilities": rows, "called": called, **notes}, indent=1))
    elif form == "csv":
        click.echo(found.to_table().to_csv(index=False, float_format="%.6f"), nl=False)
    elif not scores.empty:
        told = f"calibrated by {calibration}" if calibration else "not calibrated"
        click.echo(f"Weights: {weights} (trained on the {split_of(card)}; {told})")
        click.echo(scores.T.to_string(float_format=lambda p: f"{p:.3f}"))
    if form != "csv":  # which has a column for it
        for image, doubt in found.doubts.items():
            click.echo(f"Doubtful: {image}: {doubt}.", err=True)
    sys.exit(2 if scores.empty else 1 if found.errors else 0)


@click.command()
def clean():
    """End the engines and controllers of all notebooks of this project that are yours, running ones too."""
    from chexlib.cluster.leftovers import PREFIX
    from chexlib.cluster.watchdog import end_members

    click.echo(f"{end_members(PREFIX)} processes ended")
