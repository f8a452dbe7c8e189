"""What reading costs: the processor's time for a batch with pictures, against that of the step that learns from it.

    python -m studies.reading --folder runs/reading --out runs/reading.json

Stage 1 trains the tiny VLM's projector on JPEGs of two sizes. The folder is deleted at the end. Seconds are of the
processor, of one thread, not of the clock, so that other work on the machine does not count."""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image

import loader
import stage1_projector

BATCH = 4  # dialogues a step, as the paper has on each GPU
ROWS = 16  # of the file
WARM = 2  # steps that do not count: what is done once is done in them
# what a GPU would do in a step of stage 1 at Qwen2.5-VL-3B's size, computed: a picture of 600 patches, 150 tokens of
# it, 100 of text; the language model reads the text once with the picture and once without
PATCHES, IMAGE_TOKENS, TEXT_TOKENS = 600, 150, 100
LANGUAGE, VISION = 3.09e9, 0.67e9  # parameters
REACHED = 400e12  # floating-point operations a second: two fifths of an H100's peak in bfloat16


def make(folder, size):
    """ROWS JPEGs with edges and some grain, and their records -> kB of a file."""
    folder.mkdir(parents=True)
    rng, width, height = np.random.default_rng(0), *size
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A large red ring. " * 5}]
    with open(folder / "paired.jsonl", "w") as f:
        for k in range(ROWS):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            image = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
            image = image + rng.normal(0, 6, (height, width, 1))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.jpg", quality=90)
            f.write(json.dumps({"image": f"{k}.jpg", "messages": turns}) + "\n")
    return statistics.mean(p.stat().st_size for p in folder.glob("*.jpg")) / 1000


def steps(folder, vlm, number, workers):
    """Train so many steps -> {'ms': of this process for a picture, 'step_ms': for a step, reading included}"""
    began, spent, real = [], [], loader.batches

    def timed(*args, **kw):
        stream = real(*args, **kw)
        while True:
            began.append(time.process_time())
            batch = next(stream)
            spent.append(time.process_time() - began[-1])
            yield batch

    stage1_projector.batches = timed
    flags = ["--paired", f"{folder}/paired.jsonl", "--vlm", vlm, "--batch", str(BATCH), "--steps", str(number + WARM)]
    try:
        stage1_projector.main([*flags, "--workers", str(workers), "--out", f"{folder}/run{workers}"])
    finally:
        stage1_projector.batches = real
    step = statistics.median(b - a for a, b in zip(began[WARM:], began[WARM + 1 :]))
    return {"ms": 1000 * statistics.median(spent[WARM:]) / BATCH, "step_ms": 1000 * step}


def on_a_gpu():
    """-> milliseconds of the frozen VLM's forward passes in a step of stage 1 at 3B, computed."""
    tokens = IMAGE_TOKENS + 2 * TEXT_TOKENS
    return 1000 * 2 * BATCH * (LANGUAGE * tokens + VISION * PATCHES) / REACHED


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m studies.reading", description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", required=True, help="is made, filled with JPEGs, and deleted")
    parser.add_argument("--vlm", default="tiny/vlm", help="(default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1280x960"], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="that count (default: %(default)s)")
    parser.add_argument("--out", required=True, help="file of the numbers")
    args = parser.parse_args(argv)
    found, folder = {"sizes": {}}, Path(args.folder)
    try:
        for size in args.sizes:
            kb = make(folder / size, tuple(map(int, size.split("x"))))
            here, ahead = (steps(folder / size, args.vlm, args.steps, workers) for workers in (0, 1))
            here |= {"kb": kb, "share": here["ms"] * BATCH / here["step_ms"], "ms_with_workers": ahead["ms"]}
            found["sizes"][size] = here
    finally:
        shutil.rmtree(folder)
    found["gpu_ms"] = on_a_gpu()
    found["config"] = {"vlm": args.vlm, "batch": BATCH, "steps": args.steps, "machine": "a core of an AMD EPYC"}
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
