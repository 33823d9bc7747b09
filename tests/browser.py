"""A page in headless Chromium, driven over a pipe (Chrome DevTools Protocol): no driver and no package
besides the browser."""

import base64
import json
import os
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """The path of a browser, or None. MTKD_BROWSER names another."""
    return os.environ.get("MTKD_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """``errors``: what the console said; ``requests``: every URL asked for. Use in a ``with``."""

    def __init__(self, program, profile, limit=60):
        self.errors, self.requests, self.limit = [], [], limit
        self._number, self._session, self._loaded, self._rest, self._queue = 0, None, False, b"", []
        to_it, self._out = os.pipe()
        self._in, from_it = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        flags += [
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={profile}",
        ]

        def places():  # the browser reads descriptor 3 and writes 4
            kept = os.dup(to_it), os.dup(from_it)
            for one, place in zip(kept, (3, 4), strict=True):
                os.dup2(one, place)

        self._process = subprocess.Popen(
            [program, *flags, "--remote-debugging-pipe", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=places, pass_fds=(3, 4),
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        os.set_blocking(self._in, False)
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")[
            "targetId"
        ]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)

    def ask(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        end = time.monotonic() + self.limit
        while time.monotonic() < end:
            self._receive()
            while self._queue:
                answer = self._queue.pop(0)
                if answer.get("id") == self._number:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']['message']}")
                    return answer["result"]
                self._note(answer)
            time.sleep(0.01)
        raise TimeoutError(f"the browser does not answer {method}")

    def _receive(self):
        try:
            self._rest += os.read(self._in, 2**20)
        except BlockingIOError:
            return
        *whole, self._rest = self._rest.split(b"\0")
        self._queue += [json.loads(message) for message in whole]

    def _note(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(params["args"]))

    def open(self, path, width=1200, height=900, dark=False):
        """Load a file at a width in pixels, below 500 px as a phone shows it."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        feature = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=feature)
        self._loaded = False
        self.ask("Page.navigate", url=path.absolute().as_uri())
        end = time.monotonic() + self.limit
        while not self._loaded:
            if time.monotonic() > end:
                raise TimeoutError(f"{path} does not load")
            self.run("0")
            time.sleep(0.02)
        return self

    def run(self, script):
        """The value of a JavaScript expression."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "JavaScript error"))
        return found["result"].get("value")

    def shoot(self, path):
        """A PNG of the whole page."""
        path.write_bytes(
            base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )

    def printed(self, path):
        """A PDF of the page."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF")["data"]))
