"""MMRole -> this project's records: role play about an image, 85 characters (Dai et al., arXiv 2408.04203).

    python -m convert.mmrole FOLDER --out runs/real/data

FOLDER holds the data set as published (dialogues/, profiles/, images/) or the two preprocessed files
conversations-train-comment.json and conversations-OODtest-comment.json. An image that is not on disk is left out: its
dialogue becomes a text-only one. The images that are used are put beside the records, in OUT/images (as hard links
where the disk allows it, else as copies), because a records file may name no image outside its own folder.

The split is the paper's. The in-distribution dialogues are shuffled with seed 42. The first 50% are demonstrations, the
next 40% prompts for RL, the last 10% the in-distribution test. The out-of-distribution file is the other test. With
--val N the last N dialogues of the prompts become a validation part, on which settings can be chosen. Written:

    paired.jsonl, text.jsonl     for stages 1 to 3: the first 90%, whole dialogues, with and without an image on disk.
                                 No dialogue of a test or of the validation part is in them.
    task_demos.jsonl, task_prompts.jsonl, task_id.jsonl, task_ood.jsonl, with --val task_val.jsonl
                                 one record for each answer. The system message names the character. One user message
                                 has the image, the profile, the dialogue so far and the last question.
    counts.json                  how many records each file has, and why which dialogues were refused

This is also the pattern for another data set: read the rows, refuse the bad ones with a reason, split whole dialogues
before anything is cut into records, write JSON Lines.
"""

import argparse
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from convert.files import first_file, image_name, place_images, write_files
from records import DataError, check_values, parse

PROFILE_FIELDS = ("introduction", "personality", "catchphrase", "relationship", "experience")


# ------------------------------------------------------------------------------------------------------ reading
def read_rows(folder):
    """-> ([(split 'id' or 'ood', row)] of every dialogue, {file name: profile}, empty where the rows have theirs).

    Raises DataError where the folder has neither layout or a file cannot be read."""
    files = [("id", p) for p in sorted((folder / "dialogues/in-distribution/comment").glob("*.json"))]
    files += [("ood", p) for p in sorted((folder / "dialogues/out-of-distribution").glob("comment*.json"))]
    if {split for split, _ in files} == {"id", "ood"}:
        profiles = sorted(folder.glob("profiles/*/detailed_profiles/*.json"))
        return _rows_of(files), {p.stem: _load(p, dict) for p in profiles}
    files = [
        ("id", folder / "conversations-train-comment.json"),
        ("ood", folder / "conversations-OODtest-comment.json"),
    ]
    if all(p.is_file() for _, p in files):
        return _rows_of(files), {}
    raise DataError(
        f"{folder}: not MMRole; it needs dialogues/in-distribution/comment/*.json, dialogues/out-of-distribution/"
        "comment.json and profiles/, or conversations-train-comment.json and conversations-OODtest-comment.json"
    )


def _rows_of(files):
    return [(split, row) for split, path in files for row in _load(path, list)]


def _load(path, kind):
    value = parse(path.read_bytes(), path)
    if not isinstance(value, kind):
        raise DataError(f"{path}: must hold a JSON {'array of dialogues' if kind is list else 'object'}")
    return value


# ---------------------------------------------------------------------------------------------------- dialogues
@dataclass
class Dialogue:
    name: str
    image: str  # as the row names it, below the folder of the images
    source: str  # the path of the image, empty if it is not on disk
    character: str
    profile: str  # cut to fit into a prompt
    turns: list  # (is it the human, text), in turn, the human first


def read_dialogue(row, folder, profiles, profile_bytes):
    """A row of either layout -> Dialogue. DataError says why it is refused."""
    check_values(row, "the row")
    said = _spoken(row)
    turns = _checked_turns([(who in ("human", "user"), text) for who, text in said])
    names = {who for who, _ in said} - {"human", "user", "assistant"}
    character = row.get("character_role") or next(iter(names), None)
    if not isinstance(character, str) or names - {character}:
        raise DataError("unknown speaker or no text")
    profile = row.get("character_profile") or {}
    profile = profile.get(character) if isinstance(profile, dict) else None
    profile = profile or profiles.get(character.replace(" ", "_"))
    check_values(profile, "the profile")
    if not isinstance(profile, dict) or not short_profile(profile, 400):
        raise DataError("no profile of the character")
    if "<image>" in character + short_profile(profile, profile_bytes):  # would mark an image that is not there
        raise DataError("an <image> mark in the name or profile")
    image = image_name(row.get("image") or row.get("image_path") or "")
    source = first_file(folder / "images" / image, folder / image)
    return Dialogue(str(row.get("id")), image, source, character, short_profile(profile, profile_bytes), turns)


def _spoken(row):
    """-> [(speaker, text)]. The speaker is under 'from' or 'role': human, user, assistant or the character's name."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise DataError("not a dialogue")
    said = [(t.get("from") or t.get("role"), t.get("value", t.get("content")) or "") for t in turns]
    if not all(isinstance(who, str) and who and isinstance(text, str) for who, text in said):
        raise DataError("unknown speaker or no text")
    return [(who, text.replace("<image>", "").strip()) for who, text in said]


def _checked_turns(turns):
    """[(is it the human, text)] -> the same up to the last answer, if human and character speak in turn."""
    answered = [k for k, (human, text) in enumerate(turns) if not human and text]
    if not answered:
        raise DataError("no answer")
    turns = turns[: answered[-1] + 1]
    if not all(text for _, text in turns):
        raise DataError("empty turn")
    if not turns[0][0]:
        raise DataError("does not begin with the human")
    if any(a[0] == b[0] for a, b in zip(turns, turns[1:])):
        raise DataError("two turns of one speaker in a row")
    return turns


def short_profile(profile, limit):
    """The first three fields that there are, each cut at a word; together at most `limit` bytes of UTF-8."""
    fields = [(f, " ".join(str(profile.get(f) or "").split())) for f in PROFILE_FIELDS]
    fields, out = [(f, text) for f, text in fields if text][:3], []
    for k, (f, text) in enumerate(fields):
        left = limit - sum(len(t.encode()) + 1 for t in out)
        room = (
            left // (len(fields) - k) - len(f) - 3
        )  # what is left, shared by those to come, less 'Name: ' and line end
        if room > 20:
            out.append(f"{f.capitalize()}: {_cut(text, room)}")
    return "\n".join(out)


def _cut(text, size):
    """The longest beginning of at most `size` bytes that ends with a word."""
    cut = text.encode()[:size].decode(errors="ignore")
    if cut == text or text[len(cut)] == " ":
        return cut
    if max(cut[-1:], text[len(cut)]) >= "\u2e80":  # Chinese has no spaces: any character may be the last
        return cut
    return cut.rsplit(" ", 1)[0]


def usable_dialogues(folder, profile_bytes):
    """-> ({'id': Dialogues, 'ood': Dialogues}, Counter of the reasons for which the others were refused)."""
    rows, profiles = read_rows(folder)
    usable, refused, seen = {"id": [], "ood": []}, Counter(), set()
    for split, row in rows:
        try:
            dialogue = read_dialogue(row, folder, profiles, profile_bytes)
            key = (dialogue.character, dialogue.image, *dialogue.turns)
            if key in seen:  # else one of the two may be in a test, the other in training
                raise DataError("the same dialogue twice")
        except DataError as e:
            refused[f"{split}: {e}"] += 1
            continue
        seen.add(key)
        usable[split].append(dialogue)
    for split, name in (("id", "in"), ("ood", "out-of")):
        if not usable[split]:
            raise DataError(f"{folder}: no usable dialogue in the {name}-distribution part; refused: {dict(refused)}")
    return usable, refused


# ------------------------------------------------------------------------------------------------------ records
def whole(dialogue):
    """A Dialogue -> its record for stages 1 to 3: all turns, the profile before the first question."""
    first, *rest = (_message(*turn) for turn in dialogue.turns)
    first["content"] = "<image>" * bool(dialogue.source) + f"{dialogue.profile}\n{first['content']}"
    return _record(dialogue, dialogue.name, [first, *rest])


def answers(dialogue):
    """Yield a Dialogue's task records, one for each answer: what was said before is part of the question."""
    for k, (human, text) in enumerate(dialogue.turns):
        if human:
            continue
        *before, (_, question) = dialogue.turns[:k]
        so_far = "\n".join(f"{'User' if of_user else dialogue.character}: {said}" for of_user, said in before)
        asked = "\n".join(filter(None, [dialogue.profile, so_far, question]))
        messages = [_message(True, "<image>" * bool(dialogue.source) + asked), _message(False, text)]
        yield _record(dialogue, f"{dialogue.name}-{k}", messages)


def _message(human, text):
    return {"role": "user" if human else "assistant", "content": text}


def _record(dialogue, name, messages):
    who = dialogue.character
    system = {"role": "system", "content": f"Play the role of {who}."}
    images = [f"images/{dialogue.image}"] if dialogue.source else []
    return {"id": name, "images": images, "character": who, "messages": [system, *messages]}


def convert_mmrole(folder, out, profile_bytes=400, val=0):
    """Write the files that stand at the top of this file under `out`. -> what counts.json has.

    profile_bytes: longest profile in a prompt, in bytes of UTF-8. val: dialogues of the validation part. Raises
    DataError where it would leave no prompt, and as read_rows does."""
    out = Path(out)
    usable, refused = usable_dialogues(Path(folder), profile_bytes)
    random.Random(42).shuffle(usable["id"])
    n = len(usable["id"])
    demos, prompts, test = usable["id"][: n // 2], usable["id"][n // 2 : n * 9 // 10], usable["id"][n * 9 // 10 :]
    if val >= len(prompts):
        raise DataError(f"--val {val}: there are {len(prompts)} dialogues for RL, so none would be left; give fewer")
    prompts, held_out = prompts[: len(prompts) - val], prompts[len(prompts) - val :]
    pretraining = [whole(d) for d in demos + prompts]
    files = {"paired": [r for r in pretraining if r["images"]], "text": [r for r in pretraining if not r["images"]]}
    parts = {"task_demos": demos, "task_prompts": prompts, "task_id": test, "task_ood": usable["ood"]}
    parts |= {"task_val": held_out} if val else {}
    files |= {name: [record for d in part for record in answers(d)] for name, part in parts.items()}
    out.mkdir(parents=True, exist_ok=True)
    place_images({d.image: d.source for part in usable.values() for d in part if d.source}, out)
    return write_files(files, refused, out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m convert.mmrole", description="Convert MMRole to this project's records.", allow_abbrev=False
    )
    parser.add_argument("folder", help="folder of the data set, as published or preprocessed")
    parser.add_argument("--out", default="runs/real/data", help="folder to write (default: %(default)s)")
    profile_help = "longest profile in a prompt, bytes of UTF-8 (default: %(default)s)"
    parser.add_argument("--profile-bytes", type=int, default=400, help=profile_help)
    val_help = "dialogues of the RL prompts that are kept apart, to choose settings on (default: %(default)s)"
    parser.add_argument("--val", type=int, default=0, help=val_help)
    args = parser.parse_args(argv)
    if args.val < 0:
        parser.error(f"argument --val: {args.val} is too small, it must be at least 0")
    try:
        print(json.dumps(convert_mmrole(args.folder, args.out, args.profile_bytes, args.val), indent=1))
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
