"""Engines that are not joined: each takes one task after the other, and one that dies is done
without.
"""

import itertools
import json
import os
import signal
import threading
from collections import deque
from pathlib import Path

import pytest
from sharing_job import work
from small_training import config_for
from test_distributed import nothing_left

from chexlib import stopping
from chexlib.cluster import engines as module
from chexlib.cluster.engines import mpi_engines
from chexlib.errors import ClusterError, ConfigError
from chexlib.studies.large_batch import Cell, LargeBatchStudy
from chexlib.studies.stages import rate_of
from chexlib.training.trainer import Reuse


@pytest.fixture
def impatient(monkeypatch):
    """Engines find what tests run, and their heart is listened to more often."""
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(module, "CONTROLLER", ["--HeartMonitor.period=700", *module.CONTROLLER[1:]])


@pytest.mark.cores
@pytest.mark.usefixtures("impatient")
def test_the_task_of_an_engine_that_dies_is_done_again_and_errors_come_through(tmp_path):
    def share(*names):
        return list(engines.share(work, deque((name, str(tmp_path)) for name in names)))

    with mpi_engines(2, threads=1, joined=False) as engines:
        done = share("a", "fatal", *"bcdef")
        assert sorted(task[0] for task, _ in done) == sorted(["fatal", *"abcdef"])
        assert (tmp_path / "died").exists() and len(engines.client.ids) == 1
        assert {len(world) for _, (_, world) in done} == {0}  # no engine is a rank
        with pytest.raises(ConfigError, match="seed=-1"):
            share("wrong")
        with pytest.raises(ClusterError, match=r"rank [01] on .* ValueError: no such thing"):
            share("broken")
        with stopping.listening():
            threading.Timer(1, stopping.request).start()
            assert [task[0] for task, _ in share("patient", "never")] == ["patient"]
        os.kill(engines.cluster.controller.process.pid, signal.SIGKILL)
        with pytest.raises(ClusterError, match=r"controller on .* has ended"):
            share("endless")
    assert nothing_left(engines.folder)


@pytest.mark.long
@pytest.mark.cores
@pytest.mark.usefixtures("impatient")
def test_a_study_on_engines_has_the_rows_of_one_process_to_the_bit(phantom, tmp_path):
    def rows(name, engines=None):
        base = config_for(phantom, tmp_path, norm_momentum=0.99, train_images=64)
        study = LargeBatchStudy(base, tmp_path / f"{name}.jsonl", {"data": "d"})
        cells = itertools.product((16, 32), (0, 1))
        points = [
            study.point(Cell("vgg16", batch), rate_of(0), seed=seed, passes=1)
            for batch, seed in cells
        ]
        assert study.run(points, reuse=Reuse(accumulates=True), engines=engines)
        found = [json.loads(line) for line in study.table.read_text().splitlines()]
        left_out = dict.fromkeys(("seconds", "commit"))
        return sorted(json.dumps({**row, **left_out}) for row in found)

    with mpi_engines(2, threads=1, joined=False) as engines:
        assert rows("shared", engines) == rows("alone")
