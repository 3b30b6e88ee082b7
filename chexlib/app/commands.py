"""Commands of the command line that `cli` has no room for."""

from __future__ import annotations

import json
import os
import sys

import click

from chexlib.machine import import_tensorflow


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option(
    "--weights", help="A model.keras file, or the folder of its run.  [default: the newest]"
)
@click.option(
    "--json",
    "form",
    flag_value="json",
    help="Print JSON: probabilities, doubts and errors by image.",
)
@click.option(
    "--csv", "form", flag_value="csv", help="Print CSV: a row an image, a column a finding."
)
@click.option(
    "--heatmaps", metavar="DIR", help="Write where the network looked to DIR, a PNG an image."
)
def predict(images, weights, form, heatmaps):
    """Print the probability of each of the 14 findings for every image, calibrated if the weights
    know how.

    JSON also has the findings called at each operating point that the weights carry. Not for
    clinical use.

    IMAGES are PNG, JPEG or DICOM files, folders of them, or quoted patterns such as
    'films/**/*.dcm'. Exits with 1 if some could not be read, 2 if none could.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import pandas as pd

    from chexlib.evaluation.operating import read_by_card
    from chexlib.files import ROOT
    from chexlib.findings import FINDINGS
    from chexlib.models.predict import newest_weights, predict_all
    from chexlib.models.weights import find_weights, read_card, split_of

    weights = find_weights(weights or newest_weights(ROOT / "runs"))
    card = read_card(weights)
    # What is wrong is told before any scoring.
    read_by_card(pd.DataFrame(columns=FINDINGS), card, weights=weights)
    if heatmaps:
        from chexlib.figures.heat_files import HeatMapFiles
    import_tensorflow()
    found = predict_all(
        images, weights=weights, each=HeatMapFiles(heatmaps, card=card) if heatmaps else None
    )
    for error in found.errors.values():
        click.echo(f"Error: {error}", err=True)
    found.probabilities, called = read_by_card(found.probabilities, card)
    scores, calibration = found.probabilities, (card.get("calibration") or {}).get("method")
    if form == "json":
        rows = {
            image: {f: round(float(p), 6) for f, p in row.items()}
            for image, row in scores.iterrows()
        }
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
    """End the engines and controllers of all notebooks of this project that are yours, running ones
    too.
    """
    from chexlib.cluster.cleanup import PREFIX, end_members

    click.echo(f"{end_members(PREFIX)} processes ended")
