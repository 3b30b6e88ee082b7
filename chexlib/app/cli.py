"""The command line: `python -m chexlib --help`. A thin layer over the notebooks and rooms."""

from __future__ import annotations

import json
import logging
import os
import sys

import click

from chexlib.app.commands import clean, predict
from chexlib.app.reference import compare
from chexlib.errors import ChexlibError, ConfigError


class _OneLine:
    """Tells an error of ours in one line and exits with 2, without a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except ChexlibError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)


class Command(_OneLine, click.Command):
    """A command whose errors are told in one line."""


class _Family(_OneLine, click.Group):
    """Commands whose errors are told in one line."""


@click.group(cls=_Family, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """The AI radiologist: train, scale and judge a 14-finding chest X-ray classifier.

    Not for clinical use.
    """


@main.command()
@click.argument("notebooks", nargs=-1)
@click.option(
    "--profile",
    default="quick",
    show_default=True,
    metavar="NAME[,NAME]",
    help="Parameters from notebooks/profiles/NAME.yaml; of several the last one counts.",
)
@click.option(
    "--data", "data_dir", default="", help="Folder in the NIH layout; without it a phantom is made."
)
@click.option("--engines", type=int, help="MPI engines of the distributed notebooks.")
@click.option(
    "-p",
    "parameters",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Set a notebook parameter.",
)
@click.option("--runs-dir", default="", help="Where runs go.  [default: runs/ of the project]")
@click.option(
    "--reference", is_flag=True, help="Keep what is found in data/reference, for comparisons."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the newest run of the same settings, if it is not finished.",
)
def run(notebooks, profile, data_dir, engines, parameters, **settings):
    """Execute notebooks headless and write the run's report.

    NOTEBOOKS: names or numbers; all without.
    """
    from chexlib.app.execute import end_when_told, execute

    end_when_told()
    named = {"engines": engines, "data_dir": data_dir or None}
    chosen = {
        **dict(parameters),
        **{name: value for name, value in named.items() if value is not None},
    }
    failed, report = execute(notebooks, profile=profile, parameters=chosen, **settings)
    click.echo(f"Report: {report}")
    sys.exit(1 if failed else 0)


@main.command()
@click.option(
    "--topology", default="densenet121", show_default=True, help="densenet121, resnet50 or vgg16."
)
@click.option("--size", default=224, show_default=True, help="Side of the input in pixels.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=int,
    help="Images a rank; several to compare.  [default: 16]",
)
@click.option(
    "--precision", "precisions", multiple=True, help="float32 or mixed_bfloat16; both are compared."
)
@click.option("--steps", default=6, show_default=True, help="Steps of each measurement.")
def tune(topology, size, batches, precisions, steps):
    """Measure which ranks x threads train fastest here, and save it: `run --profile quick,tuned`
    uses it.
    """
    from chexlib.machine import native_precision
    from chexlib.scaling.tune import PROFILE, save_winner
    from chexlib.scaling.tune import tune as measure

    what = {"batches": batches or (16,), "precisions": precisions or (native_precision(),)}
    table = measure(topology=topology, size=size, steps=steps, **what)
    click.echo(table.round(2).to_string(index=False))
    save_winner(table)
    click.echo(f"The fastest is kept in {PROFILE}.")


@main.command()
@click.argument("directory")
@click.option(
    "--images", "n_images", default=2000, show_default=True, help="Number of radiographs."
)
@click.option("--size", default=128, show_default=True, help="Side in pixels.")
@click.option("--seed", default=0, show_default=True, help="Another seed, other patients.")
@click.option("--difficulty", default="standard", show_default=True, help="easy, standard or hard.")
@click.option(
    "--min-prevalence",
    default=0.0,
    show_default=True,
    help="Least share of images with each finding.",
)
@click.option("--workers", type=int, help="Processes.  [default: the cores]")
def phantom(directory, **settings):
    """Make synthetic radiographs with all 14 findings in DIRECTORY, in the NIH layout."""
    from chexlib.phantom.write import write_phantom

    click.echo(write_phantom(directory, **settings))


@main.command()
@click.argument("directory")
@click.option(
    "--parts",
    default="",
    help="Archives to fetch, for instance 1,2; 'none': labels alone.  [default: all]",
)
def fetch(directory, parts):
    """Download the NIH release (45 GB, or some parts) into DIRECTORY, checked; goes on where it was
    stopped.
    """
    from chexlib.app.runs import show_log
    from chexlib.data.fetch import fetch as download

    try:
        chosen = (
            None
            if not parts
            else ()
            if parts == "none"
            else [int(part) for part in parts.split(",")]
        )
    except ValueError:
        raise ConfigError(
            f"--parts {parts!r} is not a list of numbers. Write for instance --parts 1,2."
        ) from None
    show_log()
    click.echo(download(directory, parts=chosen))


@main.command()
@click.option(
    "--data", "data_dir", required=True, help="Folder in the NIH layout; the labels are enough."
)
@click.argument("parts", nargs=-1, required=True, metavar="PART=LIST...")
def audit(data_dir, parts):
    """Check that no patient is shared between parts, for instance train=train.txt test=test.txt.

    Exits 1 on a leak.
    """
    from chexlib.data.nih import load_radiographs
    from chexlib.data.splits import audit as check
    from chexlib.data.splits import read_list

    paths = {}
    for item in parts:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise ConfigError(
                f"{item!r} is not PART=LIST. Write for instance train=train_list.txt."
            )
        if name in paths:
            raise ConfigError(f"part {name!r} is given twice. Give each part one list.")
        paths[name] = path
    radiographs = load_radiographs(data_dir, require_images=False)
    lists = {name: read_list(path, radiographs) for name, path in paths.items()}
    found = check(lists, radiographs, allow_leak=True)
    for part, images in found.images.items():
        unknown = found.unknown[part]
        more = f", and {unknown} that the labels do not have" if unknown else ""
        click.echo(f"{part}: {images} images of {found.patients[part]} patients{more}")
    click.echo((100 * found.prevalence).round(2).to_string(float_format=lambda x: f"{x:.2f} %"))
    for row in found.shared[found.shared["patients"] > 0].itertuples():
        click.echo(
            f"LEAK: {row.patients} patients are in both {row.part_a} and {row.part_b}; they have "
            f"{row.images_a} images in {row.part_a} and {row.images_b} in {row.part_b}"
        )
    if found.duplicates:
        click.echo(
            f"LEAK: {len(found.duplicates)} images are listed more than once: "
            f"{', '.join(found.duplicates[:5])}"
        )
    click.echo("The parts leak." if found.leaks else "No patient is shared between parts.")
    sys.exit(1 if found.leaks else 0)


@main.command()
@click.argument("run", type=click.Path())
def card(run):
    """Write MODEL_CARD.md into RUN, a folder with a model.keras, from what the run's files say."""
    from chexlib.app.card import write_card

    click.echo(write_card(run))


@main.command()
@click.argument("predictions", type=click.Path())
@click.option(
    "--data", "data_dir", required=True, help="Folder in the NIH layout; the labels are enough."
)
@click.option(
    "--against", type=click.Path(), help="Other scores of the same images: a paired comparison."
)
@click.option(
    "--part",
    default="test",
    show_default=True,
    help="Rows to judge, if the file has a column `part`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(predictions, data_dir, against, part, as_json):
    """Judge PREDICTIONS, a CSV or Parquet file of scores: AUROC and average precision, intervals
    over patients.

    A row an image (column `image`), a column a finding, with or without a common prefix.
    """
    from chexlib.evaluation.scores import evaluate as judge_file
    from chexlib.files import plain

    found = judge_file(predictions, data_dir, against=against or "", part=part)
    if as_json:
        click.echo(
            json.dumps({"predictions": predictions, "against": against, **plain(found)}, indent=1)
        )
        return
    split = found["split"]
    size = f"{split['images']:,} images, {split['patients']:,} patients"
    click.echo(f"{split['name']} (digest {split['digest']}): {size}")
    for name in ("auroc", "difference"):
        if name in found:
            click.echo(found[name].to_string(float_format=lambda x: f"{x:.3f}", na_rep="-"))


@main.command()
@click.option(
    "--config", "config_file", required=True, type=click.Path(), help="JSON of a TrainConfig."
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in its run_dir.")
def train(config_file, resume):
    """Train as CONFIG says, on one process or under mpiexec or srun.

    SIGUSR1: stop, keep a checkpoint.
    """
    from pathlib import Path

    from chexlib.machine import import_tensorflow

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import_tensorflow()
    from chexlib.app.live import LiveLine
    from chexlib.app.runs import show_log
    from chexlib.collectives import join_world
    from chexlib.training.config import TrainConfig
    from chexlib.training.fit import fit

    try:
        values = json.loads(Path(config_file).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config_file} is not a readable JSON file ({error}).") from error
    show_log()
    # Once is enough, and every rank would say it.
    logging.getLogger("chexlib.data").setLevel(logging.WARNING)
    config = TrainConfig.from_dict(values)
    result = fit(config.replace(resume=resume or config.resume), report=LiveLine())
    if join_world().first:
        done = {
            name: getattr(result, name)
            for name in ("model", "ranks", "best_epoch", "resumed_from", "stopped")
        }
        click.echo(json.dumps(done))


main.add_command(clean)
main.add_command(predict)


main.add_command(compare)

if __name__ == "__main__":
    main(prog_name="chexlib")
