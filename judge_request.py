"""What an HTTP judge is asked: a file of prompts, a record and a response -> the messages of one request.

The two answers stand in the request as A and B. A judge may like one place better. So the response is A for about half
of the prompts and B for the others. A hash of the dialogue and the reference says which. So all responses to a prompt,
which RL compares with each other, stand in the same place, and after an interruption the same request is made again.
"""

import base64
import hashlib
import io
import re
from functools import lru_cache
from pathlib import Path

import pictures
from data import DataError
from rewards import reference

BLANKS = ("dimensions", "dialogue", "answer_a", "answer_b", "form")


class Prompt:
    """A file of prompts, such as prompts/mmrole.txt: its parts, and the messages that it makes."""

    def __init__(self, path):
        self.path = path
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as e:
            raise DataError(f"--judge-prompt {path}: cannot be read ({_words(e)}); prompts/ has two") from None
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        parts = re.split(r"^\[(\w+)\][ \t]*$", "\n".join(lines), flags=re.M)
        self.parts = {name: part.strip() for name, part in zip(parts[1::2], parts[2::2])}
        missing = [name for name in ("dimensions", "system", "user") if not self.parts.get(name)]
        if missing:
            raise DataError(f"--judge-prompt {path}: has no part [{missing[0]}]; prompts/mmrole.txt shows the form")
        blanks = [b for b in BLANKS if f"{{{b}}}" not in self.parts["system"] + self.parts["user"]]
        if blanks:
            raise DataError(f"--judge-prompt {path}: {{{blanks[0]}}} stands nowhere in [system] and [user]")
        rows = [line.partition(":") for line in self.parts["dimensions"].splitlines() if line.strip()]
        self.dimensions = [name.strip() for name, _, _ in rows]
        plain = {" ".join(re.findall(r"[^\W_]+", name.lower())) for name in self.dimensions}
        if len(plain) < len(rows) or not all(plain) or not all(colon for _, colon, _ in rows):
            raise DataError(f"--judge-prompt {path}: each line of [dimensions] needs a name of its own and a colon")

    def messages(self, record, response, urls):
        """-> (messages of the request, whether the response is A). urls: of the pictures, which come first."""
        before = dialogue(record)
        first = hashlib.sha256(f"{before}\0{reference(record)}".encode()).digest()[0] % 2 == 0
        answers = (response, reference(record)) if first else (reference(record), response)
        filled = {
            "dimensions": self.parts["dimensions"],
            "dialogue": before,
            "answer_a": answers[0],
            "answer_b": answers[1],
            "form": "\n".join(f"{d}: A=..., B=..." for d in self.dimensions),
        }
        # all at once: what an answer says is never taken for a blank
        system, user = (
            re.sub(rf"\{{({'|'.join(BLANKS)})\}}", lambda m: filled[m[1]], self.parts[name])
            for name in ("system", "user")
        )
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*shown, {"type": "text", "text": user}]
        return [{"role": "system", "content": system}, {"role": "user", "content": content}], first


def dialogue(record):
    """-> the messages of a record before its reference, as text with the speakers' names."""
    messages = record["messages"]
    last = max(k for k, m in enumerate(messages) if m["role"] == "assistant")
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages[:last])


def limits(tokens, reasoning):
    """-> the fields of a request beside model and messages. A model that reasons before it answers takes no
    temperature, and has another name for the limit, because its thoughts count as well."""
    return {"max_completion_tokens": tokens} if reasoning else {"temperature": 0, "max_tokens": tokens}


def refuses_limits(error):
    """Is this error of the package openai a refusal of the fields `temperature` or `max_tokens` themselves? A model
    that reasons refuses them in every request. (A prompt that is too long is a 400, too, and of one request alone.)"""
    said = str(error)
    named = re.search("temperature|max_tokens", said) and re.search("(?i)unsupported|not support", said)
    return getattr(error, "status_code", None) == 400 and bool(named)


@lru_cache(maxsize=256)
def data_url(path, max_decode, max_pixels):
    """A picture of at most so many pixels, as a data URL (JPEG). PictureError as in pictures.load."""
    picture = pictures.load(path, max_decode, max_pixels)
    width, height = picture.size
    scale = (max_pixels / (width * height)) ** 0.5
    if scale < 1:
        picture = picture.resize((max(1, int(width * scale)), max(1, int(height * scale))))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _words(e):
    return getattr(e, "strerror", None) or " ".join(str(e).split())[:200]
