"""Open a notebook in a real JupyterLab and drive it with a headless Chromium, over the DevTools
protocol.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote
from urllib.request import urlopen

from tornado.websocket import websocket_connect

CHROMIUM = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1400,1143 --remote-debugging-port=0"""
LAB = """--no-browser --allow-root --expose-app-in-browser --ip=127.0.0.1 --ServerApp.port_retries=0
    --KernelManager.transport_encryption=auto"""  # as `make lab`
FOLDERS = {f"JUPYTER_{name.upper()}_DIR": name for name in ("config", "data", "runtime")} | {
    "IPYTHONDIR": "ipython"
}
# No question about news, and no saving of the notebook under test.
SETTINGS: dict[str, dict[str, Any]] = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
PANEL = "globalThis.jupyterapp?.shell.currentWidget"
READY = f"""{PANEL}?.context?.isReady && {PANEL}.sessionContext?.session?.kernel?.status === 'idle'
    && !document.querySelector('#jupyterlab-splash')"""
# All cells; the kernel's status is no measure, for a comm message makes it idle during a cell.
RAN = "globalThis.ran"
# What the notebook's cells have put out, also those that are out of sight.
OUTPUTS = f"""{PANEL}.content.model.toJSON().cells.flatMap(cell => cell.outputs ?? []).map(output => [].concat(
    output.text ?? output.traceback ?? output.data?.['text/plain'] ?? []).join('')).join('\\n').slice(-1500)"""
# Scrolls to the innermost visible element that matches and holds the text, and gives its centre in
# the window.
FIND = """((selector, text) => {
  const all = [...document.querySelectorAll(selector)].filter(e => e.textContent.includes(text)
    && e.getClientRects().length && getComputedStyle(e).visibility === 'visible');
  const inner = all.filter(e => !all.some(other => other !== e && e.contains(other)));
  const found = inner.find(e => e.textContent.trim() === text) ?? inner[0];
  found?.scrollIntoView({block: 'center'});
  const box = found?.getBoundingClientRect();
  return box && [box.x + box.width / 2, box.y + box.height / 2];
})"""


class Browser(contextlib.ExitStack):
    """`with Browser() as browser:` has an empty page open."""

    def __enter__(self) -> Self:
        try:
            self.home = Path(
                self.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            )
            self._runner, self._numbers = self.enter_context(asyncio.Runner()), itertools.count()
            profile = self.home / "profile"
            self._start(
                ["chromium", *CHROMIUM.split(), f"--user-data-dir={profile}"], TMPDIR=str(self.home)
            )
            debug = self._poll(
                lambda: (profile / "DevToolsActivePort").read_text().split()[0], "chromium", 60
            )
            pages = json.load(urlopen(f"http://127.0.0.1:{debug}/json/list", timeout=10))
            address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            self._socket = self._wait(lambda: websocket_connect(address, max_message_size=2**28))
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def _open(self) -> None:
        pass

    def show(self, path: str | Path, *, width: int, height: int = 900) -> None:
        """Open a file in a window of this size in CSS pixels."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        address = Path(path).resolve().as_uri()
        self.call("Page.navigate", url=address)
        self.wait_for(
            f"location.href === {json.dumps(address)} && document.readyState === 'complete'", 60
        )

    def _start(self, command: list[str], **variables: str) -> None:
        """Start a process, in a group of its own, that reads none of the user's settings."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JUPYTER", "IPYTHON"))
        }
        env = (
            clean | {name: str(self.home / folder) for name, folder in FOLDERS.items()} | variables
        )
        with open(self.home / f"{Path(command[0]).name}.log", "wb") as log:
            process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, start_new_session=True
            )

        @self.callback
        def end() -> None:
            process.terminate()  # the server then ends its kernels
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _poll(self, attempt: Callable[[], Any], what: str, timeout: float) -> Any:
        """The first true value of `attempt`; when there is none in time, an error that tells what
        it gave last.
        """
        end, last = time.monotonic() + timeout, None
        while time.monotonic() < end:
            try:
                if last := attempt():
                    return last
            except Exception as error:
                last = error
            time.sleep(0.2)
        told = [
            f"{log.name}: ...{log.read_text(errors='replace')[-500:]}"
            for log in self.home.glob("*.log")
        ]
        with contextlib.suppress(Exception):
            told.append(f"the cells put out: ...{self.evaluate(OUTPUTS)}")
        raise TimeoutError("\n".join([*told, f"waited {timeout:g} s for {what}; last: {last!r}"]))

    def _wait(self, future: Callable[[], Any]) -> Any:
        async def result() -> Any:
            return await asyncio.wait_for(future(), 60)

        return self._runner.run(result())

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        message = {"id": (number := next(self._numbers)), "method": method, "params": parameters}
        self._wait(lambda: self._socket.write_message(json.dumps(message)))
        while (reply := json.loads(self._wait(self._socket.read_message) or "null")) and reply.get(
            "id"
        ) != number:
            pass
        if not reply or "error" in reply:
            raise RuntimeError(
                f"{method}: {reply['error']['message'] if reply else 'chromium has gone'}"
            )
        return reply["result"]

    def evaluate(self, javascript: str) -> Any:
        """The value of an expression in the page; of a promise, what it resolves to."""
        reply = self.call(
            "Runtime.evaluate", expression=javascript, awaitPromise=True, returnByValue=True
        )
        if details := reply.get("exceptionDetails"):
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return reply["result"].get("value")

    def wait_for(self, condition: str, timeout: float = 30) -> None:
        """Wait until a JavaScript expression is true."""
        self._poll(lambda: self.evaluate(f"!!({condition})"), condition, timeout)

    def scroll_to(self, selector: str = "body *", text: str = "") -> tuple[float, float]:
        """Scroll an element to the middle; returns its centre in the window."""
        search = f"{FIND}({json.dumps(selector)}, {json.dumps(text)})"
        x, y = self._poll(lambda: self.evaluate(search), f"{selector} {text!r} in the page", 30)
        return x, y

    def click(self, selector: str = "body *", text: str = "") -> None:
        """Click an element with the mouse."""
        x, y = self.scroll_to(selector, text)
        for kind, button in (
            ("mouseMoved", "none"),
            ("mousePressed", "left"),
            ("mouseReleased", "left"),
        ):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def screenshot(self, path: str | Path) -> None:
        """Write what the window shows as a PNG file."""
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


class Lab(Browser):
    """`with Lab("demo.ipynb", root_dir="notebooks") as lab:` has the notebook open, with an idle
    kernel.
    """

    def __init__(
        self, notebook: str, root_dir: str | Path = ".", settings: dict[str, dict] | None = None
    ) -> None:
        super().__init__()
        self.notebook, self.root_dir, self.settings = (
            notebook,
            Path(root_dir).resolve(),
            SETTINGS | (settings or {}),
        )

    def _open(self) -> None:
        for plugin, values in self.settings.items():
            path = (
                self.home
                / "config/lab/user-settings"
                / f"{plugin.replace(':', '/')}.jupyterlab-settings"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port, token = free.getsockname()[1], secrets.token_hex(16)
        site = f"http://127.0.0.1:{port}"
        options = [*LAB.split(), f"--port={port}", f"--ServerApp.root_dir={self.root_dir}"]
        self._start([sys.executable, "-m", "jupyterlab", *options], JUPYTER_TOKEN=token)
        self._poll(
            lambda: urlopen(f"{site}/api?token={token}", timeout=5).status == 200, "the server", 60
        )
        self.call(
            "Emulation.setFocusEmulationEnabled", enabled=True
        )  # JupyterLab's current widget is the focused one
        self.call(
            "Page.navigate", url=f"{site}/lab/tree/{quote(self.notebook)}?token={token}&reset"
        )
        self.wait_for(READY, 120)

    def run_all(self) -> None:
        """Run > Run All Cells; returns at once, and `wait_for(RAN)` sees them through."""
        run = "jupyterapp.commands.execute('notebook:run-all-cells')"
        self.evaluate(f"{RAN} = false; {run}.finally(() => {{ {RAN} = true }}); 0")
