"""Drive an installed Chromium by the DevTools protocol over a pipe, without further libraries."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-gpu-compositing")
"""WebGL in software, and pages composed by the processor: what Chromium itself chooses without a GPU."""
WITHOUT_WEBGL = ("--disable-gpu", "--disable-3d-apis")

_AS_3_AND_4 = """
import os, sys
import fcntl
read, write = (fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3])  # neither is 3 or 4
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. `requests` lists the addresses that it requested, except data: and blob:; `errors` its exceptions."""

    def __init__(self, process: subprocess.Popen, to: int, back: int) -> None:
        self.process, self._to, self._back = process, to, back
        self._number, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the result of a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._read(time.monotonic() + 60)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            piece = os.read(self._back, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium ended")
            self._rest += piece
        first, self._rest = self._rest.split(b"\0", 1)
        return json.loads(first)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", answer))
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """Return the value of an expression as soon as it is true."""
        until = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{script} is still {value!r}; errors: {self.errors}; {self.run('explorer.selection.length')}"
                )
            time.sleep(0.05)
        return value

    def open(self, file: Path | str) -> None:
        """Open a file, or an address, and wait until the map is drawn."""
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri() if isinstance(file, Path) else file)
        self.wait("document.documentElement?.dataset.state", 120)

    def size(self, width: int, height: int, **media: str) -> None:
        """Set the size of the window, and features such as prefers_color_scheme="dark"."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def mouse(self, kind: str, x: float, y: float, shift: bool = False, **more: Any) -> None:
        """Send a mouse event: mouseMoved, mousePressed, mouseReleased or mouseWheel."""
        button = {} if kind == "mouseWheel" else {"button": "left" if kind != "mouseMoved" or more else "none"}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, modifiers=8 * shift, **(button | more))

    def click(self, x: float, y: float) -> None:
        """Click at a place, as slowly as a person: hovering is noticed first."""
        self.mouse("mouseMoved", x, y)
        time.sleep(0.1)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, clickCount=1)

    def drag(self, places: list[tuple[float, float]], shift: bool = False) -> None:
        """Drag along places."""
        self.mouse("mouseMoved", *places[0], shift=shift)
        self.mouse("mousePressed", *places[0], shift=shift, clickCount=1)
        for place in places[1:]:
            self.mouse("mouseMoved", *place, shift=shift, buttons=1)
            time.sleep(0.03)
        self.mouse("mouseReleased", *places[-1], shift=shift, clickCount=1)

    def key(self, key: str) -> None:
        """Press a key."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, file: Path) -> None:
        """Write a picture of the window."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _params(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # receive what was sent before
        return [event["params"] for event in self.events if event.get("method") == method]

    @property
    def requests(self) -> list[str]:
        urls = [event["request"]["url"] for event in self._params("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    @property
    def errors(self) -> list[str]:
        thrown = [str(event["exceptionDetails"]) for event in self._params("Runtime.exceptionThrown")]
        logged = [
            event["entry"]["text"] for event in self._params("Log.entryAdded") if event["entry"]["level"] == "error"
        ]
        return thrown + logged


@contextmanager
def chromium(*options: str) -> Iterator[Page]:
    """Start Chromium without a window, and end it."""
    assert PROGRAM is not None
    (read_to, to), (back, write_back) = os.pipe(), os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            sys.executable, "-S", "-c", _AS_3_AND_4, str(read_to), str(write_back), PROGRAM, "--headless=new",
            "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars",
            "--disable-background-networking", "--disable-extensions", "--no-first-run", "--window-size=1400,900",
            *options,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, pass_fds=(read_to, write_back), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_to)
        os.close(write_back)
        try:
            yield Page(process, to, back)
        finally:
            process.kill()
            process.wait()
            os.close(to)
            os.close(back)
