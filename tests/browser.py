"""A headless Chromium for tests, driven by its DevTools protocol over two pipes: JSON messages, a zero byte after each.

apt-get install chromium    on Debian and Ubuntu"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Tab": 9, "Escape": 27}


def find():
    """-> the path of a browser, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. `faults` are what its console, its scripts and its loading complained about."""

    def __init__(self, profile, seconds=120):
        """profile: an empty folder for what the browser writes; seconds: the longest wait for one answer."""
        self.seconds, self.number, self.left, self.events, self.faults, self.session = seconds, 0, b"", [], [], None
        theirs, self.writes = os.pipe()
        self.reads, answers = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs, answers)]  # clear of 3 and 4, where it looks

        def connect():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([find(), *flags], preexec_fn=connect, close_fds=False, **quiet)
        for fd in (theirs, answers, *ends):
            os.close(fd)
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Send a command -> its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        number = self.number
        answer = self.wait(lambda m: m.get("id") == number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait(self, wanted):
        """Read messages until one is wanted -> it."""
        end = time.monotonic() + self.seconds
        while True:
            head, zero, rest = self.left.partition(b"\0")
            if not zero:
                assert select.select([self.reads], [], [], max(0, end - time.monotonic()))[0], "no answer from Chromium"
                more = os.read(self.reads, 2**20)
                assert more, "Chromium has ended"
                self.left += more
                continue
            self.left, message = rest, json.loads(head)
            self.note(message.get("method"), message.get("params", {}))
            if wanted(message):
                return message

    def note(self, method, params):
        """Keep an event, if it is a fault."""
        if method == "Runtime.exceptionThrown":
            self.faults.append(params["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.faults.append(params["args"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.faults.append(params["entry"])

    def look(self, width, height, dark=False):
        """Set the size of the window in pixels, and light or dark."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[feature])

    def go(self, url):
        self("Page.navigate", url=url)
        self.wait(lambda m: m.get("method") == "Page.loadEventFired")

    def js(self, expression):
        """-> the value of a JavaScript expression in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def middle(self, selector):
        """-> x, y of the middle of the first element, scrolled into view."""
        asked = json.dumps(selector)
        self.js(f"document.querySelector({asked}).scrollIntoView({{block: 'center'}})")
        box = f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({asked}).getBoundingClientRect())"
        return self.js(box)

    def hover(self, selector):
        x, y = self.middle(selector)
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        x, y = self.middle(selector)
        for what in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=what, x=x, y=y, button="left", clickCount=1)

    def key(self, name):
        """Press a key: one of KEYS, or a character."""
        key = {"key": name} | ({"windowsVirtualKeyCode": KEYS[name]} if name in KEYS else {"text": name})
        key |= {"text": "\r"} if name == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown", **key)
        self("Input.dispatchKeyEvent", type="keyUp", key=name)

    def picture(self, path, full=False):
        """Save a PNG of what is seen, or of the full page."""
        data = self("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.writes)
        os.close(self.reads)
