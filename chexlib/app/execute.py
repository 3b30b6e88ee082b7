"""Executes notebooks headless, one after the other, into one run folder."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import psutil

from chexlib import collectives
from chexlib.app.reference import keep_reference
from chexlib.app.report import build_report
from chexlib.app.runs import (
    ASKED,
    asked_for,
    check_parameters,
    finished,
    point_latest,
    run_folder,
    show_log,
)
from chexlib.cluster.sites import find_site
from chexlib.errors import (
    FAULTS,
    ChexlibError,
    ConfigError,
    DataError,
    did_you_mean,
    first_line,
    one_line,
)
from chexlib.files import ROOT, atomic_write, read_json, require_file, require_writable
from chexlib.machine import BATCH, cores
from chexlib.mpi import CARRIED_BY, thread_environment

KERNEL_LOG = "kernel.log"  # in the run's folder: what kernels wrote to standard error
# Notebooks that neither measure speed nor start engines run two at a time, those that take longest
# first: a training of small networks keeps one core busy, not two. 09 reads 03 and 04 only.
TOGETHER = (("00", "01", "02"), ("05", "09", "07", "06"))
# Of a quick run on two cores, half of it where two run at a time, for the guess of how long it will
# take elsewhere.
QUICK_SECONDS = dict(zip(range(12), (3, 5, 4, 63, 112, 34, 14, 17, 65, 23, 5, 5), strict=True))
READERS = ("09", "10")  # notebooks that read what others of their run found
REPORT = "10"  # which has the others in it, and so comes last
# Where engines run, with what holds where no profile says it.
PLACE = {"engines": 1, "threads": 0, "hosts": "", "interface": ""}
PLACE |= {"slurm": False, "slurm_options": ""}
# Engines that a profile may ask for on one core: they wait for each other, and not for long.
FEW = 2
PATIENCE = 20.0  # seconds that notebooks have to end when they are told to
log = logging.getLogger(__name__)


def execute(
    notebooks: Sequence[str] = (),
    *,
    profile: str = "quick",
    parameters: dict | None = None,
    runs_dir: str = "",
    reference: bool = False,
    resume: bool = False,
) -> tuple[list[str], Path]:
    """Run notebooks with a profile's parameters, and write the report.

    Parameters
    ----------
    notebooks : names or numbers such as "03"; all if empty
    profile : name of a file in `notebooks/profiles`
    parameters : dict
        Override the profile. Each must be a parameter of at least one of the notebooks.
    runs_dir : str
        Where the run folder is made; empty for `runs/` of the project.
    reference : bool
        Keep what each notebook found as the project's reference, `data/reference/<notebook>.json`.
    resume : bool
        Go on in the folder of the newest run that was asked for the same, with the notebooks that
        are not finished; what they had trained is taken up. Without such a run, begin a new one.

    Returns
    -------
    failed : list of str
        Notebooks that ended in an error; the others were executed all the same.
    report : Path
        `index.html` of the run.

    Raises
    ------
    ConfigError
        An unknown notebook, profile or parameter; engines below 1, or on hosts that cannot be used;
        a profile's engines, where they are more than this host's cores; a run folder that cannot be
        written, or that another process works in.
    DataError
        The data folder cannot be used. All of these before anything is made.
    """
    import papermill

    paths = find_notebooks(notebooks)
    accepted = {path: papermill.inspect_notebook(path) for path in paths}
    settings = _checked(dict(parameters or {}), _profile(profile), accepted)
    _refuse_what_cannot_work(settings)
    show_log()
    if reference:
        require_writable(ROOT / "data" / "reference", "Run without --reference.")

    asked = {"notebooks": [path.stem for path in paths], "profile": profile, "settings": settings}
    failed, any_executed, told = [], False, False
    with run_folder(asked, runs_dir=runs_dir, resume=resume) as run:
        log.info("Run folder: %s", run)
        carrier, why = collectives.expected_carrier()
        if why:
            log.info(CARRIED_BY, carrier, why)
        _save_whole(run)
        progress = _Progress(run, asked)
        done = {path.stem for path in paths if finished(run / path.stem)}

        def take(path: Path) -> tuple[Path, bool]:
            log.info("%s %s ...", path.stem, progress.before(path.stem))
            given = {name: value for name, value in settings.items() if name in accepted[path]}
            return path, _execute_one(path, run / path.stem, given)

        for group in _groups(paths):
            for path in group:
                if any_executed and path.stem[:2] in READERS:  # what it found is of before
                    (run / path.stem / "metrics.json").unlink(missing_ok=True)
                    done.discard(path.stem)
            waiting = [path for path in group if path.stem not in done]
            for path in [path for path in group if path.stem in done]:
                log.info("%s: done before", path.stem)
                progress.names.remove(path.stem)
            for path, well in _side_by_side(take, waiting, log_file=run / KERNEL_LOG):
                any_executed = True
                done.add(path.stem)
                if not well:
                    failed.append(path.stem)
                if (report := _report_so_far(run, done)) and not told:
                    log.info("Report, written anew after each notebook: %s", report)
                    told = True
            for path in group:
                if reference and path.stem not in failed and finished(run / path.stem):
                    try:
                        keep_reference(run / path.stem, profile, root=ROOT)
                    except (ChexlibError, *FAULTS) as error:
                        log.error("%s is not kept: %s", path.stem, one_line(error))
                        failed.append(path.stem)
        report = build_report(run)
        if failed:
            log.warning(
                "%s notebooks failed, so %s does not point to this run. Look at the report for the "
                "errors, and repeat the command with --resume (make run RESUME=1).",
                *(len(failed), run.parent / "latest"),
            )
        else:
            point_latest(run)
        return sorted(failed), report


def _groups(paths: list[Path]) -> list[list[Path]]:
    """Notebooks that may run at the same time, in the order in which they begin."""
    groups = {}
    for path in paths:
        number = path.stem[:2]
        together = next((numbers for numbers in TOGETHER if number in numbers), (number,))
        groups.setdefault(together, []).append(path)
    return [
        sorted(group, key=lambda path: numbers.index(path.stem[:2]))
        for numbers, group in groups.items()
    ]


def _side_by_side(take: Callable, paths: list[Path], *, log_file: Path) -> Iterator:
    """What `take` gives for each path, as they end: two at a time, each with half of the cores.

    One by itself runs in this thread, which an interrupt reaches; kernels of other threads are
    ended here.
    """
    if min(len(paths), cores()) < 2:
        with _headless(log_file):
            for path in paths:
                yield take(path)
        return
    pool = ThreadPoolExecutor(2)
    try:
        with _headless(log_file, threads=cores() // 2):
            for job in as_completed([pool.submit(take, path) for path in paths]):
                yield job.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for kernel in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                kernel.terminate()
        raise
    finally:
        pool.shutdown()


def _report_so_far(run: Path, done: set[str]) -> Path | None:
    """The report of the notebooks that are done. Whatever hinders it must not end the others."""
    try:
        return build_report(run, done)
    except Exception as error:
        log.warning("The report could not be written after this notebook: %s", one_line(error))
        return None


class _Progress:
    """How far a run is, and a guess of how long it will take, from what its notebooks took before."""

    def __init__(self, run: Path, asked: dict):
        self.names, self.began = list(asked["notebooks"]), time.monotonic()
        self.begun: list[str] = []
        profile, earlier = asked["profile"], sorted(run.parent.glob("[0-9]*"))
        self.seconds = {
            name: QUICK_SECONDS.get(int(name[:2])) for name in self.names if profile == "quick"
        }
        kept = [(ROOT / "data" / "reference" / f"{name}.json", name) for name in self.names]
        made = []
        for past in earlier:
            if asked_for(past / ASKED).get("profile") == profile:
                made += [(past / name / "metrics.json", name) for name in self.names]
        for file, name in kept + made:  # the newest counts
            with contextlib.suppress(DataError, KeyError, TypeError, AttributeError):
                told = read_json(file)
                if told.get("profile", profile) == profile:
                    self.seconds[name] = float(told.get("metrics", told)["seconds"])

    def before(self, name: str) -> str:
        """In words, before the notebook of this name is executed."""
        spent = time.monotonic() - self.began
        done = sum(self.seconds.get(other) or 0 for other in self.begun)
        left = [other for other in self.names if other not in self.begun]
        self.begun.append(name)
        words = f"{len(self.names) - len(left) + 1} of {len(self.names)}; {_minutes(spent)} so far"
        if all(self.seconds.get(other) for other in left):
            # Of this machine, once something is known of it.
            pace = spent / done if done > 10 else 1
            words += f", about {_minutes(pace * sum(self.seconds[other] for other in left))} to go"
        return f"({words})"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else f"{seconds / 60:.0f} min"


def _save_whole(run: Path) -> None:
    """Let papermill save the notebooks of this run atomically: a full disk leaves no half of one."""
    from papermill.iorw import LocalHandler, papermill_io

    class Whole(LocalHandler):
        def write(self, text, path):
            with atomic_write(path) as file:
                file.write(text.encode())

    papermill_io.register(str(run), Whole())


def _execute_one(path: Path, folder: Path, parameters: dict) -> bool:
    """Whether the notebook came to its end; if not, the log and the notebook itself say why."""
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    try:
        folder.mkdir(exist_ok=True)
        papermill.execute_notebook(
            path,
            folder / "notebook.ipynb",
            parameters={**parameters, "run_dir": str(folder)},
            kernel_name="python3",
            cwd=ROOT,
            progress_bar=False,
            # The kernel's chatter; papermill raises errors.
            extra_arguments=["--log-level=CRITICAL"],
            # Else other users of this machine could read on its loopback what cells print.
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )
    except PapermillExecutionError as error:
        said = " ".join(str(error.evalue).split())
        log.error("%s failed with %s: %s", path.stem, error.ename, said)
        return False
    # A kernel that did not start, or was killed, or a notebook that cannot be saved: no cell says
    # so, and the other notebooks go on.
    except Exception as error:
        last_words = folder.parent / KERNEL_LOG
        log.error("%s failed: %s Its last output is in %s.", path.stem, one_line(error), last_words)
        with contextlib.suppress(Exception):  # there may be no room for it, or no whole notebook
            _note_death(folder / "notebook.ipynb", path, error)
        return False
    return True


@contextlib.contextmanager
def _headless(log_file: Path, *, threads: int = 0) -> Iterator[None]:
    """The environment of notebooks that nobody watches, with so many threads each; the caller's own
    is put back.

    What kernels write past the notebook (TensorFlow's greetings, a crash) goes to `log_file`;
    Python's own standard error stays where it was.
    """
    before, stderr, terminal = dict(os.environ), sys.stderr, os.dup(2)
    # What kernels need of a home, which may be missing, or on NFS, where their history locks up.
    home = tempfile.TemporaryDirectory(prefix="chexlib-kernels-")
    # IPython else copies a file there with its mode, which some file systems refuse.
    readme = Path(home.name, "profile_default", "startup", "README")
    readme.parent.mkdir(parents=True)
    readme.touch()
    try:
        # Without room for the file, what kernels say goes where it went before.
        with contextlib.suppress(OSError), open(log_file, "ab") as kernels:
            os.dup2(kernels.fileno(), 2)
        sys.stderr = open(  # noqa: SIM115
            terminal,
            "w",
            buffering=1,
            encoding=stderr.encoding,
            errors="backslashreplace",
            closefd=False,
        )
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.update({BATCH: "1", "TQDM_DISABLE": "1"})  # lines instead of bars
        # The kernel of this environment, whatever the user or the site has installed.
        os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
        os.environ.pop("JUPYTER_PATH", None)
        os.environ.update({"JUPYTER_RUNTIME_DIR": home.name, "IPYTHONDIR": home.name})
        for name, value in (thread_environment(threads) if threads else {}).items():
            os.environ.setdefault(name, value)  # what the user has set counts more
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = stderr
        os.dup2(terminal, 2)
        os.close(terminal)
        os.environ.clear()
        os.environ.update(before)
        home.cleanup()


def end_when_told() -> None:
    """Let Ctrl-C and SIGTERM end this process as Python does, by KeyboardInterrupt, and by force if
    that takes longer.

    papermill waits for its kernel to shut down, and has been seen to wait for ever. After
    `PATIENCE` seconds the children (kernels, whose watchdogs end their engines) are killed, and the
    process ends with status 130, telling on standard error where it was.
    """

    def give_up() -> None:
        faulthandler.dump_traceback()
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(130)

    def told(number, frame) -> None:
        timer = threading.Timer(PATIENCE, give_up)
        timer.daemon = True  # an end in time needs it no more
        timer.start()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, told)


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Paths of the notebooks with these names, numbers or file names, in their order; all if none
    is named, the report last.
    """
    every = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    every.sort(key=lambda path: path.stem.startswith(REPORT))
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [path for path in every if stem in (path.stem, path.stem.split("_")[0])]
        if not matches:
            stems = ", ".join(path.stem for path in every)
            raise ConfigError(
                f"there is no notebook {name!r}. Use a name or its two digits, such as 03: {stems}."
            )
        chosen += [path for path in matches if path not in chosen]
    return chosen or every


def _profile(names: str) -> dict:
    """The parameters of a profile, or of several with commas between them, of which later ones
    count more.
    """
    import yaml

    folder, parameters = ROOT / "notebooks" / "profiles", {}
    for name in names.split(","):
        file = folder / f"{name}.yaml"
        if not file.exists():
            profiles = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            step = f"write one: {file}"
            if name == "tuned":
                step = "make this one with `python -m chexlib tune`"
            raise ConfigError(f"there is no profile {name!r}. Use one of {profiles}, or {step}.")
        try:
            require_file(file)
            values = yaml.safe_load(file.read_bytes()) or {}
            if not isinstance(values, dict):
                raise ValueError("it does not have names with values")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{file} cannot be read as a profile ({first_line(error)}). Write a line "
                "`name: value` for each parameter."
            ) from error
        parameters |= values
    return parameters


def _note_death(made: Path, source: Path, error: Exception) -> None:
    """Let the notebook itself say that its kernel died, for the report."""
    import nbformat

    notebook = nbformat.read(made if made.exists() else source, as_version=4)
    cell = nbformat.v4.new_code_cell()
    cell.outputs = [
        nbformat.v4.new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[])
    ]
    notebook.cells.append(cell)
    with atomic_write(made) as file:
        file.write(nbformat.writes(notebook).encode())


def _typed(value, kind: str):
    """Text from the command line as the type that the notebook's annotation names, if it is one."""
    makers = {
        "int": int,
        "float": float,
        "bool": lambda text: {"true": True, "false": False}[text.lower()],
    }
    try:
        return makers[kind](value) if isinstance(value, str) else value
    except (ValueError, KeyError):
        return value


def _checked(parameters: dict, profile: dict, accepted: dict[Path, dict]) -> dict:
    """The profile's settings and, over them, these parameters: text has the type of the notebook's
    annotation, and the data folder is a full path.

    ConfigError for a parameter that no notebook has, and for a value of another type.
    """
    kinds = {}
    for declared in accepted.values():
        for name, parameter in declared.items():
            kinds.setdefault(name, parameter["inferred_type_name"])
    names = sorted(kinds.keys() - {"run_dir"})  # that one is execute's
    for name in parameters:
        if name not in names:
            raise ConfigError(
                f"no notebook of this run has a parameter {name!r}."
                f"{did_you_mean(name, names)} Use one of {', '.join(names)}."
            )
    on_engines = "engines" in kinds
    settings = {**PLACE, "data_dir": "", **profile, **parameters}
    kinds |= {"data_dir": "str"} | {name: type(value).__name__ for name, value in PLACE.items()}
    kinds = {name: kind for name, kind in kinds.items() if name in settings}
    settings |= {name: _typed(settings[name], kind) for name, kind in kinds.items()}
    if isinstance(settings["engines"], int) and settings["engines"] < 1:
        raise ConfigError(
            f"engines={settings['engines']} is not accepted. Use 1 or more MPI engines."
        )
    check_parameters(settings, kinds)
    for name in ("data_dir", "hosts"):  # the kernels work in another folder
        if settings[name] and (name == "data_dir" or os.path.isfile(settings[name])):
            settings[name] = str(Path(settings[name]).absolute())
    site = find_site(
        settings["hosts"],
        interface=settings["interface"],
        slurm=settings["slurm"],
        options=settings["slurm_options"],
    )
    site.threads_of(settings["engines"], settings["threads"])
    here = on_engines and not site.network
    if here and "engines" not in parameters and settings["engines"] > max(FEW, cores()):
        raise ConfigError(
            f"engines={settings['engines']} of this profile are more than the {cores()} cores of "
            "this host. Name hosts (--hosts node1:32,node2:32 --interface eth0) or --slurm, or ask "
            f"for so many here: --engines {settings['engines']}."
        )
    return settings


def _refuse_what_cannot_work(settings: dict) -> None:
    if settings["data_dir"]:
        from chexlib.data.nih import load_radiographs

        images = len(load_radiographs(settings["data_dir"]))
        if settings["engines"] > images:
            raise ConfigError(
                f"{settings['engines']} engines cannot share {images} images. Use at most {images} "
                "engines."
            )
