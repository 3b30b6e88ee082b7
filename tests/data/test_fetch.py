"""Fetching the NIH release from a server that does all it can to spoil it: one clear error or the
right files.
"""

import contextlib
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from chexlib.app.cli import main
from chexlib.data import fetch as module
from chexlib.data.fetch import ARCHIVES, CHUNK, TABLES, Remote, fetch
from chexlib.data.nih import load_radiographs
from chexlib.errors import ConfigError, DataError

LABELS = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
    "00000001_000.png,Mass,0,1,50,M,PA,256,256,1,1\n00000002_000.png,No "
    "Finding,0,2,60,F,AP,256,256,1,1\n"
)


def tar_gz(members):
    """The bytes of an archive of (TarInfo or name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            if content is not None:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    return buffer.getvalue()


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (256, 512), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()  # 130 kB that do not compress


IMAGES = {f"0000000{i}_000.png": png(i) for i in (1, 2)}
GOOD = tar_gz([(f"images/{name}", content) for name, content in IMAGES.items()])


def odd(name, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


class Server(BaseHTTPRequestHandler):
    """Serves `server.files` as `server.mood` says, and notes the ranges that were asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        files, mood = self.server.files, self.server.mood
        asked = self.headers.get("Range", "")
        self.server.ranges.append(asked)
        content = files.get(self.path)
        if content is None or mood == "gone":
            return self.send_error(404)
        if mood == "silent":
            self.server.release.wait(20)
            return self.close()
        start = int(asked[6:-1]) if asked and mood != "no ranges" else 0
        self.send_response(206 if start else 200)
        body = content[start:]
        if mood == "wrong bytes":
            body = bytes(len(body))
        if mood == "endless":
            body = content * 3
        else:
            length = len(body) - 1000 if mood == "short" else len(body)
            self.send_header("Content-Length", str(length))
            body = body[:length]
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            if mood == "drops" or (mood == "drops once" and len(self.server.ranges) == 1):
                self.wfile.write(body[: CHUNK + 100])
                return self.close()
            if mood == "stalls":
                self.wfile.write(body[: 2 * CHUNK])
                self.server.release.wait(20)
                return self.close()
            self.wfile.write(body)
        self.close()

    def close(self):
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in (
        ("TIMEOUT", 0.3),
        ("PAUSE", 0.01),
        ("ARCHIVES", ARCHIVES),
        ("TABLES", TABLES),
    ):
        monkeypatch.setattr(module, name, value)
    it = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    it.daemon_threads, it.mood, it.ranges, it.release = True, "", [], threading.Event()
    it.files = {"/1.gz": GOOD, "/labels": LABELS.encode()}
    thread = threading.Thread(target=it.serve_forever, args=(0.02,))
    thread.start()
    yield it
    it.release.set()
    it.shutdown()
    it.server_close()
    thread.join()


def remote(server, path="/1.gz", name="images_001.tar.gz", content=None):
    content = server.files[path] if content is None else content
    digest = hashlib.md5(content).hexdigest()
    return Remote(
        name, f"http://127.0.0.1:{server.server_port}{path}", len(content), f"md5:{digest}"
    )


def fetch_from(server, folder, tables=()):
    """Fetch the one archive of the server; its fixture puts the release's back."""
    module.ARCHIVES, module.TABLES = [remote(server)], tables
    return fetch(folder)


def assert_whole(folder):
    found = {path.name: path.read_bytes() for path in (folder / "images_001" / "images").iterdir()}
    assert found == IMAGES
    assert not (folder / ".fetch").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["fetch.json", "images_001"]


def test_what_is_fetched_is_a_data_folder_and_is_not_fetched_twice(server, tmp_path):
    table = remote(server, "/labels", "Data_Entry_2017_v2020.csv")
    for _ in range(2):
        folder = fetch_from(server, tmp_path / "a" / "nih", [table])
    assert len(server.ranges) == 2
    radiographs = load_radiographs(folder)  # with NIH's column `Patient Sex`, once `Patient Gender`
    assert radiographs.table[["sex", "Mass"]].to_numpy().tolist() == [["M", 1], ["F", 0]]
    assert (
        json.loads((folder / "fetch.json").read_text())["archives"]["images_001.tar.gz"]["images"]
        == 2
    )
    shutil.rmtree(folder / "images_001")
    fetch_from(server, folder)
    assert len(list((folder / "images_001" / "images").iterdir())) == 2


@pytest.mark.parametrize(
    ("mood", "resumed"), [("drops", True), ("drops once", True), ("no ranges", False)]
)
def test_a_server_that_drops_connections_or_knows_no_ranges_is_enough(
    server, tmp_path, mood, resumed
):
    server.mood = "drops once"
    if mood == "no ranges":  # the first bytes come from an earlier attempt
        (tmp_path / ".fetch").mkdir()
        (tmp_path / ".fetch" / "images_001.tar.gz.partial").write_bytes(GOOD[:CHUNK])
        server.ranges.append("")
    server.mood = mood
    fetch_from(server, tmp_path)
    assert_whole(tmp_path)
    assert any(asked == f"bytes={CHUNK}-" for asked in server.ranges)


FAULTS = {  # what the server does: (what the error says, what is kept for the next time)
    "gone": ("answers 404", 0),
    "wrong bytes": ("does not have the expected checksum", 0),
    "short": ("offers", 0),
    "endless": ("does not end", 0),
    "silent": ("sent nothing in 5 attempts", 0),
    "stalls": ("sent nothing in 5 attempts", None),
}


@pytest.mark.parametrize("mood", FAULTS)
def test_a_faulty_server_is_one_clear_error_and_the_next_time_is_right(
    server, tmp_path, mood, caplog
):
    message, kept = FAULTS[mood]
    server.mood = mood
    if mood == "stalls":  # in its first answer, and is silent from then on
        stop_after(server, answers=1)
    with pytest.raises(DataError, match=message) as told:
        fetch_from(server, tmp_path)
    assert len([line for line in caplog.messages if "interrupted" in line]) <= 2
    assert "images_001" in str(told.value) or "127.0.0.1" in str(told.value)
    assert not (tmp_path / "images_001").exists()
    partial = tmp_path / ".fetch" / "images_001.tar.gz.partial"
    held = partial.stat().st_size if partial.exists() else 0
    assert held == kept if kept is not None else held >= CHUNK
    server.mood, server.ranges[:] = "", []
    fetch_from(server, tmp_path)
    assert_whole(tmp_path)
    assert bool(server.ranges[0]) == bool(held)  # goes on from what was kept, if anything was


def stop_after(server, answers):
    """From then on the server is silent."""
    real = Server.do_GET

    class Counting(Server):
        def do_GET(self):
            if len(self.server.ranges) >= answers and self.server.mood == "stalls":
                self.server.mood = "silent"
            real(self)

    server.RequestHandlerClass = Counting


HOSTILE = {
    "up and out": [("images/../../out.png", b"x")],
    "an absolute path": [("/tmp/out.png", b"x")],
    "a symbolic link": [
        (odd("images/00000001_000.png", tarfile.SYMTYPE, linkname="/etc/passwd"), None)
    ],
    "a link to a folder": [
        (odd("images", tarfile.SYMTYPE, linkname=".."), None),
        ("images/00000001_000.png", b"x"),
    ],
    "a hard link": [
        (odd("images/00000001_000.png", tarfile.LNKTYPE, linkname="../../fetch.json"), None)
    ],
    "a device": [(odd("images/00000001_000.png", tarfile.CHRTYPE, devmajor=1, devminor=3), None)],
    "a pipe": [(odd("images/00000001_000.png", tarfile.FIFOTYPE), None)],
    "an absurd size": [("images/00000001_000.png", bytes(17 * 1024**2))],
    "something else": [("images/00000001_000.png", b"x"), ("images/setup.py", b"x")],
}


@pytest.mark.parametrize("content", HOSTILE)
def test_an_archive_that_would_write_elsewhere_or_too_much_is_refused(server, tmp_path, content):
    server.files["/1.gz"] = tar_gz(HOSTILE[content])
    with pytest.raises(DataError, match=r"holds .*Nothing of it was kept"):
        fetch_from(server, tmp_path / "here" / "nih")
    left = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()
    )
    assert left == []


def test_too_little_room_is_told_before_anything_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=40 * 10**9))
    with pytest.raises(DataError, match=r"needs 53\.\d GB for 12 archives, and 40\.0 GB are free"):
        fetch(tmp_path / "nih")
    assert not list(tmp_path.iterdir())
    assert not server.ranges


CHILD = """
import json, resource, signal, sys
from chexlib.data import fetch as module
folder, values, limit = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
module.ARCHIVES, module.TABLES = [module.Remote(**values)], []
module.TIMEOUT, module.PAUSE = 30, 0.01
module.fetch(folder)
"""


def child(server, folder, limit=0):
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(folder),
        json.dumps(vars(remote(server))),
        str(limit),
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_file_system_that_takes_no_more_is_told_and_what_came_is_kept(server, tmp_path):
    process = child(server, tmp_path, limit=2 * CHUNK)
    assert "DataError: images_001.tar.gz cannot be written" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    server.ranges.clear()
    fetch_from(server, tmp_path)
    assert server.ranges == [f"bytes={2 * CHUNK}-"]
    assert_whole(tmp_path)


def test_a_download_that_is_killed_goes_on_and_ends_right(server, tmp_path):
    server.mood = "stalls"
    process, partial = child(server, tmp_path), tmp_path / ".fetch" / "images_001.tar.gz.partial"
    until = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    with pytest.raises(DataError, match="another fetch is at work"):
        fetch_from(server, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.mood, server.ranges[:], held = "", [], partial.stat().st_size
    assert 0 < held < len(GOOD)
    fetch_from(server, tmp_path)
    assert server.ranges == [f"bytes={held}-"]
    assert_whole(tmp_path)


def test_a_folder_that_fetch_has_not_made_is_left_alone(server, tmp_path):
    (tmp_path / "images_001" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="images_001 is there"):
        fetch_from(server, tmp_path)
    assert not server.ranges


@pytest.mark.parametrize(
    "link", [".fetch", ".fetch/lock", ".fetch/draft", ".fetch/images_001.tar.gz.partial"]
)
def test_what_a_link_in_the_working_folder_names_is_left_as_it_is(server, tmp_path, link):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    place = tmp_path / "data" / link
    place.parent.mkdir(parents=True)
    folder = link in (".fetch", ".fetch/draft")
    place.symlink_to(theirs if folder else theirs / "thesis.txt")
    with (
        pytest.raises(DataError, match="Remove the link")
        if link == ".fetch"
        else contextlib.nullcontext()
    ):
        fetch_from(server, tmp_path / "data")
        assert_whole(tmp_path / "data")
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]
    assert (theirs / "thesis.txt").read_text() == "precious"


def test_the_release_is_12_archives_and_4_files_of_known_size():
    assert [archive.name for archive in ARCHIVES] == [
        f"images_{i:03d}.tar.gz" for i in range(1, 13)
    ]
    assert sum(archive.size for archive in ARCHIVES) == pytest.approx(45.1e9, rel=1e-3)
    assert len({remote.checksum for remote in (*ARCHIVES, *TABLES)}) == 16
    assert all(remote.url.startswith("https://nihcc.") for remote in (*ARCHIVES, *TABLES))


def test_parts_are_chosen_on_the_command_line(server, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "fetch", lambda folder, parts: asked.append((folder, parts)) or folder
    )
    for words in ([], ["--parts", "1,12"], ["--parts", "none"]):
        assert CliRunner().invoke(main, ["fetch", "nih", *words]).output == "nih\n"
    assert asked == [("nih", None), ("nih", [1, 12]), ("nih", ())]
    answer = CliRunner().invoke(main, ["fetch", "nih", "--parts", "one"])
    assert answer.exit_code == 2 and "--parts 'one' is not accepted" in answer.output
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no part 13"):
        fetch(tmp_path / "nih", parts=[1, 13])
