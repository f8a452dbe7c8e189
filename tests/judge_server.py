"""An OpenAI-style server of our own, as a process: python tests/judge_server.py PORT LOG FAULTS [SECONDS]

It scores by counting letters, so its scores depend on the request alone. FAULTS: names with commas, dealt out to the
requests in turn, each request being one fault only, at its first time; when asked again it is answered well:

    ok        a good answer
    429, 500  that status
    garbage   a good envelope with a text that has no scores
    few       a text that lacks a dimension
    length    a good text that is said to be cut off
    json      a body that is no JSON
    text      a body that is no completion
    half      half a body, then the connection is closed
    close     nothing at all, the connection is closed
    slow      nothing, for 3 seconds
    die       this process ends
    reasoning a model that reasons: it refuses the fields temperature and max_tokens, always, as OpenAI's do
    401, 404  that status, always

SECONDS: how long a good answer takes; below 0: as long, but for the first dialogue that is asked about. LOG gets a line
for each request: its hash, and how it was answered; and for each picture its size. The key must be 'secret-key-1', or
none.
"""

import base64
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

PORT, LOG, FAULTS = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
SECONDS = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
LOCK, SEEN, DIALOGUES = threading.Lock(), [], []


def log(*words):
    with LOCK, open(LOG, "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def letters(text):
    return min(10, 1 + len(set(text)) // 3)


def scores(text):
    """What a good judge says of a request of ours, whose [user] part is prompts/mmrole.txt's. A question that is none
    of a judge is answered with its own words."""
    if "<answer_A>" not in text:
        return [f"You ask: {text}"]
    a, b = (letters(re.search(rf"<answer_{s}>\n(.*?)\n</answer_{s}>", text, re.S)[1]) for s in "AB")
    names = re.findall(r"^(.+): A=\.\.\., B=\.\.\.$", text, re.M)
    return [f"{name}: A={a}, B={b}" for name in names]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if "401" in FAULTS or not self.known():
            return self.status(401)
        self.send(json.dumps({"object": "list", "data": []}))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = hashlib.sha256(body).hexdigest()[:16]
        with LOCK:
            first = key not in SEEN
            SEEN.append(key)
            fault = FAULTS[(len(set(SEEN)) - 1) % len(FAULTS)] if first or "reasoning" in FAULTS else "ok"
        if {"401", "404"} & set(FAULTS) or not self.known():
            fault = FAULTS[0] if "404" in FAULTS else "401"
        if fault == "reasoning":
            return self.reason(key, json.loads(body))
        if fault.isdigit():
            log(key, fault)
            return self.status(int(fault))
        if fault == "die":
            log(key, fault)
            os._exit(1)
        if fault == "close":
            log(key, fault)
            self.close_connection = True
            return
        if fault == "slow":
            log(key, fault)
            time.sleep(3)
            self.close_connection = True
            return
        self.answer(key, json.loads(body), fault)

    def reason(self, key, request):
        """A model that reasons: it says of the first field that it does not take what OpenAI's models say."""
        if "max_tokens" in request:
            words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        elif "temperature" in request:
            words = "Unsupported value: 'temperature' does not support 0 with this model."
        else:
            assert request["max_completion_tokens"] > 0
            return self.answer(key, request, "ok")
        log(key, "reasoning")
        self.send(json.dumps({"error": {"message": words, "type": "invalid_request_error"}}), 400)

    def answer(self, key, request, fault):
        parts = request["messages"][1]["content"]
        text = parts[-1]["text"]
        DIALOGUES.append(text.partition("</dialogue>")[0])
        time.sleep(0 if SECONDS < 0 and DIALOGUES[-1] == DIALOGUES[0] else abs(SECONDS))
        for part in parts[:-1]:
            data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
            log("picture", *Image.open(io.BytesIO(data)).size)
        lines = {"garbage": ["Both are fine: 7 and 8."], "few": scores(text)[:-1]}.get(fault, scores(text))
        message = {"role": "assistant", "content": "Here they are.\n\n" + "\n".join(lines)}
        out = {
            "id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "length" if fault == "length" else "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }  # fmt: skip
        bodies = {"json": '{"choices": [', "text": '"nothing"'}
        data = bodies.get(fault, json.dumps(out))
        log(key, fault)
        self.send(data, cut=len(data) // 2 if fault == "half" else None)

    def known(self):
        return self.headers.get("Authorization") in ("Bearer secret-key-1", "Bearer none")

    def status(self, code):
        """An error, which repeats the key as careless servers do. Tries again are wanted soon."""
        self.send(json.dumps({"error": {"message": f"no: {self.headers.get('Authorization')}"}}), code)

    def send(self, text, code=200, cut=None):
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "20")
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut:
            self.close_connection = True


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    log("begins")
    server.serve_forever()
