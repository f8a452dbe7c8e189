"""Questions without answers -> the answers of a strong model behind a server, for convert/pcogalign.py --answers.

    python -m convert.golden data/pcogalign/queries.jsonl --url http://host:8000/v1 --model NAME --out answers.jsonl

The server speaks OpenAI's chat-completions protocol (pip install -r requirements-judge.txt). Its key is taken from the
environment variable OPENAI_API_KEY, if it needs one. A question is sent with its system message and its pictures, at
temperature 0; --reasoning is for a model that reasons first and takes no temperature. Written, each line as soon as it
is there:

    OUT    {"id": the record's, "golden_response": "..."}

The same command again asks for what is missing: a call that failed, an answer that was cut off at --tokens.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from convert.pcogalign import read_answers
from judge_http import HOPELESS, import_openai
from judge_request import data_url, limits, refuses_limits
from pictures import MAX_DECODE, PictureError
from records import DataError, Records

PIXELS = 1024 * 1024  # pictures are scaled down to so many


def messages_of(record):
    """-> the messages of a request: the pictures stand in front of the user's text."""
    urls = [data_url(path, MAX_DECODE, PIXELS) for path in record["images"]]
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    *before, question = record["messages"]
    text = {"type": "text", "text": question["content"].replace("<image>", "")}
    return [*before, {"role": "user", "content": [*shown, text]}]


def answer(client, record, model, tokens, reasoning=False):
    """-> (id, answer or None, why there is none). DataError for what would fail for all questions alike."""
    name, text, openai = str(record.get("id")), "", import_openai()
    try:
        request = {"model": model, "messages": messages_of(record)} | limits(tokens, reasoning)
        choice = client.chat.completions.create(**request).choices[0]
        text = (choice.message.content or "").strip()
    except PictureError as e:
        return name, None, f"its picture cannot be shown ({e})"
    except Exception as e:  # of the package, or a body that is none of this protocol
        said = " ".join(str(e).split()).replace(client.api_key, "***")  # some servers repeat the key
        words = f"{type(e).__name__}: {said[:200]}"
        if refuses_limits(e):
            cure = "a model that reasons needs --reasoning, and --tokens enough for its thoughts as well"
            raise DataError(f"--model {model}: the server refuses ({words}); {cure}") from None
        if isinstance(e, openai.APIConnectionError) or getattr(e, "status_code", None) in HOPELESS:
            raise DataError(f"--url {client.base_url}: {words}; look at the server, --model and the key") from None
        return name, None, words
    if choice.finish_reason == "length":
        return name, None, f"its answer is longer than {tokens} tokens; raise --tokens"
    return (name, text, "") if text else (name, None, "its answer is empty")


def ask_all(queries, url, model, out, parallel=16, tokens=1024, reasoning=False):
    """Write the answers that are missing in `out` -> (how many questions there are, how many of them were asked now,
    {id: why there is no answer})."""
    records, done, why = Records(queries), read_answers(out if Path(out).exists() else ""), {}
    left = [r for r in (records[i] for i in range(len(records))) if str(r.get("id")) not in done]
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    client = import_openai().OpenAI(base_url=url, api_key=key, max_retries=5, timeout=300)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as f, ThreadPoolExecutor(parallel) as pool:
        calls = [pool.submit(answer, client, record, model, tokens, reasoning) for record in left]
        for call in as_completed(calls):
            if call.exception():
                pool.shutdown(cancel_futures=True)
            name, text, reason = call.result()
            if text is None:
                why[name] = reason
                continue
            f.write(json.dumps({"id": name, "golden_response": text}, ensure_ascii=False) + "\n")
            f.flush()
    return len(records), len(left), why


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m convert.golden", description="Have a model answer questions.", allow_abbrev=False
    )
    parser.add_argument("queries", help="queries.jsonl of convert.pcogalign")
    parser.add_argument("--url", required=True, help="of the server, up to and with /v1")
    parser.add_argument("--model", required=True, help="its name on the server")
    parser.add_argument("--out", required=True, help="file of the answers; the same one goes on")
    parser.add_argument("--parallel", type=int, default=16, help="calls at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="longest answer (default: %(default)s)")
    parser.add_argument("--reasoning", action="store_true", help="the model reasons before it answers")
    args = parser.parse_args(argv)
    for flag in ("parallel", "tokens"):
        if getattr(args, flag) < 1:
            parser.error(f"argument --{flag}: {getattr(args, flag)} is too small, it must be at least 1")
    try:
        settings = (args.parallel, args.tokens, args.reasoning)
        rows, asked, why = ask_all(args.queries, args.url, args.model, args.out, *settings)
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    if why:
        name, reason = next(iter(why.items()))
        cure = "the same command asks for them again"
        parser.exit(2, f"error: {len(why)} of {rows} questions have no answer, the first is {name}: {reason}; {cure}\n")
    print(f"{args.out}: {rows} answers, {asked} of them new")


if __name__ == "__main__":
    main()
