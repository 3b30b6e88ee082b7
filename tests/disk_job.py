"""Run by `test_disk.py` with `faulty_disk.c` before libc: commands again and again, with one call
after the other that changes a file failing, or killing the process. Prints a line of JSON each.

python tests/disk_job.py '{"commands": {"card": 5}, "folder": ..., "library": ..., ...}'

Each trial is a fork, in which the command finds what `before` holds. It must end in one `Error:`
line, or in no error; each file must be as before or whole; nothing else may be left; and the same
command must then do all that it was asked for.
"""

import contextlib
import ctypes
import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import chexlib.app.execute
import chexlib.data.fetch
import chexlib.scaling.tune
from chexlib.app import runs
from chexlib.app.cli import Command, main
from chexlib.app.report import build_report
from chexlib.cluster.cleanup import OWNER, PREFIX, sweep
from chexlib.data.cache import ImageStore
from chexlib.files import write_json
from chexlib.findings import FINDINGS
from chexlib.models.weights import extend_card

FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "kill": -1}
# Names that are made up anew at each call.
RANDOM = re.compile(
    r"[0-9a-f]{32}|\d{8}-\d{6}(-\d+)?|(?<=\.)\d+-\d+$|(?<=\.)[0-9a-f]{8}(?=\.partial)"
    r"|(?<=\.latest\.)\d+|(?<=__autograph_generated_file)\w+"
)
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
job = json.loads(sys.argv[1])
library, data = ctypes.CDLL(job["library"]), Path(job["data"])
os.environ |= {"CHEXLIB_CACHE": f"{job['folder']}/cache", "TQDM_DISABLE": "1"}
root = before = work = after = Path()  # folders of the command that is tried


# --- commands: what they find, and what is called


def load(*modules):
    """Import what takes long once, and not in each fork."""
    for module in modules:
        importlib.import_module(module)


def phantom():
    return ["phantom", f"{work}/p", "--images", "3", "--size", "32", "--workers", "1"]


def cache():
    os.environ["CHEXLIB_CACHE"] = str(work / "cache")
    paths = sorted(map(str, data.glob("images_001/images/*.png")))[:12]
    return lambda: ImageStore(paths, size=24)


def predictions(path):
    table = pd.read_csv(data / "Data_Entry_2017_v2020.csv").rename(columns={"Image Index": "image"})
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"image": table["image"], "patient": table["Patient ID"].astype(str)})
    frame["part"] = "test"
    for finding in FINDINGS:
        frame[f"label_{finding}"] = table["Finding Labels"].str.contains(finding).astype(float)
        frame[f"score_{finding}"] = rng.random(len(frame))
    frame.to_parquet(path)


def evaluate():
    predictions(before / "predictions.parquet")
    return ["evaluate", f"{work}/predictions.parquet", "--data", str(data)]


def card():
    shutil.copy(job["model"], before / "model.keras")
    images = {"train": 40, "validation": 10, "test": 10}
    facts = {"ranks": 1, "best_epoch": 0, "data": "phantom", "config": small(), "date": "today"}
    facts["split"] = {"name": "patient", "digest": "abc", "images": images}
    extend_card(before / "model.keras", **facts)
    predictions(before / "predictions.parquet")
    (before / "MODEL_CARD.md").write_text("an older card")
    return ["card", str(work)]


def compare():
    for name in ("metrics", "params"):
        (before / "03_train_baseline").mkdir(exist_ok=True)
        write_json(before / "03_train_baseline" / f"{name}.json", {})
    return ["compare", str(work)]


def tune():
    speed = {"images_per_second": 3.0, "gflop_per_image": 2.0, "seconds": [1.0]}
    chexlib.scaling.tune.measure = lambda *args, **settings: speed
    chexlib.scaling.tune.layouts = lambda: [(1, 1), (1, 2)]
    chexlib.scaling.tune.SWEEP = work / "tuned.json"
    chexlib.scaling.tune.PROFILE = work / "tuned.yaml"
    (before / "tuned.yaml").write_text("engines: 7\n")
    return ["tune", "--topology", "vgg16", "--size", "64"]


def fetch():
    www = root / "www"
    www.mkdir()
    with tarfile.open(www / "1.gz", "w:gz") as tar:
        for path in sorted(data.glob("images_001/images/*.png"))[:2]:
            tar.add(path, f"images/{path.name}")
    shutil.copy(data / "Data_Entry_2017_v2020.csv", www / "labels")
    code = "import http.server as h, sys\ns = h.ThreadingHTTPServer(('127.0.0.1', 0), "
    code += "lambda *a: h.SimpleHTTPRequestHandler(*a, directory=sys.argv[1]))\n"
    code += "print(s.server_port, flush=True)\ns.serve_forever()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(www)], stdout=-1, stderr=subprocess.DEVNULL, text=True
    )
    ends.append(server.kill)
    port = int(server.stdout.readline())

    def remote(file, name):
        content = (www / file).read_bytes()
        digest = f"md5:{hashlib.md5(content).hexdigest()}"
        url = f"http://127.0.0.1:{port}/{file}"
        return chexlib.data.fetch.Remote(name, url, len(content), digest)

    os.environ["NO_PROXY"] = "127.0.0.1"
    chexlib.data.fetch.ARCHIVES = [remote("1.gz", "images_001.tar.gz")]
    chexlib.data.fetch.TABLES = [remote("labels", "Data_Entry_2017_v2020.csv")]
    return ["fetch", f"{work}/nih"]


def notebook(text):
    from nbformat import v4, writes

    output = v4.new_output("stream", name="stdout", text=text)
    cells = [v4.new_markdown_cell("# A notebook"), v4.new_code_cell("run()", outputs=[output])]
    return writes(v4.new_notebook(cells=cells, metadata={"papermill": ENDED}))


ENDED = {"end_time": "2026", "exception": None, "duration": 1.0}


def report():
    load("nbconvert", "bs4")
    folder = before / "00_start"
    folder.mkdir()
    (folder / "notebook.ipynb").write_text(notebook("done"))
    write_json(folder / "metrics.json", {"seconds": 1.0})
    return lambda: build_report(work)


def run():
    """Two notebooks, of which papermill and the kernel do here what they write."""
    project = root / "project"
    (project / "notebooks" / "profiles").mkdir(parents=True)
    (project / "notebooks" / "profiles" / "quick.yaml").write_text("engines: 1\n")
    for name in ("00_start", "03_train"):
        (project / "notebooks" / f"{name}.ipynb").write_text(notebook("source"))
    chexlib.app.execute.ROOT = project

    def pretend(path, output, parameters, **settings):
        from matplotlib.figure import Figure
        from papermill.iorw import papermill_io

        papermill_io.write(notebook("begun"), str(output))
        here = runs.start(path.stem, run_dir=parameters["run_dir"], parameters={})
        here.save_figure(Figure((1, 1)), "figure", caption="A figure")
        here.finish(answer=1)
        papermill_io.write(notebook("done"), str(output))

    load("nbconvert", "bs4", "matplotlib.backends.backend_agg", "papermill.iorw")
    sys.modules["papermill"].execute_notebook = pretend
    return ["run", "--runs-dir", f"{work}/runs", "--resume"]


def clean():
    folder = before / f"{PREFIX}x"
    folder.mkdir()
    owner = {"host": os.uname().nodename, "pid": 2**22 + 1, "born": 0.0, "shared": []}
    write_json(folder / OWNER, owner)
    return lambda: sweep(work)


def small(**changes):
    """Settings of a training that takes seconds, for the command line."""
    settings = {"topology": "vgg16", "width": 0.25, "stem": "small", "size": 32, "epochs": 1}
    settings |= {"data_dir": str(data), "run_dir": f"{work}/run", "precision": "float32"}
    return {**settings, "batch_size": 8, "max_steps": 2, "max_images": 40, **changes}


def train():
    """In the folder of an earlier training."""
    write_json(before / "first.json", small(seed=1))
    write_json(before / "config.json", small(checkpoint_steps=1, snapshots=True))
    shutil.copytree(before, work)
    assert in_a_fork(lambda: call(["train", "--config", f"{work}/first.json"]), root / "first") == 0
    shutil.rmtree(before)
    work.rename(before)
    return ["train", "--config", f"{work}/config.json"]


def predict():
    os.environ["TMPDIR"] = str(work / "tmp")
    (before / "tmp").mkdir()
    images = sorted(map(str, data.glob("images_001/images/*.png")))[:2]
    return ["predict", *images, "--weights", job["model"], "--heatmaps", f"{work}/maps"]


# --- trials


def call(command):
    """Run a command as the command line does, a function as if it were one; the exit status."""
    words = command if isinstance(command, list) else []
    runner = main if words else Command("function", callback=command)
    try:
        runner.main(words, prog_name="chexlib")
    except SystemExit as end:
        return end.code or 0


def in_a_fork(function, output, *, arm=None, limit=180):
    """The exit status of `function()` in a child, minus the signal if one ended it; its words in
    `output`.
    """
    pid = os.fork()
    if not pid:
        status = 70
        try:
            with open(output, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if arm:
                library.disk_arm(*arm)
            status = function()
            if arm and arm[3]:
                library.disk_disarm()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    until = time.monotonic() + limit
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def fresh():
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(before, work, symlinks=True)


def names(folder):
    """The files below a folder by their names, random parts apart."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_symlink():
            found[RANDOM.sub("*", str(path.relative_to(folder)))] = path
    return found


def is_whole(path, same):
    """Whether a file that was written is one, and not a part of one."""
    if path.suffix in (".json", ".ipynb"):
        json.loads(path.read_bytes())
    elif path.suffix == ".parquet":
        pd.read_parquet(path)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".keras":
        from chexlib.models.weights import read_card

        read_card(path)
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            return all(arrays[name].size >= 0 for name in arrays.files)
    elif path.suffix == ".html":
        return path.read_text().rstrip().endswith("</html>")
    elif path.name in ("id", "kernel.log") or path.suffix == ".py" or path.is_symlink():
        return True
    else:
        return same is not None and path.read_bytes() == same.read_bytes()
    return True


def unsound(*, drafts):
    """Files in the work folder that are neither as before nor whole, or are too many."""
    old, new, wrong = names(before), names(after), []
    for name, path in names(work).items():
        if name in old and not path.is_symlink() and path.read_bytes() == old[name].read_bytes():
            continue
        if name not in new:
            if not drafts.search(name) and name not in old:
                wrong.append(f"left: {name}")
            continue
        try:
            if not is_whole(path, new.get(name)):
                wrong.append(f"half: {name}")
        except Exception as error:
            wrong.append(f"half: {name} ({error!r:.80})")
    # Checkpoints of another training go when the first new one is there.
    kept = [name for name in old if name in new and not name.endswith(".npz")]
    wrong += [f"lost: {name}" for name in kept if name not in names(work)]
    return wrong


# What a command that is killed may leave for the next one to clear; fetch's bytes that came.
KEPT = {
    "phantom": r"^\.p\.(.*partial/|lock$)",
    "fetch": r"^nih/\.fetch/",
    "tune": r"^\.tuned\.json\.lock$",
    "predict": r"^tmp/tmp",
}
NEVER = re.compile(r"(?!)")
DRAFT = r"(^|/)\.[^/]+\.\*$"  # whole, between its first name and its last


def trial(command, name, at, kind, calls):
    """What was wrong when call number `at` failed, a list of words."""
    fresh()
    output, wrong = root / "output", []
    status = in_a_fork(
        lambda: call(command), output, arm=(os.fsencode(work), at, FAULTS[kind], None)
    )
    lines = output.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    if kind == "kill":
        if status != -signal.SIGKILL:
            wrong.append(f"ended with {status}, not killed")
    elif status not in (0, 1, 2):
        wrong.append(f"ended with {status}")
    elif len(errors) != (status == 2):
        wrong.append(f"ended with {status} and {len(errors)} lines")
    if any("Traceback" in line or "Exception ignored" in line for line in lines):
        wrong.append("traceback: " + lines[-1][:200])
    removing = calls[at - 1].split()[0] in ("unlink", "rmdir") and kind != "kill"
    drafts = NEVER
    if kind == "kill" or name == "fetch":
        drafts = KEPT.get(name, NEVER.pattern)
        if calls[at - 1].startswith("rename"):
            drafts = f"{drafts}|{DRAFT}"
        drafts = re.compile(drafts)
    if removing:  # what cannot be removed stays
        drafts = re.compile("")
    checked = root / "checked"

    def check():
        print(json.dumps([*unsound(drafts=drafts), *again()]))
        return 0

    def again():
        if (status := call(command)) != 0:
            yield f"again: ended with {status}"
        if missing := names(after).keys() - names(work).keys():
            yield f"again: lacks {sorted(missing)}"
        yield from (f"again: {word}" for word in unsound(drafts=re.compile("")))

    if in_a_fork(check, checked) != 0:
        wrong.append("check: " + checked.read_text(errors="replace")[-300:])
    else:
        found = [line for line in checked.read_text().splitlines() if line.startswith("[")]
        wrong += json.loads(found[-1])
    said = errors[0] if errors else ""
    return wrong, said


ends = []  # what is called at the end


def tell(name, every):
    """Try a command at every so manyth call, or at the first of each call on each file."""
    global root, before, work, after
    root = Path(job["folder"]) / name
    before, work, after = root / "before", root / "work", root / "after"
    before.mkdir(parents=True)
    command = globals()[name]()
    log = root / "calls"
    counts = {}
    told, faults, said = {}, [], set()
    for kind in FAULTS:
        fresh()
        # The fault is never reached, but decides which calls count.
        arm = (os.fsencode(work), 0, FAULTS[kind], os.fsencode(log))
        status = in_a_fork(lambda: call(command), root / "output", arm=arm)
        assert status in (0, 1), (root / "output").read_text()
        if not after.exists():
            shutil.copytree(work, after, symlinks=True)
        calls = log.read_text().splitlines()
        counts[kind] = len(calls)
        chosen = range(1, len(calls) + 1, every or 1)
        if not every:
            numbers = {}
            for number, text in enumerate(calls, 1):
                numbers.setdefault(RANDOM.sub("*", re.sub(r"#\d+ \(deleted\)", "#", text)), number)
            chosen = sorted(numbers.values())
        told[kind] = len(chosen)
        for at in chosen:
            wrong, line = trial(command, name, at, kind, calls)
            print(f"{name}, {kind}: {at} of {len(calls)} {wrong}", file=sys.stderr, flush=True)
            said.add(re.sub(r"[0-9]+", "N", line.replace(str(root), "")))
            faults += [f"{name}, {kind} at {calls[at - 1]} ({at}): {word}" for word in wrong]
    found = {"calls": counts, "tried": told, "faults": faults, "said": sorted(said)}
    print(json.dumps({"command": name, **found}), flush=True)


for name, every in job["commands"].items():
    if child := os.fork():  # what a command imports and sets is its own
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    try:
        tell(name, every)
    finally:
        for end in ends:
            end()
    os._exit(0)
