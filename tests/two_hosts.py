"""Two "hosts" on one machine, joined by a virtual cable. Needs root, util-linux, iproute2 and the standard library.

Each host is a set of network, host name, mount and process namespaces, with /etc/hosts and an empty TMPDIR of its own.
Its first process is a bash that reads from us: when this context ends, or its process dies however it dies, bash ends
too, and the kernel kills whatever runs on the host.

    with TwoHosts() as hosts:
        subprocess.run(hosts.a.wrap([sys.executable, "notebook.py"]))
        # there: mpiexec --prtemca plm_ssh_agent hosts.agent --host hostA:1,hostB:1 ...
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

NAMESPACES = ("--net", "--uts", "--mount", "--pid")
INTERFACE = "veth0"  # the end of the cable, on both
KEPT = 16_000_000  # bytes that a recording keeps of each direction of each connection; all are counted


def why_not() -> str:
    """Reason why two hosts cannot be made here, "" if they can."""
    if os.geteuid() != 0:
        return "two hosts can be made by root only"
    for tool in ("ip", "unshare", "nsenter", "mount", "bash"):
        if shutil.which(tool) is None:
            return f"there is no command {tool}"
    trial = "hostname trial && ip link set lo up && ip link add x0 type veth peer name x1 && mount -t tmpfs none /mnt"
    command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "bash", "-c", trial]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return "" if answer.returncode == 0 else f"no namespaces can be made: {answer.stderr.strip()}"


class Host:
    """One of the two."""

    def __init__(self, name: str, ip: str, tmp: Path, hosts_file: Path):
        self.name, self.ip, self.tmp = name, ip, tmp
        script = (
            f"hostname {name} && mount --bind {hosts_file} /etc/hosts && mount -t tmpfs none {tmp} && echo up; read"
        )
        command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child", "bash", "-c", script]
        self._holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        if self._holder.stdout.readline() != "up\n":
            raise RuntimeError(f"{name} did not start")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text()
        self.pid = int(children.split()[0])  # of the first process, as we see it

    def wrap(self, command: list[str], *, folder: str = "", env: list[str] | None = None) -> list[str]:
        """`command` as it is run on this host, with our environment if none is given."""
        bare = ["-i", *env] if env is not None else []
        place = ["env", "-C", folder or os.getcwd(), *bare, f"TMPDIR={self.tmp}"]
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *place, *command]

    def ip_command(self, words: str) -> None:
        """For example "link set veth0 down"."""
        subprocess.run(["nsenter", f"--target={self.pid}", "--net", "ip", *words.split()], check=True)

    def processes(self, word: str = "") -> dict[int, str]:
        """Our process ids and the command lines of what runs on this host and has `word` in its command line."""
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if int(entry) != self.pid and os.readlink(f"/proc/{entry}/ns/pid") == mine:
                    line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    if line and word in line:  # a process that has ended has no command line
                        found[int(entry)] = line
        return found

    def close(self) -> None:
        """End whatever runs on it."""
        self._holder.kill()  # and with it, by --kill-child, the first process
        self._holder.communicate()


class TwoHosts:
    """Hosts `a` and `b`, called hostA and hostB; `agent` stands for ssh; `folder` is seen by both."""

    def __enter__(self) -> TwoHosts:
        self.folder, self._open, self._logged_in = Path(tempfile.mkdtemp(prefix="two-hosts-")), [], []
        try:
            (tmp := self.folder / "tmp").mkdir()
            (file := self.folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 hostA\n10.77.0.2 hostB\n")
            for name, ip in (("hostA", "10.77.0.1"), ("hostB", "10.77.0.2")):
                self._open.append(Host(name, ip, tmp, file))
            self.a, self.b = self._open
            self.a.ip_command(f"link add {INTERFACE} type veth peer name {INTERFACE} netns {self.b.pid}")
            for host in self._open:
                host.ip_command(f"addr add {host.ip}/24 dev {INTERFACE}")
                host.ip_command(f"link set {INTERFACE} up")
                host.ip_command("link set lo up")
            self.agent = str(self.folder / "agent")
            Path(self.agent).write_text(f'#!/bin/sh\nexec {sys.executable} -I {__file__} {self.folder}/door "$@"\n')
            os.chmod(self.agent, 0o755)
            self._door = socket.socket(socket.AF_UNIX)
            self._door.bind(f"{self.folder}/door")
            self._door.listen()
            threading.Thread(target=self._serve, daemon=True).start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for host in self._open:
            host.close()
        for process in self._logged_in:  # nsenter stops when what it started is stopped, and then sees no end
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _serve(self) -> None:
        while True:
            threading.Thread(target=self._log_in, args=(self._door.accept()[0],), daemon=True).start()

    def _log_in(self, caller: socket.socket) -> None:
        """What sshd does: run a command line with the caller's files, in a bare environment, and tell how it ended."""
        data, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
        name, line = json.loads(data)
        host = {"hostA": self.a, "hostB": self.b}[name]
        env = ["HOME=/root", "USER=root", "SHELL=/bin/bash", "PATH=/usr/local/bin:/usr/bin:/bin"]
        command = host.wrap(["sh", "-c", line], folder="/root", env=env)
        process = subprocess.Popen(command, stdin=files[0], stdout=files[1], stderr=files[2], start_new_session=True)
        self._logged_in.append(process)
        code = process.wait()
        for file in files:
            os.close(file)
        with contextlib.suppress(OSError):
            caller.sendall(struct.pack("i", code))
        caller.close()


def log_in(door: str, *words: str) -> int:
    """The agent: `ssh [options] HOST COMMAND`, from whatever host."""
    name, *line = itertools.dropwhile(lambda word: word.startswith("-"), words)
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(door)
    socket.send_fds(caller, [json.dumps([name, " ".join(line)]).encode()], [0, 1, 2])
    answer = caller.recv(4)
    return struct.unpack("i", answer)[0] & 255 if answer else 255


class Recording:
    """All that crosses the cable while it lasts: `sizes` and `kept` bytes of each direction of each TCP connection."""

    def __init__(self, host: Host):
        self.sizes, self.kept, self.dropped = Counter(), defaultdict(bytearray), 0
        self._namespace = f"/proc/{host.pid}/ns/net"
        self._listens, self._enough = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def __enter__(self) -> Recording:
        self._thread.start()
        assert self._listens.wait(10), "the cable cannot be listened to"
        return self

    def __exit__(self, *_) -> None:
        time.sleep(0.5)  # for what has been sent and not yet been read
        self._enough.set()
        self._thread.join()

    def __contains__(self, text: str) -> bool:
        return any(text.encode() in payload for payload in self.kept.values())

    def _record(self) -> None:
        with open(self._namespace) as file:  # of this thread only
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) == 0, os.strerror(
                ctypes.get_errno()
            )
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as wire:  # ETH_P_ALL
            wire.setsockopt(socket.SOL_SOCKET, 33, 1 << 28)  # SO_RCVBUFFORCE
            wire.bind((INTERFACE, 0))
            wire.settimeout(0.2)
            self._listens.set()
            buffer = bytearray(1 << 18)  # frames have up to 64 kB here: cutting them up is left to the "card"
            while not self._enough.is_set():
                with contextlib.suppress(TimeoutError):
                    self._keep(memoryview(buffer)[: wire.recv_into(buffer)])
            self.dropped = struct.unpack("II", wire.getsockopt(263, 6, 8))[1]  # PACKET_STATISTICS

    def _keep(self, frame: memoryview) -> None:
        if frame[12:14] != b"\x08\x00" or frame[23] != 6:  # not TCP over IPv4
            return
        tcp = 14 + (frame[14] & 15) * 4
        payload = frame[tcp + (frame[tcp + 12] >> 4) * 4 : 14 + struct.unpack_from(">H", frame, 16)[0]]
        way = bytes(frame[26:34]) + bytes(frame[tcp : tcp + 4])  # addresses and ports
        self.sizes[way] += len(payload)
        if len(self.kept[way]) < KEPT:
            self.kept[way] += payload


if __name__ == "__main__":
    sys.exit(log_in(*sys.argv[1:]))
