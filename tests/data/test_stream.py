"""The phantom stream: never the same image twice, the same for the same seed and number, no process
left behind.
"""

import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import psutil
import pytest

from chexlib.data import stream
from chexlib.data.stream import FIRST_PATIENT, PATIENTS, stream_batches, stream_images
from chexlib.errors import ConfigError
from chexlib.findings import FINDINGS
from chexlib.phantom.film import render
from chexlib.phantom.population import sample_patient

SETTINGS = {"seed": 4, "size": 32, "min_prevalence": 0.1}


@pytest.fixture(scope="module")
def first():
    """The first images of the stream: all views of its first patients, and a second block."""
    return stream_images(range(PATIENTS * 8 + 20), **SETTINGS)


def test_an_image_depends_on_nothing_but_the_seed_and_its_number(first):
    numbers = [250, 3, 260, 32, 3]
    pixels, labels = stream_images(numbers, **SETTINGS)
    np.testing.assert_array_equal(pixels, first[0][numbers])
    np.testing.assert_array_equal(labels, first[1][numbers])
    other, _ = stream_images(numbers, **{**SETTINGS, "seed": 5})
    assert not any(np.array_equal(a, b) for a, b in zip(pixels, other, strict=True))


def test_no_image_comes_twice_and_none_is_nearly_another(first):
    flat = first[0].reshape(len(first[0]), -1).astype(np.float32)
    square = (flat**2).sum(1)
    apart = np.sqrt(np.maximum(square[:, None] + square - 2 * flat @ flat.T, 0) / flat.shape[1])
    apart[np.diag_indices_from(apart)] = np.inf
    assert apart.min() > 8  # grey levels, root mean square; grain alone would be about 5


def test_pixels_show_the_patient_whose_findings_are_the_labels():
    """A view is recognised, among 32 films as the phantom draws them, as that of its patient."""
    pixels, labels = stream_images(range(2 * PATIENTS), views=2, mirror=False, **SETTINGS)
    films = [sample_patient(4, FIRST_PATIENT + k, min_prevalence=0.1)[0] for k in range(PATIENTS)]
    drawn = np.stack([render(film, size=32)[0] for film in films])

    def spectra(images):
        centred = images - images.mean((1, 2), keepdims=True)
        return np.fft.fft2(centred / centred.std((1, 2), keepdims=True))

    # Correlation at the best shift: the views are taken in other positions.
    shifted = np.fft.ifft2(spectra(pixels)[:, None] * spectra(drawn).conj()).real.max((2, 3))
    patients = np.arange(len(pixels)) % PATIENTS
    assert np.mean(shifted.argmax(1) == patients) > 0.4  # 1 in 32 by chance
    expected = np.array([[finding in films[k].findings for finding in FINDINGS] for k in patients])
    np.testing.assert_array_equal(labels, expected)
    assert labels[:PATIENTS].sum(0).min() >= 1  # of 32 patients, each finding expected in 10 %


def test_half_of_the_images_are_mirrored():
    plain, mirrored = (
        stream_images(range(100), mirror=mirror, **SETTINGS)[0] for mirror in (False, True)
    )
    flipped = np.array(
        [np.array_equal(a[:, ::-1], b) for a, b in zip(plain, mirrored, strict=True)]
    )
    same = np.array([np.array_equal(a, b) for a, b in zip(plain, mirrored, strict=True)])
    assert (flipped ^ same).all() and 30 < flipped.sum() < 70


def test_patients_are_none_of_a_phantom_on_disk():
    from chexlib.phantom.write import write_phantom

    with pytest.raises(ConfigError, match="n_images"):
        write_phantom("never", n_images=FIRST_PATIENT)


def test_batches_are_the_stream_shared_among_ranks_and_go_on_from_any_image(first, monkeypatch):
    pixels, labels = first

    def batches(count, *, workers, **settings):
        monkeypatch.setattr(stream, "cores", lambda: workers)
        found = stream_batches(global_batch=30, **SETTINGS, **settings).take(count)
        return [[part.numpy() for part in batch] for batch in found]

    alone = batches(3, workers=1)
    for step, (x, y, w) in enumerate(alone):
        assert (x.dtype, x.shape, y.dtype, w.tolist()) == (
            np.float32,
            (30, 32, 32, 1),
            np.float32,
            [1] * 30,
        )
        np.testing.assert_array_equal(x[..., 0], pixels[30 * step : 30 * step + 30])
        np.testing.assert_array_equal(y, labels[30 * step : 30 * step + 30])
    shared = [batches(3, workers=2, rank=rank, ranks=2) for rank in range(2)]
    for step, whole in enumerate(alone):
        for part in range(3):
            np.testing.assert_array_equal(
                np.concatenate([rank[step][part] for rank in shared]), whole[part]
            )
    later = batches(1, workers=1, first_image=60)[0]
    np.testing.assert_array_equal(later[0], alone[2][0])


def wait_until_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


def test_processes_end_with_the_iterator(monkeypatch):
    monkeypatch.setattr(stream, "cores", lambda: 2)

    def drawers():
        children = psutil.Process().children(recursive=True)
        return {child for child in children if "spawn_main" in " ".join(child.cmdline())}

    before = (
        drawers()
    )  # of other tests of this process, whose iterators Python has not collected yet
    iterator = iter(stream_batches(global_batch=8, **SETTINGS))
    next(iterator)
    drawing = drawers() - before
    assert len(drawing) == 2
    del iterator
    assert wait_until_gone(drawing)


SCRIPT = """
import signal
import time
from chexlib.data import stream
from chexlib.machine import import_tensorflow

stream.cores = lambda: 2

def main():
    import_tensorflow()  # quicker than by itself
    for batch in stream.stream_batches(seed=0, size=32, global_batch=8):
        print("drawn", flush=True)
        time.sleep(0.2)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
    try:
        main()
    except KeyboardInterrupt:  # as the command line does
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind_however_training_ends(tmp_path, how):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "train.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert [line.strip() for line in islice(process.stdout, 2)] == ["drawn", "drawn"]
        family = psutil.Process(process.pid).children(recursive=True)
        assert sum("spawn_main" in " ".join(p.cmdline()) for p in family) == 2
        time.sleep(0.3)
        process.send_signal(how)
        process.wait(30)
    assert wait_until_gone(family)


def test_a_script_that_cannot_start_processes_is_told_why(tmp_path):
    script = SCRIPT.replace('if __name__ == "__main__":', "if True:").replace(
        "lambda: 2", "lambda: 1"
    )
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode and "guard" in done.stderr


def test_what_an_uncaught_error_holds_is_let_go_before_python_ends():
    """An iterator that ends later waits for threads that never get Python's lock: seen once in ten
    ends of 3.13.
    """
    script = (
        "import atexit, sys, weakref\n"
        "from chexlib.data import pipeline\n"
        "class Held:\n    pass\n"
        "def work():\n    held = Held()\n    alive.append(weakref.ref(held))\n    raise "
        "ValueError('planted')\n"
        "alive = []\n"
        "atexit._clear()\n"
        # The last that is registered is first.
        "atexit.register(lambda: print('alive' if alive[0]() else 'gone'))\n"
        "if sys.argv[1] == 'on':\n    atexit.register(pipeline._let_go_of_the_last_error)\n"
        "work()\n"
    )
    for how, said in (("on", "gone"), ("off", "alive")):
        done = subprocess.run(
            [sys.executable, "-c", script, how], capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split() == [said] and "ValueError: planted" in done.stderr


WRONG = [
    {"size": 16},
    {"first_image": -1},
    {"global_batch": 1, "ranks": 2},
    {"difficulty": "odd"},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_impossible_stream_is_refused_with_the_value(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        stream_batches(**{**SETTINGS, "global_batch": 8, **wrong})
