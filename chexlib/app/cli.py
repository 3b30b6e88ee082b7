"""The command line: `python -m chexlib --help`. A thin layer over the notebooks and rooms.

What takes long to import is imported by the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import logging
import os
import sys
import traceback
from typing import NoReturn

import click

from chexlib.errors import FAULTS, ChexlibError, ConfigError, one_line, printable

# Modules of `chexlib.studies`, by notebook.
STUDIES = {"05": "large_batch", "06": "recipes", "07": "transfer"}


def _set_debug(ctx, option, wanted: bool) -> None:
    ctx.meta["debug"] = wanted or ctx.meta.get("debug", False)


class _OneLine:
    """Tells an error of ours, of a file or of the machine in one line and exits with 2.

    `--debug`, before or after a command's name, prints the traceback above that line.
    """

    def get_params(self, ctx):
        debug = click.Option(
            ["--debug"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_set_debug,
            help="Print the traceback of an error.",
        )
        return [*super().get_params(ctx), debug]

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ChexlibError, *FAULTS) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise  # nobody reads on: click ends quietly
            if ctx.meta.get("debug"):
                traceback.print_exc()
            _end_with(error)


def _end_with(error: BaseException) -> NoReturn:
    """Print an error in one line and exit with 2, also if standard output is on a full disk."""
    try:
        sys.stdout.flush()
    except OSError:  # else Python says it a second time when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    click.echo(f"Error: {one_line(error)}", err=True)
    sys.exit(2)


class Command(_OneLine, click.Command):
    """A command that prints an error as one line."""


class _Family(_OneLine, click.Group):
    """Commands that print an error as one line."""

    command_class = Command

    def main(self, *args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # of a locale that may lack a letter of ours
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # help, which click prints before it calls a command
            _end_with(error)


@click.group(cls=_Family, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """The AI radiologist: train, scale and judge a classifier of 14 findings in chest X-rays.

    Begin with `run`, which executes the notebooks and writes a report.

    Not for clinical use.
    """
    logging.raiseExceptions = False  # a log line that finds no room is lost, without a traceback


labels_option = click.option(
    "--data",
    "data_dir",
    required=True,
    help="Data folder in the NIH layout; images are not needed.",
)


_PLACE = (
    click.option("--engines", type=int, help="Number of engines (MPI processes) to start."),
    click.option("--threads", type=int, help="Threads per engine.  [default: the cores divided]"),
    click.option("--hosts", help="Such as node1:2,node2:2, or a hostfile.  [default: this host]"),
    click.option("--interface", help="Network interface that these hosts share, such as eth0."),
    click.option("--slurm", is_flag=True, help="Let Slurm choose the hosts."),
    click.option("--slurm-options", help="Options for sbatch, such as '--time=02:00:00'."),
)


def place_options(command):
    """Give a command the options that say where engines run."""
    for option in reversed(_PLACE):
        command = option(command)
    return command


def _given(place: dict) -> dict:
    """Of `place_options`, those that are used."""
    return {name: told for name, told in place.items() if told is not None and told is not False}


def _engines_of_tasks(place: dict):
    """A block with the engines of `place_options`, each by itself; without a number of them none."""
    from chexlib.cluster.engines import mpi_engines
    from chexlib.cluster.sites import find_site

    given = _given(place)
    if "engines" not in given:
        if given:
            raise ConfigError(f"{', '.join(given)}: how many engines? Add --engines N.")
        return contextlib.nullcontext()
    n, threads = given.pop("engines"), given.pop("threads", 0)
    site = find_site(options=given.pop("slurm_options", ""), **given)
    return mpi_engines(n, threads=site.threads_of(n, threads), site=site, joined=False)


def _say(text, **options) -> None:
    """Print what may hold names of files or of other people's tables."""
    click.echo(printable(str(text)), **options)


def _number(value: float) -> str:
    """A number of a printed table."""
    return f"{value:.3f}"


# --- notebooks and their runs


@main.command()
@click.argument("notebooks", nargs=-1)
@click.option(
    "--profile",
    default="quick",
    show_default=True,
    metavar="NAME[,NAME]",
    help="Take parameters from notebooks/profiles/NAME.yaml; later files overrule earlier ones.",
)
@click.option(
    "--data", "data_dir", help="Data folder in the NIH layout.  [default: synthetic images]"
)
@place_options
@click.option(
    "-p",
    "parameters",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Give a notebook parameter a value; can be repeated.",
)
@click.option(
    "--runs-dir", default="", help="Folder for new runs.  [default: runs/ of the project]"
)
@click.option(
    "--reference", is_flag=True, help="Save the results in data/reference, for `compare`."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the newest run with the same settings, if it is not finished.",
)
def run(notebooks, data_dir, parameters, profile, runs_dir, reference, resume, **place):
    """Execute notebooks and write a report of the run.

    NOTEBOOKS are names or numbers, such as 03. Without any, all notebooks are executed.
    """
    from chexlib.app.execute import end_when_told, execute

    end_when_told()
    chosen = dict(parameters) | _given(place)
    if data_dir:
        chosen["data_dir"] = data_dir
    settings = {"runs_dir": runs_dir, "reference": reference, "resume": resume}
    failed, report = execute(notebooks, profile=profile, parameters=chosen, **settings)
    _say(f"Report: {report}")
    sys.exit(1 if failed else 0)


@main.command()
@click.argument("run", type=click.Path())
@click.option("--all", "every", is_flag=True, help="Show all figures, not only those that differ.")
def compare(run, every):
    """Compare the results in RUN, a run's folder, with the reference results.

    Exits with 1 if a figure differs by more than chance explains.
    """
    from chexlib.app.reference import APART, VERDICTS, compare_run

    differs = False
    for notebook, compared in compare_run(run).items():
        table = compared["estimates"]
        counts = table["verdict"].value_counts()
        told = ", ".join(f"{counts[name]} {name}" for name in VERDICTS if name in counts)
        told = told or "no figure with an interval"
        _say(f"{notebook}, reference of profile {compared['profile']}: {told}")
        for name, (then, now) in compared["parameters"].items():
            _say(f"  {name}: {then} then, {now} now")
        shown = table if every else table[table["verdict"] == APART]
        if len(shown):
            _say(shown.to_string(float_format=_number, na_rep="-"))
        differs |= APART in counts
    sys.exit(1 if differs else 0)


@main.command()
@click.argument("run", type=click.Path())
def card(run):
    """Write a model card, MODEL_CARD.md, into RUN, the folder of one training."""
    from chexlib.app.report import write_card

    _say(write_card(run))


@main.command()
@click.argument("out", type=click.Path())
def course(out):
    """Write the notebooks into the folder OUT as a course.

    OUT/student has blanks to fill in, OUT/solved has the solutions.
    """
    from chexlib.app.course import write_course

    _say(write_course(out))


@main.command()
def clean():
    """End all MPI engines that your notebooks of this project have started.

    Engines that are still at work are ended too.
    """
    from chexlib.cluster.cleanup import PREFIX, end_members

    _say(f"{end_members(PREFIX)} processes ended")


# --- data


@main.command()
@click.argument("directory")
@click.option(
    "--images", "n_images", default=2000, show_default=True, help="Number of radiographs."
)
@click.option("--size", default=128, show_default=True, help="Side in pixels.")
@click.option(
    "--seed", default=0, show_default=True, help="Random seed: another one gives other patients."
)
@click.option(
    "--difficulty",
    default="standard",
    show_default=True,
    help="How hard the findings are to see: easy, standard or hard.",
)
@click.option(
    "--min-prevalence",
    default=0.0,
    show_default=True,
    help="Each finding is in at least this share of the images.",
)
@click.option("--workers", type=int, help="Number of processes.  [default: one per core]")
def phantom(directory, **settings):
    """Draw synthetic radiographs with known findings into DIRECTORY, in the NIH layout."""
    from chexlib.phantom.write import write_phantom

    _say(write_phantom(directory, **settings))


@main.command()
@click.argument("directory")
@click.option(
    "--parts",
    default="",
    help="Numbers of the archives, such as 1,2; 'none' fetches the labels alone.  [default: all]",
)
def fetch(directory, parts):
    """Download the NIH release (45 GB), or parts of it, into DIRECTORY.

    Every file is checked. A download that was stopped continues where it was.
    """
    from chexlib.app.runs import show_log
    from chexlib.data.fetch import fetch as download

    numbers = None
    if parts:
        try:
            numbers = () if parts == "none" else [int(part) for part in parts.split(",")]
        except ValueError:
            raise ConfigError(
                f"--parts {parts!r} is not accepted. Use numbers from 1 to 12, such as 1,2, or none."
            ) from None
    show_log()
    _say(download(directory, parts=numbers))


@main.command()
@labels_option
@click.argument("parts", nargs=-1, required=True, metavar="PART=LIST...")
def audit(data_dir, parts):
    """Check that no patient is in two parts of a split.

    PART=LIST names a part and its list of images, for instance train=train.txt test=test.txt. Exits
    with 1 if parts share patients.
    """
    from chexlib.data.nih import load_radiographs
    from chexlib.data.splits import audit as check
    from chexlib.data.splits import read_list

    paths = {}
    for item in parts:
        name, _, path = item.partition("=")
        if not name or not path:
            raise ConfigError(
                f"{item!r} is not accepted. Write PART=LIST, for instance train=train_list.txt."
            )
        if name in paths:
            raise ConfigError(f"part {name!r} is given twice. Give each part one list.")
        paths[name] = path
    radiographs = load_radiographs(data_dir, require_images=False)
    lists = {name: read_list(path, radiographs) for name, path in paths.items()}
    checked = check(lists, radiographs, allow_leak=True)
    for part, images in checked.images.items():
        _say(f"{part}: {images} images of {checked.patients[part]} patients")
    _say((100 * checked.prevalence).to_string(float_format=lambda x: f"{x:.2f} %"))
    _say(f"{'LEAK' if checked.leaks else 'No leak'}: {checked}")
    sys.exit(1 if checked.leaks else 0)


# --- training, scores


@main.command()
@click.option(
    "--config",
    "config_file",
    required=True,
    type=click.Path(),
    help="JSON file of settings (TrainConfig).",
)
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in its run_dir.")
def train(config_file, resume):
    """Train one model with the settings of a JSON file.

    Start it as one process, or as many under mpiexec or srun. The signal SIGUSR1 ends it after the
    current step, with a checkpoint.
    """
    from chexlib.files import read_json
    from chexlib.machine import import_tensorflow

    # What is wrong is told before the slow import of TensorFlow.
    if not os.path.exists(config_file):
        raise ConfigError(
            f"there is no file {config_file}. Name a JSON file of settings, such as the config.json "
            "of a run."
        )
    values = read_json(config_file)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import_tensorflow()
    from chexlib.app.live import LiveLine
    from chexlib.app.runs import show_log
    from chexlib.collectives import join_world
    from chexlib.training.config import TrainConfig
    from chexlib.training.fit import fit
    from chexlib.training.noise import NoiseScale

    show_log()
    # Once is enough, and every rank would say it.
    logging.getLogger("chexlib.data").setLevel(logging.WARNING)
    config = TrainConfig.from_dict(values)
    result = fit(config.replace(resume=resume or config.resume), report=LiveLine())
    if join_world().first:
        if result.noise_scale:
            click.echo(NoiseScale(**result.noise_scale))
        names = ("model", "ranks", "best_epoch", "resumed_from", "stopped")
        click.echo(json.dumps({name: getattr(result, name) for name in names}))


@main.command()
@click.argument("stages", nargs=-1, required=True, metavar="STAGE...")
@click.option(
    "--data",
    "data_dir",
    default="",
    help="Data folder in the NIH layout.  [default: synthetic images]",
)
@click.option("--rows", help="File for the results.  [default: the committed one]")
@click.option(
    "--notebook",
    type=click.Choice(sorted(STUDIES)),
    default="05",
    show_default=True,
    help="Notebook whose study it is.",
)
@place_options
def study(stages, data_dir, rows, notebook, **place):
    """Train stages of a notebook's study, in the order in which you name them.

    A wrong name is answered with the names that exist. Trainings that have results are not
    repeated. Before each stage it says how many trainings are left, and about how many core-hours.
    With --engines, each engine takes one training after the other: give each one thread. Any number
    of such commands, and notebooks, share the trainings.
    """
    on_engines = _engines_of_tasks(place)
    from chexlib.machine import import_tensorflow

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import_tensorflow()
    from chexlib.app.runs import data_folder, show_log

    module = importlib.import_module(f"chexlib.studies.{STUDIES[notebook]}")
    show_log()
    data = data_folder(data_dir, **module.PHANTOM)
    on = module.study_on(data, table=rows or module.ROWS)
    with on_engines as engines:
        done = on.run_stages(stages, engines)
    click.echo("Done." if done else "Stopped. Repeat the command to continue.")


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
    help="Images per rank; repeat the option to compare several.  [default: 16]",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    help="float32 or mixed_bfloat16; repeat the option to compare both.",
)
@click.option("--steps", default=6, show_default=True, help="Training steps per measurement.")
def tune(batches, precisions, **settings):
    """Measure how many ranks and threads train fastest on this machine.

    The result is saved as a profile: `run --profile quick,tuned` uses it.
    """
    from chexlib.machine import native_precision
    from chexlib.scaling.tune import PROFILE, save_winner
    from chexlib.scaling.tune import tune as measure

    precisions = precisions or (native_precision(),)
    table = measure(batches=batches or (16,), precisions=precisions, **settings)
    _say(table.round(2).to_string(index=False))
    save_winner(table)
    _say(f"The fastest is kept in {PROFILE}.")


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option(
    "--weights", help="A model.keras file, or the folder of its run.  [default: the newest]"
)
@click.option(
    "--json",
    "form",
    flag_value="json",
    help="Print JSON: for each image its probabilities, and doubts or errors.",
)
@click.option(
    "--csv", "form", flag_value="csv", help="Print CSV: a row per image, a column per finding."
)
@click.option(
    "--heatmaps",
    metavar="DIR",
    help="Write heat maps, where the network looked, into DIR: a PNG per image.",
)
def predict(images, weights, form, heatmaps):
    """Print the probability of each of the 14 findings for every image.

    IMAGES are PNG, JPEG or DICOM files, folders of them, or quoted patterns such as
    'films/**/*.dcm'. Exits with 1 if some could not be read, with 2 if none could.

    If the weights file holds a calibration, the probabilities are calibrated. If it holds operating
    points, JSON also lists the findings above each of them. Not for clinical use.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import pandas as pd

    from chexlib.evaluation.operating import read_by_card
    from chexlib.files import ROOT
    from chexlib.findings import FINDINGS
    from chexlib.machine import import_tensorflow
    from chexlib.models.predict import newest_weights, predict_all
    from chexlib.models.weights import find_weights, read_card, split_of

    weights = find_weights(weights or newest_weights(ROOT / "runs"))
    card = read_card(weights)
    # What is wrong is told before any scoring.
    read_by_card(pd.DataFrame(columns=FINDINGS), card, weights=weights)
    draw = None
    if heatmaps:
        from chexlib.figures.judgement import HeatMapFiles

        draw = HeatMapFiles(heatmaps, card=card)
    import_tensorflow()
    predicted = predict_all(images, weights=weights, each=draw)
    for error in predicted.errors.values():
        _say(f"Error: {one_line(error)}", err=True)
    scores, called = read_by_card(predicted.probabilities, card)
    predicted.probabilities = scores
    calibration = (card.get("calibration") or {}).get("method")
    if form == "json":
        probabilities = {}
        for image, row in scores.iterrows():
            probabilities[image] = {finding: round(float(p), 6) for finding, p in row.items()}
        answer = {
            "weights": str(weights),
            "split": card.get("split"),
            "calibration": calibration,
            "probabilities": probabilities,
            "called": called,
            "doubts": predicted.doubts,
            "errors": predicted.errors,
        }
        click.echo(json.dumps(answer, indent=1))
    elif form == "csv":
        _say(predicted.to_table().to_csv(index=False, float_format="%.6f"), nl=False)
    elif not scores.empty:
        told = f"calibrated by {calibration}" if calibration else "not calibrated"
        _say(f"Weights: {weights} (trained on the {split_of(card)}; {told})")
        _say(scores.T.to_string(float_format=_number))
    if form != "csv":  # which has a column for it
        for image, doubt in predicted.doubts.items():
            _say(
                f"Doubtful: {one_line(image)}: {doubt}. Look at it before you use its scores.",
                err=True,
            )
    sys.exit(2 if scores.empty else 1 if predicted.errors else 0)


@main.command()
@click.argument("predictions", type=click.Path())
@labels_option
@click.option(
    "--against",
    default="",
    type=click.Path(),
    help="Other scores of the same images: a paired comparison.",
)
@click.option(
    "--part",
    default="test",
    show_default=True,
    help="Part to judge, if the file has a column `part`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(predictions, as_json, **settings):
    """Judge the scores in PREDICTIONS, a CSV or Parquet file, by AUROC and average precision.

    The file has a row per image, with its name in the column `image`, and a column per finding, with
    or without a common prefix. Intervals come from resampling patients.
    """
    from chexlib.evaluation.scores import evaluate as judge_file
    from chexlib.files import plain

    judged = judge_file(predictions, **settings)
    if as_json:
        files = {"predictions": predictions, "against": settings["against"] or None}
        click.echo(json.dumps({**files, **plain(judged)}, indent=1))
        return
    split = judged["split"]
    size = f"{split['images']:,} images, {split['patients']:,} patients"
    _say(f"{split['name']} (digest {split['digest']}): {size}")
    for name in ("auroc", "difference"):
        if name in judged:
            _say(judged[name].to_string(float_format=_number, na_rep="-"))


if __name__ == "__main__":
    main(prog_name="chexlib")
