"""Where engines run: this host, several hosts that mpiexec reaches, or whatever Slurm gives."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from chexlib.errors import ConfigError
from chexlib.files import read_text
from chexlib.machine import cores, topology
from chexlib.mpi import thread_environment


@dataclass(frozen=True)
class Site:
    """The place of a cluster of engines.

    `address` is where the controller listens, `network` what ranks speak over (CIDR, empty on one
    host).
    """

    hosts: tuple[tuple[str, int], ...] = ()  # name and slots
    address: str = "127.0.0.1"
    network: str = ""
    slurm: bool = False
    options: tuple[str, ...] = ()  # further flags for mpiexec, or lines of #SBATCH
    shared: str | None = None  # folder that all hosts see

    def threads_of(self, n: int, threads: int = 0) -> int:
        """Threads of each of `n` ranks here; 0 divides the cores of this machine among its ranks.

        Raises
        ------
        ConfigError
            The ranks do not fit the hosts, or nothing says how many threads they have.
        """
        if n < 1:
            raise ConfigError(f"engines={n} is not accepted. Use 1 or more.")
        if self.slurm and not threads:
            raise ConfigError(
                "threads=0 is not accepted where Slurm chooses the hosts. Name the threads per rank."
            )
        slots = sum(slots for _, slots in self.hosts)
        if self.hosts and slots < n:
            raise ConfigError(
                f"engines={n} is more than the {slots} slots of the hosts. Name more hosts, or more "
                "slots per host."
            )
        of_a_host = max((slots for _, slots in self.hosts), default=n)
        threads = threads or max(1, min(topology()["physical_cores"], cores()) // of_a_host)
        thread_environment(threads)  # refuses impossible numbers
        return threads


def find_site(
    hosts: Sequence[str] | str | Path = (),
    *,
    interface: str = "",
    slurm: bool = False,
    options: Sequence[str] | str = (),
    shared: str | Path = "",
) -> Site:
    """Describe where engines shall run.

    Parameters
    ----------
    hosts : sequence of str, text or path
        Hosts as "name" or "name:slots", in a text with commas between them, or a hostfile with
        lines such as "name slots=4"; none for this host alone. A text is a hostfile's name where
        there is this file, or where it has a "/". A host that is there twice has the sum of slots.
    interface : str
        Network interface over which controller and engines speak; needed beyond this host.
    slurm : bool
        Let Slurm choose the hosts.
    options : sequence of str, or text
        Further flags for mpiexec, or for sbatch, such as "--partition=short"; a text only for
        sbatch.
    shared : path
        Folder that all hosts see, by default the current one: keys are handed over in it, and not
        on the wire.

    Raises
    ------
    ConfigError
        No interface is named, it has no address, a host or a text of options is not understood,
        hosts are named and Slurm shall choose them too, or there is no Slurm.
    """
    named = _read_hosts(hosts)
    if named and slurm:
        raise ConfigError(
            "hosts are named, and slurm=True lets Slurm choose them. Use only one of both."
        )
    if isinstance(options, str) and options.strip():
        options = (" ".join(options.split()),)
        if not slurm or not options[0].startswith("-"):
            raise ConfigError(
                f"slurm_options={options[0]!r} is not accepted. Write flags of sbatch, such as "
                "--time=02:00:00, and set slurm."
            )
    if not named and not slurm:
        return Site(options=tuple(options))
    addresses = {}
    for name, of_interface in psutil.net_if_addrs().items():
        for address in of_interface:
            if address.family == socket.AF_INET and address.netmask:
                addresses.setdefault(name, address)
    if interface not in addresses:
        names = ", ".join(sorted(addresses))
        raise ConfigError(
            f"interface={interface!r} has no IPv4 address here. Name the one that all hosts share: "
            f"{names}."
        )
    if slurm and not shutil.which("sbatch"):
        raise ConfigError(
            "slurm=True, but this host has no sbatch. Use a login node of the cluster."
        )
    address = addresses[interface]
    network = ipaddress.ip_network(f"{address.address}/{address.netmask}", strict=False)
    folder = str(Path(shared or ".").absolute())
    return Site(named, address.address, str(network), slurm, tuple(options), folder)


def _read_hosts(hosts: Sequence[str] | str | Path) -> tuple[tuple[str, int], ...]:
    if isinstance(hosts, str) and "/" not in hosts and not os.path.isfile(hosts):
        lines = hosts.split(",")
    elif isinstance(hosts, str | Path):
        try:
            lines = read_text(hosts).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(
                f"the hostfile {hosts} cannot be read ({reason}). Name a text file, or give a list."
            ) from error
    else:
        lines = list(hosts)
    named = Counter()
    for line in lines:
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.-]+)(?::(\d+)|\s+slots\s*=\s*(\d+).*)?", text)
        if not match or "0" in match.groups()[1:]:
            raise ConfigError(
                f"the host {line!r} is not accepted. Write 'name', 'name:4' or 'name slots=4'."
            )
        named[match[1]] += int(match[2] or match[3] or 1)
    return tuple(named.items())
