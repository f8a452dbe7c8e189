"""PCogAlignBench -> this project's records: advice about an image to a user with a set of roles (Li et al., 2025).

    python -m convert.pcogalign FOLDER --out runs/pcogalign

FOLDER is the data set's version_v4, or the folder that holds it: HCMAS (called LS1) and HCSHR (LS2), each a train and a
test file, with the images that they name. A row:

    {"individual_RoleSet": {"Hospital": "Nurse", "Market": "Cook"}, "query": "...", "image": {"file_path": "..."},
     "eval_info": {"sub_set", "individual", "location", "ImageDesc", "EvalHelp"}, "golden_response": "..."}

The published files have no golden_response, so no answer to learn or to compare with. The files that have one are
called HCMAS-golden-train.json and so on, and are taken where they are. Else the converter writes queries.jsonl, one
record for each row. Have a strong model answer them (convert/golden.py), and give its answers with --answers FILE, JSON
Lines of {"id": the record's, "golden_response": "..."}.

The split is the paper's. The rows of LS1's train file are shuffled with seed 42: the first 50% are demonstrations, the
next 20% prompts for RL. The tests are the test files. LS2's train file is not used. Written:

    task_b_demos.jsonl, task_b_prompts.jsonl, task_b_ls1.jsonl, task_b_ls2.jsonl
                    a system message with the user's roles, the image and the query, the golden response; role_set and
                    eval_info are kept for the judge
    task_b_val.jsonl  with --val N: the first N rows that the split does not use, to choose settings on
    images/         the images that are used, as hard links where the disk allows it, else as copies
    counts.json     how many records each file has, and why which rows were refused
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from convert.files import first_file, image_name, place_images, write_files
from records import DataError, check_values, parse

SETS = {"ls1": "HCMAS", "ls2": "HCSHR"}
# the tests come first: a training row that is in a test as well is refused, and the test stays whole
FILES = [("ls1", "test"), ("ls2", "test"), ("ls1", "train")]


def find(folder, part, which):
    """-> the path of a file of the data set, the one with golden responses if there is one. DataError if neither is."""
    names = [f"{SETS[part]}-golden-{which}.json", f"{SETS[part]}-{which}.json"]
    path = first_file(*(root / name for name in names for root in (folder, folder / "version_v4")))
    if not path:
        raise DataError(f"{folder}: not PCogAlignBench; it needs {names[1]} or {names[0]}, or version_v4 with them")
    return Path(path)


def read_rows(path):
    rows = parse(path.read_bytes(), path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a JSON array of rows")
    return rows


def read_answers(path):
    """JSON Lines of {"id", "golden_response"} -> {id: answer}. DataError names a line that is not."""
    if not path:
        return {}
    answers = {}
    for n, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        row = parse(line, f"{path}, row {n}") if line.strip() else None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not _text(row.get("golden_response")):
            raise DataError(f"{path}, row {n}: needs an 'id' and a 'golden_response', both text")
        answers[row["id"]] = row["golden_response"]
    return answers


def _text(value):
    """-> text without <image> marks: the only image of a row has its place. '' for what is no text."""
    return value.replace("<image>", "").strip() if isinstance(value, str) else ""


def read_row(row, folder, name):
    """A row -> (record without an answer, path of its image). DataError says why it is refused."""
    if not isinstance(row, dict):
        raise DataError("not an object")
    check_values(row, "the row")
    roles, query = row.get("individual_RoleSet"), _text(row.get("query"))
    if not isinstance(roles, dict) or not roles or not all(_text(role) for role in roles.values()):
        raise DataError("no set of roles")
    if not query:
        raise DataError("no query")
    image = row.get("image")
    image = image_name(image.get("file_path") if isinstance(image, dict) else image)
    source = first_file(folder / image)
    if not source:
        raise DataError("its image is not there")
    who = "; ".join(f"{_text(role)} at {_text(place)}" for place, role in roles.items())
    system = {"role": "system", "content": f'You are a helpful assistant for a user who is "{who}".'}
    record = {"id": name, "images": [f"images/{image}"], "role_set": roles, "eval_info": row.get("eval_info")}
    return record | {"messages": [system, {"role": "user", "content": f"<image>{query}"}]}, source


def usable_rows(folder, answers):
    """-> ({(part, which): records}, {record's image: its path}, Counter of the reasons for which rows were refused).

    A record has its answer, if there is one."""
    usable, sources, refused, seen = {}, {}, Counter(), set()
    for part, which in FILES:
        path = find(folder, part, which)
        found = usable[part, which] = []
        for n, row in enumerate(read_rows(path), 1):
            try:
                record, source = read_row(row, path.parent, f"{SETS[part]}-{which}-{n}")
                answer = _text(answers.get(record["id"], row.get("golden_response")))
                if "golden" in path.name and not answer:
                    raise DataError("no golden response")
                key = (record["images"][0], *(m["content"] for m in record["messages"]))
                if key in seen:
                    raise DataError("the same row twice")
            except DataError as e:
                refused[f"{SETS[part]}-{which}: {e}"] += 1
                continue
            seen.add(key)
            sources[record["images"][0].removeprefix("images/")] = source
            if answer:
                record["messages"].append({"role": "assistant", "content": answer})
            found.append(record)
        if not found:
            raise DataError(f"{path}: no usable row; refused: {dict(refused)}")
    return usable, sources, refused


def has_answer(record):
    return record["messages"][-1]["role"] == "assistant"


def convert_pcogalign(folder, out, answers="", val=0):
    """Write the files that stand at the top of this file under `out`. -> what counts.json has.

    answers: file of golden responses, '' for none. val: rows of task_b_val.jsonl. Raises DataError, as `find` does."""
    out = Path(out)
    usable, sources, refused = usable_rows(Path(folder), read_answers(answers))
    rows = [record for records in usable.values() for record in records]
    out.mkdir(parents=True, exist_ok=True)
    place_images(sources, out)
    if not any(map(has_answer, rows)):
        return write_files({"queries": rows}, refused, out)
    for (part, which), records in usable.items():
        refused[f"{SETS[part]}-{which}: no golden response"] += sum(not has_answer(r) for r in records)
        usable[part, which] = [r for r in records if has_answer(r)]
        if not usable[part, which]:
            raise DataError(f"{folder}: no row of {SETS[part]}-{which} has a golden response; give --answers for all")
    train = usable["ls1", "train"]
    random.Random(42).shuffle(train)
    half, end = len(train) // 2, len(train) * 7 // 10
    if val > len(train) - end:
        raise DataError(f"--val {val}: the split leaves {len(train) - end} rows unused; give no more than these")
    files = {"task_b_demos": train[:half], "task_b_prompts": train[half:end]}
    files |= {"task_b_val": train[end : end + val]} if val else {}
    files |= {"task_b_ls1": usable["ls1", "test"], "task_b_ls2": usable["ls2", "test"]}
    return write_files(files, +refused, out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m convert.pcogalign",
        description="Convert PCogAlignBench to this project's records.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="folder of the data set, version_v4 or the one above")
    parser.add_argument("--out", default="runs/pcogalign", help="folder to write (default: %(default)s)")
    parser.add_argument("--answers", default="", help='JSON Lines of {"id", "golden_response"}, for queries.jsonl')
    parser.add_argument("--val", type=int, default=0, help="rows to choose settings on (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.val < 0:
        parser.error(f"argument --val: {args.val} is too small, it must be at least 0")
    try:
        counts = convert_pcogalign(args.folder, args.out, args.answers, args.val)
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(counts, indent=1))
    if "queries" in counts:
        print(f"no golden responses: have {args.out}/queries.jsonl answered, then give the answers with --answers")


if __name__ == "__main__":
    main()
