"""Scripts on several ranks, one after the other, with a fault on one rank: torchrun tests/faulty.py WORK.json

WORK.json: {"runs": [[script, flags], ...], "fault": [rank, function, call, what] or null, "seconds": time-out or null}.
At the n-th call of the function (n is `call`), on that rank alone, `what` happens: one of WHAT.
"""

import datetime
import importlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist  # noqa: E402

import common  # noqa: E402
from data import DataError  # noqa: E402


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def bad_data():
    raise DataError("rows.jsonl, row 7: bad")


def bug():
    raise KeyError("a bug")


def hang():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(3600)


WHAT = {f.__name__: f for f in (kill, bad_data, bug, hang)}


def put(rank, function, call, what):
    """From now on, this happens."""
    module, _, name = function.rpartition(".")
    owner = importlib.import_module(module)
    real, calls = getattr(owner, name), itertools.count(1)

    def faulty(*args, **kw):
        if next(calls) == call:
            WHAT[what]()
        return real(*args, **kw)

    if int(os.environ["RANK"]) == rank:
        setattr(owner, name, faulty)


def main():
    work = json.loads(Path(sys.argv[1]).read_text())
    if work.get("fault"):
        put(*work["fault"])
    if work.get("seconds"):  # in the scripts it is --timeout, in minutes
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=work["seconds"]))
    for script, flags in work["runs"]:
        importlib.import_module(script).main(flags)


if __name__ == "__main__":
    common.run(main)
