"""Several "hosts" on one machine, on a virtual switch.

Needs root, util-linux and iproute2, and nothing but Python.

Each host is a set of network, host name, mount and process namespaces, with /etc/hosts and an empty
TMPDIR of its own. Its first process is a bash that reads from us: when this context ends, or its
process dies however it dies, bash ends too, and the kernel kills whatever runs on the host, and
with its last process its network.

    with EmulatedHosts(4) as hosts:
        hosts.limit(1e9) subprocess.run(hosts[0].wrap([mpiexec, *mpi.flags(hosts.slots(1),
        hosts.network), *hosts.agent_flags, ...]))
"""

from __future__ import annotations

import contextlib
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
from pathlib import Path

NAMESPACES = ("--net", "--uts", "--mount", "--pid")
INTERFACE = "veth0"  # a host's end of its cable
NETWORK = "10.77.0.0/24"
# Seconds at full rate that a limited cable lets through at once; at least one large packet.
BURST = 1e-3
QUEUE = "100ms"  # longest stay of a packet in a limited cable's queue


def why_not() -> str:
    """Reason why hosts cannot be made here, "" if they can."""
    if sys.platform != "linux":
        return "hosts are made of Linux' namespaces, and this is another system"
    if os.geteuid() != 0:
        return "hosts can be made by root only"
    for tool in ("ip", "tc", "unshare", "nsenter", "mount", "bash", "taskset"):
        if shutil.which(tool) is None:
            return f"there is no command {tool}"
    trial = "hostname trial && ip link set lo up && ip link add x0 type veth peer name x1 && mount -t tmpfs none /mnt"
    trial += " && ip link add trial0 type bridge && tc qdisc add dev x0 root tbf rate 1gbit burst 128kb latency 100ms"
    command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "bash", "-c", trial]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30)
    return "" if answer.returncode == 0 else f"no namespaces can be made: {answer.stderr.strip()}"


class Host:
    """One of them, or the switch that joins them."""

    def __init__(
        self, name: str, ip: str, tmp: Path, hosts_file: Path, processor: int | None = None
    ):
        self.name, self.ip, self.tmp = name, ip, tmp
        self._pin = [] if processor is None else ["taskset", "--cpu-list", str(processor)]
        script = (
            f"hostname {name} && mount --bind {hosts_file} /etc/hosts && mount -t tmpfs none {tmp} "
            "&& echo up; read"
        )
        command = [
            "unshare",
            *NAMESPACES,
            "--fork",
            "--mount-proc",
            "--kill-child",
            "bash",
            "-c",
            script,
        ]
        self._holder = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        if self._holder.stdout.readline() != "up\n":
            raise RuntimeError(f"{name} did not start")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text(
            "utf-8"
        )
        self.pid = int(children.split()[0])  # of the first process, as we see it

    def wrap(
        self, command: list[str], *, folder: str = "", env: list[str] | None = None
    ) -> list[str]:
        """`command` as it is run on this host, with our environment if none is given."""
        bare = ["-i", *env] if env is not None else []
        place = ["env", "-C", folder or os.getcwd(), *bare, f"TMPDIR={self.tmp}"]
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *self._pin, *place, *command]

    def ip_command(self, words: str, *, tool: str = "ip") -> None:
        """For example "link set veth0 down"."""
        subprocess.run(
            ["nsenter", f"--target={self.pid}", "--net", tool, *words.split()], check=True
        )

    def processes(self, word: str = "") -> dict[int, str]:
        """Our process ids and the command lines of what runs on this host and has `word` in its
        command line.
        """
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if int(entry) != self.pid and os.readlink(f"/proc/{entry}/ns/pid") == mine:
                    line = (
                        Path(f"/proc/{entry}/cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode()
                        .strip()
                    )
                    if line and word in line:  # a process that has ended has no command line
                        found[int(entry)] = line
        return found

    def close(self) -> None:
        """End whatever runs on it."""
        self._holder.kill()  # and with it, by --kill-child, the first process
        self._holder.communicate()


class EmulatedHosts:
    """Hosts called hostA, hostB, ...; `agent` stands for ssh between them; `folder` is seen by all.

    With `pinned` each host has one processor of this machine, in turn, instead of all of them:
    where there are more ranks than processors the system deals them out well or badly for seconds
    at a time, and steps differ by half.
    """

    network = NETWORK

    def __init__(self, n: int = 2, *, pinned: bool = False):
        self.names, self.pinned = [f"host{chr(ord('A') + i)}" for i in range(n)], pinned

    def __enter__(self):
        self.folder, self._open, self._logged_in = Path(tempfile.mkdtemp(prefix="hosts-")), {}, []
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        (tmp := self.folder / "tmp").mkdir()
        addresses = {name: f"10.77.0.{i}" for i, name in enumerate(self.names, start=1)}
        lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in addresses.items()), ""]
        (file := self.folder / "hosts").write_text("\n".join(lines), encoding="utf-8")
        switch = self._open["switch"] = Host("switch", "", tmp, file)
        switch.ip_command("link add bridge type bridge")
        switch.ip_command("link set bridge up")
        places = itertools.cycle(sorted(os.sched_getaffinity(0)) if self.pinned else [None])
        for (name, ip), place in zip(addresses.items(), places, strict=False):
            host = self._open[name] = Host(name, ip, tmp, file, place)
            host.ip_command(f"link add {INTERFACE} type veth peer name {name} netns {switch.pid}")
            switch.ip_command(f"link set {name} master bridge up")
            host.ip_command(f"addr add {ip}/24 dev {INTERFACE}")
            host.ip_command(f"link set {INTERFACE} up")
            host.ip_command("link set lo up")
        self.agent = str(self.folder / "agent")
        Path(self.agent).write_text(
            f'#!/bin/sh\nexec {sys.executable} -I {__file__} {self.folder}/door "$@"\n',
            encoding="utf-8",
        )
        os.chmod(self.agent, 0o755)
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(f"{self.folder}/door")
        self._door.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def __getitem__(self, index: int) -> Host:
        return self._open[self.names[index]]

    def slots(self, per_host: int) -> list[tuple[str, int]]:
        """Hosts with so many ranks each, for `Mpi.flags`."""
        return [(name, per_host) for name in self.names]

    def limit(self, rate: float) -> None:
        """Let each host send and receive `rate` bits a second, by a token bucket at both ends of
        its cable.
        """
        burst = max(131072, int(rate / 8 * BURST))
        words = f"rate {int(rate)}bit burst {burst} latency {QUEUE}"
        for name in self.names:
            for host, device in ((self._open[name], INTERFACE), (self._open["switch"], name)):
                host.ip_command(f"qdisc replace dev {device} root tbf {words}", tool="tc")

    def processes(self) -> dict[int, str]:
        """What runs on any of them, see `Host.processes`."""
        return {pid: line for host in self._open.values() for pid, line in host.processes().items()}

    @property
    def agent_flags(self) -> list[str]:
        """Open MPI's flags that make it reach the hosts."""
        return ["--prtemca", "plm_ssh_agent", self.agent]

    def close(self) -> None:
        """End all hosts, and whatever runs on them."""
        for host in self._open.values():
            host.close()

    def __exit__(self, *_) -> None:
        self.close()
        # Nsenter stops when what it started is stopped, and then sees no end.
        for process in self._logged_in:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _serve(self) -> None:
        while True:
            threading.Thread(
                target=self._log_in, args=(self._door.accept()[0],), daemon=True
            ).start()

    def _log_in(self, caller: socket.socket) -> None:
        """What sshd does: run a command line with the caller's files, in a bare environment, and
        tell how it ended.
        """
        data, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
        name, line = json.loads(data)
        host = self._open[name]
        env = ["HOME=/root", "USER=root", "SHELL=/bin/bash", "PATH=/usr/local/bin:/usr/bin:/bin"]
        command = host.wrap(["sh", "-c", line], folder="/root", env=env)
        process = subprocess.Popen(
            command, stdin=files[0], stdout=files[1], stderr=files[2], start_new_session=True
        )
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


if __name__ == "__main__":
    sys.exit(log_in(*sys.argv[1:]))
