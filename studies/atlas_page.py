"""The HTML page of studies/atlas.py: its data as JSON, put into the template atlas.html. One file, no network."""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np

import pictures
import plots

TEMPLATE = Path(__file__).with_suffix(".html").with_name("atlas.html")
PIXELS = 160 * 160  # of a picture on the page, at most
HERE = "{{data}}"  # where the data goes in the template


class Words:
    """Tokens as text, each text once: words(token) -> its number in the list `words.texts`."""

    def __init__(self, tokenizer, eos):
        self.tokenizer, self.eos, self.texts, self.numbers = tokenizer, eos, [], {}

    def __call__(self, token):
        if token not in self.numbers:
            self.numbers[token] = len(self.texts)
            self.texts.append(plots.END if token == self.eos else self.tokenizer.decode([token]))
        return self.numbers[token]


class Pictures:
    """Picture files as data URLs, each once: pictures(path) -> its number in the list `pictures.urls`."""

    def __init__(self, max_decode):
        self.max_decode, self.urls, self.numbers = max_decode, [], {}

    def __call__(self, path):
        if path not in self.numbers:
            self.numbers[path] = len(self.urls)
            self.urls.append(data_url(pictures.load(path, self.max_decode, PIXELS)))
        return self.numbers[path]


def data_url(picture):
    """A picture, made small -> the shorter of its PNG and its JPEG as a data URL."""
    shrink = min(1.0, (PIXELS / (picture.width * picture.height)) ** 0.5)
    picture = picture.resize((max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))))
    found = []
    for kind, how in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        file = io.BytesIO()
        picture.save(file, kind, **how)
        found.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return min(found, key=len)


def answers_in(example):
    """Where the learnt tokens of an Example lie -> [(first, behind the last)] of each run of them."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], example.response.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def dialogue(kind, example, places, words, pictures):
    """-> {kind, images, turns, steps}. A turn is [who, text], or [who, first step, behind the last] where each token
    has a code. steps: [[word, code, the policy's probability of the code, the bare VLM's word]]"""
    record = example.record
    messages = record.get("messages") or [{"role": "assistant", "content": record.get("text", "")}]
    speaks = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    runs = answers_in(example)
    if kind in ("before", "after"):  # the policy gives the last answer alone
        speaks = speaks[-1:]
    at, turns, with_codes = 0, [], dict(zip(speaks, runs))
    for k, message in enumerate(messages):
        if k in with_codes:
            first, stop = with_codes[k]
            n = stop - max(first, 1)  # no state stands before the very first token
            turns.append(["agent", at, at + n])
            at += n
        else:
            turns.append([message["role"], message["content"].replace("<image>", "")])
    p_M = places.logpi_MK.gather(1, places.codes_M[:, None])[:, 0].exp().tolist()
    rows = zip(places.ids_M.tolist(), places.codes_M.tolist(), p_M, places.vlm_M.tolist())
    steps = [[words(token), code, round(p, 3), words(vlm)] for token, code, p, vlm in rows]
    return {"kind": kind, "images": [pictures(p) for p in record["images"]], "turns": turns, "steps": steps}


def asked(record):
    """-> the turns before the last answer: [[who, text]]"""
    messages = record.get("messages") or [{"role": "user", "content": record.get("text", "")}]
    until = len(messages) - (messages[-1]["role"] == "assistant")
    return [[m["role"], m["content"].replace("<image>", "")] for m in messages[:until]]


def write(path, data):
    """The template with the data in it -> the file `path`."""
    packed = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    title = html.escape(f"Atlas of the codes: {data['run']}")
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", title).replace(HERE, packed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
