"""A language model behind an OpenAI-style server as the judge: --judge http://host:port/v1 --judge-model NAME.

One call scores a response and the reference together, in every dimension of the file --judge-prompt. judge_request.py
makes the request, judge_parse.py reads what comes back. The package `openai` makes the calls: time-outs and repeated
tries are its own. An answer that cannot be read is asked for once more. Then the judgement has failed: it has no score.

The key is taken from the environment variable that --judge-key names. It is in no file, no log and no message.

Answers that could be read are kept in --out (judge.sqlite, or --judge-cache), each as soon as it is there, under the
hash of the whole request, the model included. A run that goes on after an interruption pays for none of them again.
Failures are not kept. Several processes may share the file.

--judge-parallel threads make the calls. A response may be judged while others are still being rolled out: `foresee`
asks already, and the call that needs the scores only waits for them.
"""

import hashlib
import json
import math
import os
import queue
import re
import sqlite3
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

import checkpoint
import common
from common import Everywhere, option
from data import DataError
from judge_parse import parse
from judge_request import Prompt, data_url, limits, refuses_limits
from pictures import PictureError

TRIES = 2  # calls for one judgement, at most: an answer that cannot be read is asked for again
WINDOW = 50  # judgements of which --judge-fail is a share
HOPELESS = (401, 403, 404)  # the key, or the name, is wrong: no further call can succeed


@dataclass
class Judging(Everywhere):
    """The flags about the judge, of stage 4 and of the evaluation."""

    judge: str = option(
        "rules", "'rules' (the tiny world's), a sentence-embedding folder, http://host:port/v1, or module:function"
    )
    judge_model: str = option("", "http: name of the model on the server")
    judge_prompt: str = option("prompts/mmrole.txt", "http: file with the prompt and its dimensions")
    judge_key: str = option("OPENAI_API_KEY", "http: environment variable that holds the key; unset: none is needed")
    judge_parallel: int = option(16, "http: calls at once, each rank", least=1)
    judge_timeout: float = option(120.0, "http: seconds that one call may take", above=0)
    judge_retries: int = option(5, "http: further tries of a call that failed (openai's max_retries)")
    judge_fail: float = option(0.5, "http: the run ends when more than this share of the last 50 judgements failed")
    judge_cache: str = option("", "http: file that keeps the answers; '': judge.sqlite in --out")
    judge_tokens: int = option(1024, "http: longest answer of the judge, tokens", least=1)
    judge_reasoning: str = option("no", "http: the judge reasons before it answers", choices=("no", "yes"))
    judge_pixels: int = option(512 * 512, "http: pictures are scaled down to this many pixels", least=1)
    judge_price_in: float = option(0.0, "http: price of a million tokens of requests, for the cost in the log")
    judge_price_out: float = option(0.0, "http: price of a million tokens of the judge's answers")


def patience(cfg, rows):
    """-> the most seconds that an HTTP judge can take for so many rows; 0 for other judges. Ranks wait so much longer
    for each other: a slow judge is no dead rank."""
    if not any(part.startswith(("http://", "https://")) for part in cfg.judge.split(",")):
        return 0
    return math.ceil(rows / cfg.judge_parallel) * TRIES * (cfg.judge_retries + 1) * (cfg.judge_timeout + 10)


# ------------------------------------------------------------------------------------------------------ the answers
class Cache:
    """Answers of the judge in a file of sqlite's. Threads and processes may share it, and a kill leaves it whole.

    Not with sqlite's write-ahead log: that needs memory which all processes share, and two nodes have none. Nor does it
    wait for the disk, which would take longer than all the rest: a power cut may spoil the file."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        try:
            self.file = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self.file.execute("PRAGMA synchronous = OFF")
            columns = (
                "key TEXT PRIMARY KEY, model TEXT, answer TEXT, tokens_in INTEGER, tokens_out INTEGER, seconds REAL"
            )
            self.file.execute(f"CREATE TABLE IF NOT EXISTS answers ({columns})")
            self.get("")
        except sqlite3.Error as e:
            raise self.error(e) from None

    def get(self, key):
        """-> the answer that is kept under a key, or None."""
        with self.lock:
            try:
                row = self.file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            except sqlite3.Error as e:
                raise self.error(e) from None
        return row and row[0]

    def put(self, *row):
        with self.lock:
            try:
                self.file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
            except sqlite3.Error as e:
                raise self.error(e) from None

    def error(self, e):
        return DataError(f"--judge-cache {self.path}: cannot be used ({e}); make room, or name another file")


# -------------------------------------------------------------------------------------------------------- the judge
class HttpJudge:
    """See the top of this file. url: the server's, up to and with /v1. cfg: has the fields of `Judging`, and `out`."""

    costly = True  # the references are not judged beforehand

    def __init__(self, url, cfg):
        self.url, self.cfg, self.prompt = url, cfg, Prompt(cfg.judge_prompt)
        self.key = os.environ.get(cfg.judge_key, "").strip()
        check_flags(url, cfg)
        self.openai = import_openai()
        settings = {"timeout": cfg.judge_timeout, "max_retries": cfg.judge_retries}
        self.client = self.openai.OpenAI(base_url=url, api_key=self.key or "none", **settings)
        self.look()
        if not cfg.judge_cache:
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
        self.cache = Cache(cfg.judge_cache or str(Path(cfg.out) / "judge.sqlite"))
        self.lock, self.queue = threading.Lock(), queue.SimpleQueue()
        self.asked = {}  # key of a request -> Future of its answer's scores {dimension: (A, B)}, or of None
        self.counts, self.window, self.stop, self.why = Counter(), deque(maxlen=WINDOW), None, ""
        for _ in range(cfg.judge_parallel):  # daemons: the second Ctrl-C waits for no call
            threading.Thread(target=self.work, daemon=True).start()

    def look(self):
        """DataError if no server is there, or if it refuses the key: before the models are loaded. It costs nothing."""
        try:
            self.client.with_options(timeout=min(30.0, self.cfg.judge_timeout), max_retries=2).models.list()
        except self.openai.APIStatusError as e:
            if e.status_code == 401:
                raise self.hopeless(e) from None
        except self.openai.APIConnectionError as e:
            raise DataError(f"--judge {self.url}: no server answers there ({self.words(e)}); start it") from None
        except Exception:  # no list of models, which is nothing that a judge needs
            pass

    def __call__(self, records, responses):
        rows = [self.ask(record, response) for record, response in zip(records, responses, strict=True)]
        entries = []
        for _, future, first in rows:
            scores = future.result()
            both = scores and {d: ab if first else ab[::-1] for d, ab in scores.items()}
            entries.append(both)
        for key, _, _ in rows:
            self.asked.pop(key, None)
        if self.stop:
            raise DataError(self.stop)
        return entries

    def foresee(self, records, responses):
        """Ask already. A later call with these rows will find the answers, or wait for them."""
        for record, response in zip(records, responses, strict=True):
            self.ask(record, response)

    def ask(self, record, response):
        """-> (key of the request, Future of its scores, whether the response is answer A). Equal requests are one."""
        cfg = self.cfg
        try:
            urls = [data_url(str(path), cfg.max_decode, cfg.judge_pixels) for path in record.get("images") or ()]
        except PictureError as e:
            raise DataError(f"{record.get('where')}: the judge cannot be shown the picture ({e})") from None
        messages, first = self.prompt.messages(record, response, urls)
        request = {"model": cfg.judge_model, "messages": messages}
        request |= limits(cfg.judge_tokens, cfg.judge_reasoning == "yes")
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if key not in self.asked:
            self.asked[key] = future = Future()
            kept = parse(self.cache.get(key), self.prompt.dimensions)
            if kept:
                self.count(judge_cached=1)
                future.set_result(kept)
            else:
                self.queue.put((future, key, request))
        return key, self.asked[key], first

    # ------------------------------------------------------------------------------------------ in the threads
    def work(self):
        while True:
            future, key, request = self.queue.get()
            try:
                future.set_result(None if self.stop else self.judged(key, request))
            except Exception as e:
                future.set_exception(e)

    def judged(self, key, request):
        """-> {dimension: (score of A, score of B)}, kept in the file; None where the judge failed."""
        scores = None
        for _ in range(TRIES):
            began = time.time()
            text, tokens = self.call(request)
            if text is None:
                break
            scores = parse(text, self.prompt.dimensions)
            if scores:
                self.cache.put(key, request["model"], text, *tokens, round(time.time() - began, 3))
                break
            self.why = f"'{' '.join(text.split())[:80]}' has not every score"
        self.note(failed=scores is None)
        return scores

    def call(self, request):
        """One call, with openai's retries -> (text, (tokens of the request, of the answer)). None as text: failed.

        What came back and cannot be read is a text without scores."""
        began = time.time()
        try:
            done = self.client.chat.completions.create(**request)
            choice, usage = done.choices[0], done.usage
            # cut off at --judge-tokens: its last number may lack a digit
            text = "(cut off)" if choice.finish_reason == "length" else choice.message.content or ""
        except self.openai.APIStatusError as e:
            self.why = self.words(e)
            if e.status_code in HOPELESS or refuses_limits(e):
                self.stop = str(self.hopeless(e))
            return None, None
        except self.openai.APIConnectionError as e:  # a time-out, too
            self.why = self.words(e)
            return None, None
        except Exception as e:  # a body that is none of this protocol
            return f"({self.words(e)})", (0, 0)
        finally:
            self.count(judge_seconds=time.time() - began)
        tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
        self.count(judge_calls=1, judge_tokens_in=tokens[0], judge_tokens_out=tokens[1])
        return text, tokens

    def note(self, failed):
        """Count a judgement; stop if too many of the last ones have failed."""
        with self.lock:
            self.window.append(failed)
            if sum(self.window) > self.cfg.judge_fail * WINDOW and not self.stop:
                cure = "mend the judge; the same command goes on, and pays for no answer twice"
                failures = f"{sum(self.window)} of the last {len(self.window)} judgements failed"
                self.stop = f"--judge {self.url}: {failures}, the last one: {self.why}; {cure}"

    def count(self, **more):
        with self.lock:
            self.counts.update(more)

    def spent(self):
        """-> {name: number} since the start: calls that were answered, answers from the file, tokens, seconds, cost."""
        names = ("judge_calls", "judge_cached", "judge_tokens_in", "judge_tokens_out", "judge_seconds")
        with self.lock:
            out = {name: float(self.counts[name]) for name in names}
        cfg = self.cfg
        cost = out["judge_tokens_in"] * cfg.judge_price_in + out["judge_tokens_out"] * cfg.judge_price_out
        return out | {"judge_cost": cost / 1e6}

    # --------------------------------------------------------------------------------------------------- words
    def hopeless(self, e):
        """-> DataError for what no further call can mend."""
        cures = {
            400: "a model that reasons needs --judge-reasoning yes, and --judge-tokens enough for its thoughts as well",
            401: f"put the right key into the environment variable {self.cfg.judge_key}",
            403: f"the key in {self.cfg.judge_key} may not use this model",
            404: f"--judge-model {self.cfg.judge_model} must be on the server, and the URL must end where /chat begins",
        }
        return DataError(f"--judge {self.url}: the server refuses ({self.words(e)}); {cures[e.status_code]}")

    def words(self, e):
        """An error in one short line, without the key, also where the server repeats parts of it."""
        text = " ".join(str(e).split())
        if self.key:
            text = text.replace(self.key, "***")
        text = re.sub(r"(?i)\b(?:sk|key|bearer)[-_ ][\w*.-]{6,}", "***", text)
        return f"{type(e).__name__}: {text}"[:200]


def check_flags(url, cfg):
    """DataError for flags that cannot be meant."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise DataError(f"--judge: the URL must hold no key; put it into the environment variable {cfg.judge_key}")
    if not parts.hostname:
        raise DataError(f"--judge {url}: has no host; give http://host:port/v1")
    if not cfg.judge_model:
        raise DataError(f"--judge {url}: give --judge-model, the name of the model on the server")


def import_openai():
    try:
        import openai  # slow to import; other judges do without
    except ImportError:
        cure = "pip install -r requirements-judge.txt"
        raise DataError(f"--judge http...: needs the package openai; {cure}") from None
    return openai


def spent(judge):
    """-> what this rank's judge has spent so far; {} for a judge that keeps no count."""
    return judge.spent() if hasattr(judge, "spent") else {}


def over_ranks(sums):
    """{name: this rank's number} -> {name: the sum over all ranks}. All ranks have to call."""
    if not sums:
        return sums
    return dict(zip(sums, common.total(torch.tensor([*sums.values()], dtype=torch.float64)).tolist()))


def tell(sums):
    """Say what the judge has cost since this run began or went on, if it keeps count."""
    if not sums:
        return
    words = (
        f"judge: {sums['judge_calls']:.0f} calls, {sums['judge_cached']:.0f} answers from the file, "
        f"{sums['judge_tokens_in']:,.0f} tokens asked, {sums['judge_tokens_out']:,.0f} answered, "
        f"{sums['judge_seconds']:.0f} s of calls"
    )
    checkpoint.say(words + (f", cost {sums['judge_cost']:.2f}" if sums["judge_cost"] else ""))
