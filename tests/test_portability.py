"""chexlib on a system that lacks what Linux alone has. For processors see test_machine.py."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

import chexlib
from benchmarks.lab import emulated
from chexlib import mpi as profiles
from chexlib.cluster.cleanup import OWNER, PREFIX, sign, sweep
from chexlib.data.cache import ImageStore
from chexlib.data.nih import check_images, load_radiographs
from chexlib.models.predict import predict
from chexlib.phantom.write import write_phantom

# Where each may be asked for: these places say what is done without it.
LINUX_ONLY = {
    "sched_getaffinity": {"machine.py"},
    "O_TMPFILE": {"files.py"},
    "/proc/": {"machine.py", "files.py", "cluster/cleanup.py"},
    "/sys/": {"machine.py"},
}


@pytest.mark.parametrize("word", LINUX_ONLY)
def test_what_linux_alone_has_is_asked_for_in_known_places(word):
    root = Path(chexlib.__file__).parent
    users = [path for path in root.rglob("*.py") if re.search(word, path.read_text())]
    assert {str(path.relative_to(root)) for path in users} == LINUX_ONLY[word]


@pytest.fixture
def without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)


def test_images_are_checked_and_cached_by_all_processors(without_affinity, phantom, files):
    assert len(check_images(load_radiographs(phantom))) == 90
    assert len(ImageStore(files[0], size=20)) == 11


def test_phantoms_are_drawn_by_all_processors(without_affinity, tmp_path):
    folder = write_phantom(tmp_path / "phantom", n_images=2, size=32)
    assert len(list(folder.rglob("*.png"))) == 2


def test_images_are_scored_by_all_processors(without_affinity, files, vgg_file):
    assert len(predict(files[0][:2], weights=vgg_file)) == 2


def test_a_cluster_without_proc_is_signed_and_swept_all_the_same(tmp_path, monkeypatch):
    read = Path.read_text

    def refuse(path, *args, **kwargs):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    folder = tmp_path / f"{PREFIX}a"
    folder.mkdir()
    sign(folder, [os.getpid()])
    owner = json.loads((folder / OWNER).read_text())
    assert owner["pid"] == os.getpid()
    assert owner["shared"] == []
    sweep(tmp_path)
    assert folder.exists()  # its owner runs
    (folder / OWNER).write_text(json.dumps({**owner, "born": 0}))
    sweep(tmp_path)
    assert not folder.exists()


def test_ranks_of_one_mac_speak_over_its_own_loopback(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    names = runpy.run_path(profiles.__file__)
    mpich = names["recognise_mpi"]("mpiexec", "HYDRA build details:")
    assert mpich.flags()[-2:] == ["-iface", "lo0"]
    assert "lo0" in names["recognise_mpi"]("mpiexec", "mpiexec (OpenRTE) 4.1.4").flags()


def test_hosts_are_not_emulated_where_there_is_no_linux_and_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("it was tried"))
    assert emulated.why_not() == "hosts are made of Linux' namespaces, and this is another system"
