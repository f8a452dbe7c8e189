"""How a script ends, on one process or on several ranks, and what the ranks hand each other. torchrun starts them.

When a rank ends with an error, torchrun ends the others: with SIGTERM, and after 30 seconds with SIGKILL. The rank that
ended first stands in its report as the root cause. So a rank that fails leaves at once, and one that only finds that
another is gone leaves after it.
"""

import os
import sys
import time
import traceback

import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from data import DataError

GONE = ("by peer", "Broken pipe", "Connection was likely closed", "ncclRemoteError")
SILENT = ("Timed out", "timed out", "timeout")
GRACE = 5  # seconds that a rank which has lost another one waits before it leaves
SAME = 2  # seconds that rank 0 has to say what is wrong for all ranks, such as a flag; torchrun then ends the others


def several():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def run(main):
    """Run a script's main. Bad input becomes one line on stderr and exit status 2.

    On several ranks an error has its rank's number. A rank that has lost another one says so in one line: its own
    traceback would hide the cause."""
    name = f"rank {checkpoint.rank()}: " if several() else ""
    try:
        main()
    except DataError as e:
        if checkpoint.rank() > 0:
            time.sleep(SAME)
        leave(f"error: {name}{e}", 2)
    except Exception as e:
        if not several():
            raise
        if lost(e):
            leave(name + lost(e), 1, GRACE)
        leave(name + traceback.format_exc(), 1)
    except SystemExit as e:  # stopped by a signal, and saved
        if several() and isinstance(e.code, int):
            end(e.code)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(text, status, seconds=0):
    """Print a text and end this process; on several ranks, some seconds later.

    There nothing is tidied up: with nccl, to end the process group can mean to wait for ranks that wait for this
    one."""
    if not several():
        tqdm.write(text, file=sys.stderr)
        sys.exit(status)
    print(f"\n{text.rstrip()}", file=sys.stderr, flush=True)  # on a new line, below rank 0's progress bar
    time.sleep(seconds)
    end(status)


def end(status):
    """End this process at once, without the destructors of the process group: that of gloo, too, can wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost(e):
    """What an error of a collective operation (of gloo, nccl or their store) says about another rank, or None."""
    text = str(e)
    if isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and "gloo" in text):
        if any(word in text for word in GONE):
            return "stops, because another rank has ended; see that one's error, or the root cause that torchrun names"
        if any(word in text for word in SILENT):
            return "stops, because another rank has not answered for --timeout minutes"
    return None


def gather(x):
    """-> [x of rank 0, x of rank 1, ...], on every rank. x: plain Python values."""
    if not dist.is_initialized():
        return [x]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found
