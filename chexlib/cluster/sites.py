"""Where engines run: this host, several hosts that mpiexec reaches, or whatever Slurm gives."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from chexlib.errors import ConfigError
from chexlib.files import read_text


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


def find_site(
    hosts: Sequence[str] | str | Path = (),
    *,
    interface: str = "",
    slurm: bool = False,
    options: Sequence[str] = (),
    shared: str | Path = "",
) -> Site:
    """Describe where engines shall run.

    Parameters
    ----------
    hosts : sequence of str, or path
        Hosts as "name" or "name:slots", or a hostfile with lines such as "name slots=4"; none for
        this host alone.
    interface : str
        Network interface over which controller and engines speak; needed beyond this host.
    slurm : bool
        Let Slurm choose the hosts.
    options : sequence of str
        Further flags for mpiexec, or for sbatch, such as "--partition=short".
    shared : path
        Folder that all hosts see, by default the current one: keys are handed over in it, and not
        on the wire.

    Raises
    ------
    ConfigError
        No interface is named, it has no address, or a host is not understood.
    """
    named = _read_hosts(hosts)
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
            f"interface={interface!r} has no IPv4 address here. Name the one that all hosts share, "
            f"of {names}."
        )
    address = addresses[interface]
    network = ipaddress.ip_network(f"{address.address}/{address.netmask}", strict=False)
    folder = str(Path(shared or ".").absolute())
    return Site(named, address.address, str(network), slurm, tuple(options), folder)


def _read_hosts(hosts: Sequence[str] | str | Path) -> tuple[tuple[str, int], ...]:
    if isinstance(hosts, str | Path):
        try:
            lines = read_text(hosts).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(
                f"the hostfile {hosts} cannot be read ({reason}). Give a file or a list."
            ) from error
    else:
        lines = list(hosts)
    named = []
    for line in lines:
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.-]+)(?::(\d+)|\s+slots\s*=\s*(\d+).*)?", text)
        if not match or "0" in match.groups()[1:]:
            raise ConfigError(
                f"Expected a host as 'name', 'name:slots', or 'name slots=4', got {line!r}."
            )
        named.append((match[1], int(match[2] or match[3] or 1)))
    return tuple(named)
