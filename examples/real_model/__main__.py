"""`python -m examples.real_model --data DIR`: the best model that a few real radiographs allow."""

from __future__ import annotations

import dataclasses
import json
import os

import click

from chexlib.app.cli import Command
from chexlib.errors import ConfigError
from chexlib.machine import import_tensorflow


@click.command(cls=Command)
@click.option(
    "--data",
    "folders",
    multiple=True,
    required=True,
    metavar="DIR[:DIR]",
    help="Folder in the NIH layout; of several, the first counts where an image is in two.",
)
@click.option("--out", default="", help="Where all goes, and goes on.  [default: runs/real-model]")
@click.option(
    "--quick", is_flag=True, help="A minute's rehearsal: a tiny network, and a model worth nothing."
)
@click.option(
    "-s",
    "settings",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Change a setting of RealModel.",
)
def main(folders, out, quick, settings):
    """Train the best model that real radiographs in DIR allow, and say in its card how good that
    is.

    Pre-trains on phantoms, cross-validates over patients against random weights, and writes an
    ensemble. About an hour on 2 cores for 1,400 images; stopped, the same command goes on. Not for
    clinical use.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import_tensorflow()
    from chexlib.app.runs import show_log
    from chexlib.files import ROOT, plain
    from chexlib.models.weights import split_of
    from examples.real_model.training import QUICK, RealModel, train_real_model

    base = QUICK if quick else RealModel()
    known = {field.name: type(getattr(base, field.name)) for field in dataclasses.fields(base)}
    try:
        changes = {
            name: value == "true" if known[name] is bool else known[name](value)
            for name, value in settings
        }
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"-s {error} is no setting, or not a value of it. Settings: {', '.join(known)}."
        ) from error
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


if __name__ == "__main__":
    main(prog_name="real-model")
