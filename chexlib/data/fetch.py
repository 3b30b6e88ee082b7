"""Download of the NIH release: resumed after interruptions, checked and unpacked.

pooch names and verifies files. Its own downloaders begin again after an interruption; the one here
keeps the bytes beside the file and asks for the rest (HTTP Range).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from chexlib.errors import ConfigError, DataError
from chexlib.files import file_lock, read_json, require_writable, write_json

CHUNK = 1 << 16  # bytes: what is lost at most when a connection ends
ATTEMPTS = 5  # in a row that bring no byte
TIMEOUT = 60.0  # seconds without a byte after which a connection counts as dead
PAUSE = 2.0  # seconds before a second attempt; doubled for each that follows
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file to download: its size in bytes, its checksum as pooch's `md5:...` or `sha256:...`."""

    name: str
    url: str
    size: int
    checksum: str


def retrieve(remote: Remote, folder: Path) -> Path:
    """Download a file into `folder`, or go on with it, and check it; a complete one is left.

    Raises
    ------
    DataError
        The server refuses, or brings nothing for `ATTEMPTS` attempts, or the content is not what it
        should be.
    """
    import pooch

    partial = _partial(remote, folder)

    def download(url, output_file, _):
        _complete(remote, partial)
        os.unlink(output_file)
        try:
            # Kept until it is checked: a kill meanwhile costs nothing.
            os.link(partial, output_file)
        except OSError:  # no hard links here
            os.replace(partial, output_file)

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        pooch.retrieve(
            remote.url, remote.checksum, fname=remote.name, path=folder, downloader=download
        )
    except ValueError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{remote.name} from {remote.url} does not have the expected checksum "
            f"({remote.checksum}), and was removed. Fetch again. If that does not help, the file has "
            "changed at its source: look at the page of the release."
        ) from error
    except OSError as error:
        raise DataError(
            f"{remote.name} cannot be written in {folder}: {error.strerror or error}. What has come "
            "is kept. Make room, and repeat the command."
        ) from error
    partial.unlink(missing_ok=True)
    return folder / remote.name


def _complete(remote: Remote, partial: Path) -> None:
    """Download until `partial` has the size of `remote`."""
    import requests

    if _size(partial) > remote.size:
        partial.unlink()
    have, idle = _size(partial), 0
    with tqdm(
        desc=remote.name, total=remote.size, initial=have, unit="B", unit_scale=True, disable=None
    ) as bar:
        while have < remote.size:
            fault = None
            try:
                _receive(remote, partial, have, bar)
            except requests.RequestException as error:
                fault = error
            before, have = have, _size(partial)
            idle = 0 if have > before else idle + 1
            if idle == ATTEMPTS:
                raise DataError(
                    f"{remote.url} sent nothing in {ATTEMPTS} attempts (the last one: {fault}). "
                    f"{have:,} of {remote.size:,} bytes of {remote.name} are kept. Check the network, "
                    "and repeat the command: it continues from there."
                ) from fault
            if have < remote.size and idle < 2:  # what goes on is not told again
                _log.warning(
                    "%s: interrupted at %d bytes (%s), continuing", remote.name, have, fault
                )
            if idle:
                time.sleep(min(PAUSE * 2**idle, 60.0))


def _partial(remote: Remote, folder: Path) -> Path:
    """Where the bytes that came are kept until all are there."""
    return folder / f"{remote.name}.partial"


def _size(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def _receive(remote: Remote, partial: Path, have: int, bar) -> None:
    """Append what one answer of the server brings."""
    import requests

    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        code = answer.status_code
        if 400 <= code < 500 and code not in (408, 429):
            raise DataError(
                f"{remote.url} answers {code} {answer.reason}: {remote.name} is not there now. "
                "Repeat the command later, or look at the page of the release."
            )
        answer.raise_for_status()
        total = answer.headers.get("Content-Length", "")
        if code == 206:
            span = answer.headers.get("Content-Range", "")
            if not span.startswith(f"bytes {have}-"):
                raise requests.ConnectionError(f"asked for bytes {have}-, got {span!r}")
            total = span.rpartition("/")[2]
        if total.isdigit() and int(total) != remote.size:
            raise DataError(
                f"{remote.url} offers {total} bytes, and {remote.name} has {remote.size}: it is "
                "another file. Look at the page of the release."
            )
        with open(partial, "ab") as file:
            if code != 206:  # the server begins again, whatever was asked
                file.truncate(0)
                bar.reset()
            for chunk in answer.iter_content(CHUNK):
                if file.tell() + len(chunk) > remote.size:
                    file.truncate(0)
                    raise DataError(
                        f"{remote.url} does not end after the {remote.size} bytes of {remote.name}: "
                        "it is another file. Look at the page of the release."
                    )
                bar.update(file.write(chunk))


PAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
_STATIC = "https://nihcc.box.com/shared/static/{}.gz"
_FILE = "https://nihcc.app.box.com/index.php?rm=box_download_shared_file&vanity_name=ChestXray-NIHCC&file_id=f_{}"
ARCHIVES = tuple(
    Remote(f"images_{number:03d}.tar.gz", _STATIC.format(token), size, f"md5:{md5}")
    for number, (token, size, md5) in enumerate(
        (
            ("vfk49d74nhbxq3nqjg0900w5nvkorp5c", 2_008_470_987, "fe8ed0a6961412fddcbb3603c11b3698"),
            ("i28rlmbvmfjbl8p2n3ril0pptcmcu9d1", 3_952_623_504, "ab07a2d7cbe6f65ddd97b4ed7bde10bf"),
            ("f1t00wrtdk94satdfb9olcolqx20z2jp", 3_929_234_850, "2301d03bde4c246388bad3876965d574"),
            ("0aowwzs5lhjrceb3qp67ahp0rd1l1etg", 3_838_903_983, "9f1b7f5aae01b13f4bc8e2c44a4b8ef6"),
            ("v5e3goj22zr6h8tzualxfsqlqaygfbsn", 3_935_496_531, "1861f3cd0ef7734df8104f2b0309023b"),
            ("asi7ikud9jwnkrnkj99jnpfkjdes7l6l", 3_986_301_172, "456b53a8b351afd92a35bc41444c58c8"),
            ("jn1b4mw4n6lnh74ovmcjb8y48h8xj07n", 4_016_328_426, "1075121ea20a137b87f290d6a4a5965e"),
            ("tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j", 4_018_347_353, "b61f34cec3aa69f295fbb593cbd9d443"),
            ("upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj", 4_111_327_929, "442a3caa61ae9b64e61c561294d1e183"),
            ("l6nilvfa9cg3s28tqv1qc1olm3gnz54p", 4_181_556_296, "09ec81c4c31e32858ad8cf965c494b74"),
            ("hhq8fkdgvcari67vfhs7ppg2w6ni4jze", 4_187_084_020, "499aefc67207a5a97692424cf5dbeed5"),
            ("ioqwiy20ihqwyr8pf4c24eazhh281pbu", 2_914_187_733, "dc9fda1757c2de0032b63347a7d2895c"),
        ),
        start=1,
    )
)
TABLES = tuple(
    Remote(name, _FILE.format(number), size, f"sha256:{digest}")
    for name, number, size, digest in (
        ("Data_Entry_2017_v2020.csv", 219760887468, 9_003_496,
         "c69a6daca3549af707ca9cacbdf9f9a7b6a9188e8c61157df653520bb72d8eb1"),
        ("BBox_List_2017.csv", 219760940956, 92_416,
         "0bbfea9d4c4e9771481b3023b1bc9f0df9dea924453b12986beb29b0c4d0c95b"),
        ("train_val_list.txt", 256056636701, 1_470_907,
         "61fbe896321c1c1c8b75f3e4f3a08e4fef6486d95ef8a667c31d4d60dca6cb81"),
        ("test_list.txt", 256055473534, 435_131,
         "38ca5ef7f756092946f57c1a59faca882ed589a1ab1f72590b45dc06c6d5e1cc"),
    )
)  # fmt: skip
# All that an archive of the release holds, but folders.
MEMBER = re.compile(r"(?:\./)?images/(\d{8}_\d{3}\.png)")
# Bytes; the largest radiograph of the release, 1024 px RGBA, has 4 MB before compression.
MAX_MEMBER = 16 * 1024**2
# Bytes on disk for each byte of an archive: PNGs do not compress, tar rounds up to 512.
UNPACKED = 1.1
RECORD = "fetch.json"  # in the data folder: which archives were checked and unpacked


def fetch(directory: str | Path, *, parts: Sequence[int] | None = None) -> Path:
    """Download the tables, lists and archives of the NIH release, check them, and unpack the images.

    What is there already is not fetched again, and a download that was stopped, however, goes on
    where it was. `directory/images_001` and so on appear when they are whole. An archive is removed
    once it is unpacked.

    Parameters
    ----------
    directory : path
        Data folder in the NIH layout; made if need be.
    parts : sequence of int, optional
        Archives 1 to 12 to fetch; default: all, 45 GB to download. None at all (`()`): labels
        without images.

    Raises
    ------
    ConfigError
        A part that does not exist.
    DataError
        Too little room, a server that fails, another content than the release's, a folder that is
        in the way.
    """
    directory = Path(directory)
    numbered = dict(enumerate(ARCHIVES, start=1))
    parts = sorted(numbered if parts is None else set(parts))
    for part in parts:
        if part not in numbered:
            raise ConfigError(
                f"there is no part {part!r}. Use numbers from 1 to {len(numbered)}, such as 1,2."
            )
    work = directory / ".fetch"
    archives = [numbered[part] for part in parts if not _unpacked(directory, numbered[part])]
    tables = [table for table in TABLES if not (directory / table.name).exists()]
    _check_room(directory, work, tables, archives)
    with _locked(work):
        for table in tables:
            retrieve(table, work).rename(directory / table.name)
        for archive in archives:
            whole = retrieve(archive, work)
            images = _unpack(whole, work / "draft", room=UNPACKED * archive.size)
            _record(directory, archive, images)
            (work / "draft").rename(directory / _folder(archive))
            whole.unlink()
            _log.info("%s: %d images", directory / _folder(archive), images)
        shutil.rmtree(work)
    return directory


def _folder(archive: Remote) -> str:
    return archive.name.removesuffix(".tar.gz")


def _recorded(directory: Path) -> dict:
    """The archives in the folder's record, by name."""
    try:
        archives = read_json(directory / RECORD).get("archives")
    except DataError:
        return {}
    return archives if isinstance(archives, dict) else {}


def _unpacked(directory: Path, archive: Remote) -> bool:
    """Whether fetch has unpacked this archive here; DataError if its place is taken by something
    else.
    """
    folder = directory / _folder(archive)
    if not folder.exists():
        return False
    if _recorded(directory).get(archive.name, {}).get("checksum") == archive.checksum:
        return True
    raise DataError(
        f"{folder} is there, but fetch did not make it, and it may not be complete. Move it away, or "
        "leave its part out with --parts."
    )


def _record(directory: Path, archive: Remote, images: int) -> None:
    archives = _recorded(directory)
    archives[archive.name] = {
        "checksum": archive.checksum,
        "url": archive.url,
        "images": images,
    }
    write_json(directory / RECORD, {"source": PAGE, "archives": archives})


def _check_room(directory: Path, work: Path, tables, archives) -> None:
    """DataError, before anything is written, if what is to come does not fit."""
    need = sum(table.size for table in tables)
    # One archive at a time lies beside its images.
    need += max((archive.size for archive in archives), default=0)
    for archive in archives:
        need += UNPACKED * archive.size
        need -= max(_size(work / archive.name), _size(_partial(archive, work)))
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise DataError(f"{existing} is a file, not a folder. Name a folder for the data.")
    free = shutil.disk_usage(existing).free
    if need > free:
        raise DataError(
            f"{directory} needs {need / 1e9:.1f} GB for {len(archives)} archives, and "
            f"{free / 1e9:.1f} GB are free there. Fetch fewer with --parts, free some room, or "
            "name another folder. Nothing was written."
        )


@contextmanager
def _locked(work: Path):
    """Hold the lock of the working folder, which is cleared of the drafts of a killed process.

    What a link in there names is neither written nor removed; an archive may be one.
    """
    if work.is_symlink():
        raise DataError(
            f"{work} is a link, and fetch empties that folder at the end. Remove the link, and fetch "
            "again."
        )
    require_writable(work, "Name another folder for the data.")
    for path in work.iterdir():
        if path.is_symlink() and path.suffix != ".gz":
            path.unlink()
    with file_lock(work / "lock", wait=False) as locked:
        if not locked:
            raise DataError(
                f"another fetch is at work in {work.parent}. Wait for its end, or stop it first."
            )
        for path in work.iterdir():
            if path.is_file() and path.name != "lock" and path.suffix not in (".gz", ".partial"):
                path.unlink()
        shutil.rmtree(work / "draft", ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(work / "draft", ignore_errors=True)


def _unpack(archive: Path, draft: Path, *, room: float) -> int:
    """Unpack radiographs, and nothing else, into `draft/images`; returns how many."""
    (draft / "images").mkdir(parents=True)
    count = 0
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = MEMBER.fullmatch(member.name)
                if not name or not member.isreg():
                    raise DataError(
                        f"{archive.name} holds {member.name!r}, which is not an image of the release."
                    )
                room -= member.size
                if member.size > MAX_MEMBER or room < 0:
                    raise DataError(
                        f"{archive.name} holds {member.name!r} of {member.size} bytes, which is "
                        "far too much."
                    )
                with open(draft / "images" / name[1], "xb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
                count += 1
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise DataError(
            f"{archive.name} is not a complete tar.gz ({error}). Remove {archive}, and fetch again."
        ) from error
    except DataError as error:
        archive.unlink()
        raise DataError(f"{error} Nothing of it was kept. Do not use its source.") from None
    except OSError as error:
        raise DataError(
            f"{archive.name} cannot be unpacked in {draft.parent}: {error.strerror or error}. Make "
            "room, and repeat the command."
        ) from error
    return count
