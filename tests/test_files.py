"""What the file system offers, and what is done where it offers less: locks, links, room, names."""

import errno
import fcntl
import os
import socket

import pytest

from chexlib import files
from chexlib.app.runs import new_run
from chexlib.data.nih import load_radiographs
from chexlib.errors import ConfigError, DataError
from chexlib.files import (
    atomic_write,
    file_lock,
    folders_below,
    is_utf8,
    read_json,
    read_text,
    require_file,
    require_room,
    require_writable,
    scratch_folder,
)
from chexlib.training.config import TrainConfig


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, as Lustre often is; NFS refuses locks of files that are read."""
    files._warn_of_no_locks.cache_clear()

    def refuse(number, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_where_there_are_no_locks_work_goes_on_with_one_warning(tmp_path, no_locks, caplog):
    for _ in range(2):
        with (
            file_lock(tmp_path / "lock") as locked,
            file_lock(tmp_path / "lock", wait=False) as too,
        ):
            assert locked and too
    assert os.listdir(tmp_path) == []
    (told,) = caplog.messages
    assert (
        str(tmp_path) in told and "No locks available" in told and "one process at a time" in told
    )


def test_what_is_locked_can_be_written_as_nfs_wants_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        fcntl, "flock", lambda number, kind: seen.append(fcntl.fcntl(number, fcntl.F_GETFL))
    )
    with file_lock(tmp_path / "lock"):
        pass
    assert seen[0] & os.O_ACCMODE == os.O_RDWR


def test_a_lock_that_is_a_link_is_refused_and_what_it_names_stays(tmp_path):
    named = tmp_path / "of_others"
    named.write_text("theirs")
    (tmp_path / "lock").symlink_to(named)
    with pytest.raises(OSError, match="lock"), file_lock(tmp_path / "lock"):
        pass
    assert named.read_text() == "theirs" and (tmp_path / "lock").is_symlink()


def special(folder, kind):
    """A path of what is no regular file."""
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("read", [require_file, read_text, read_json])
def test_a_pipe_a_socket_and_a_device_are_refused_at_once(tmp_path, kind, read):
    path = special(tmp_path, kind)
    with pytest.raises((OSError, DataError)) as error:
        read(path)
    assert "a pipe, a socket or a device, and no file" in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a", "é中", os.fsdecode(b"caf\xe9"), "x\ud800"])
def test_a_name_that_is_no_utf8_is_known_and_refused_where_it_would_have_to_be_text(tmp_path, name):
    sound = name in ("a", "é中")
    assert is_utf8(tmp_path / name) is sound
    if not sound:
        for refuse, error in (
            (lambda path: load_radiographs(path), DataError),
            (lambda path: new_run(path), ConfigError),
            (lambda path: TrainConfig(data_dir=str(path), run_dir="."), ConfigError),
        ):
            with pytest.raises(error, match="UTF-8"):
                refuse(tmp_path / name)


@pytest.mark.parametrize("lacks", ["nothing", "hard links", "files without a name", "neither"])
@pytest.mark.parametrize("name", ["short", "x" * 255])
def test_a_file_is_written_whole_whatever_the_file_system_lacks(tmp_path, monkeypatch, lacks, name):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if lacks in ("hard links", "neither"):
        monkeypatch.setattr(os, "link", refuse)
    if lacks in ("files without a name", "neither"):
        monkeypatch.setattr(files, "_open_nameless", lambda folder: None)
    for content in (b"old", b"new" * 10_000):
        with atomic_write(tmp_path / name) as file:
            file.write(content)
    assert (tmp_path / name).read_bytes() == content
    assert os.listdir(tmp_path) == [name]


def test_an_error_of_writing_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "none" / "file"):
        pass
    assert error.value.filename == str(tmp_path / "none" / "file")
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_each_folder_is_entered_once_wherever_links_lead(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("one", "two"):  # each doubles the paths to everything at every step
        (tmp_path / "a" / name).symlink_to(".")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b" / "film.png").touch()
    found = dict(folders_below(str(tmp_path)))
    assert list(found) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert found[str(tmp_path / "a" / "b")] == [str(tmp_path / "a" / "b" / "film.png")]


def test_a_folder_that_cannot_be_written_is_refused_with_the_next_step(tmp_path):
    require_writable(tmp_path / "new" / "folder", "Name another.")
    assert (tmp_path / "new" / "folder").is_dir() and not list((tmp_path / "new").rglob("*/*"))
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"file/x cannot be written \(Not a directory\). Name anoth"
    ):
        require_writable(tmp_path / "file" / "x", "Name another.")


def test_a_folder_for_temporary_files_without_room_is_refused_before_it_is_filled(tmp_path):
    require_room(tmp_path, 1)
    with pytest.raises(DataError, match=r"has no room for .* MB. Make room.* TMPDIR"):
        require_room(tmp_path, 10**18)
    with pytest.raises(DataError, match="TMPDIR"), scratch_folder(10**18):
        pytest.fail("it was entered")
