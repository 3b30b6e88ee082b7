"""Two hosts of `benchmarks.lab.emulated`, and a recording of what crosses the cable between them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
import time
from collections import Counter, defaultdict

from benchmarks.lab.emulated import INTERFACE, EmulatedHosts, Host

KEPT = (
    16_000_000  # bytes that a recording keeps of each direction of each connection; all are counted
)


class TwoHosts(EmulatedHosts):
    """Hosts `a` and `b`, called hostA and hostB."""

    def __enter__(self) -> TwoHosts:
        super().__enter__()
        self.a, self.b = self[0], self[1]
        return self


class Recording:
    """All that crosses the cable while it lasts: `sizes` and `kept` bytes of each direction of each
    TCP connection.
    """

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
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) == 0, (
                os.strerror(ctypes.get_errno())
            )
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as wire:  # ETH_P_ALL
            wire.setsockopt(socket.SOL_SOCKET, 33, 1 << 28)  # SO_RCVBUFFORCE
            wire.bind((INTERFACE, 0))
            wire.settimeout(0.2)
            self._listens.set()
            buffer = bytearray(
                1 << 18
            )  # frames have up to 64 kB here: cutting them up is left to the "card"
            while not self._enough.is_set():
                with contextlib.suppress(TimeoutError):
                    self._keep(memoryview(buffer)[: wire.recv_into(buffer)])
            self.dropped = struct.unpack("II", wire.getsockopt(263, 6, 8))[1]  # PACKET_STATISTICS

    def _keep(self, frame: memoryview) -> None:
        if frame[12:14] != b"\x08\x00" or frame[23] != 6:  # not TCP over IPv4
            return
        tcp = 14 + (frame[14] & 15) * 4
        payload = frame[
            tcp + (frame[tcp + 12] >> 4) * 4 : 14 + struct.unpack_from(">H", frame, 16)[0]
        ]
        way = bytes(frame[26:34]) + bytes(frame[tcp : tcp + 4])  # addresses and ports
        self.sizes[way] += len(payload)
        if len(self.kept[way]) < KEPT:
            self.kept[way] += payload
