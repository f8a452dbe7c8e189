"""Images with captions, as img2dataset leaves them -> records beside them (CC12M, CC3M, SBU and their like).

    img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption --output_format files \\
        --output_folder cc12m --image_size 420 --resize_mode keep_ratio
    python -m convert.captions cc12m

FOLDER holds 00000/000000000.jpg with the caption in 00000/000000000.txt, and so on, at any depth. Written:

    FOLDER/paired.jsonl    {"id": "000000000", "image": "00000/000000000.jpg", "caption": "..."}, by the image's path

An image without a caption is left out and counted. Pictures are not opened: a stage does that, and refuses a torn one.
"""

import argparse
import json
import os
from pathlib import Path

from records import ROW_BYTES, DataError

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


def caption_of(image):
    """-> the text beside an image. DataError says why there is none."""
    try:
        with open(image.with_suffix(".txt"), "rb") as f:
            text = str(f.read(ROW_BYTES), "utf-8-sig").strip()
    except FileNotFoundError:
        raise DataError("no caption") from None
    except UnicodeDecodeError:
        raise DataError("a caption that is not UTF-8") from None
    if not text:
        raise DataError("an empty caption")
    return text


def convert_captions(folder):
    """Write FOLDER/paired.jsonl -> {"records": how many, "refused": {reason: how many}}. No row is kept in memory."""
    folder, count, refused = Path(folder), 0, {}
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the output folder of img2dataset")
    new = folder / "paired.jsonl.new"
    with open(new, "w", encoding="utf-8") as f:
        for root, folders, names in os.walk(folder):
            folders.sort()
            for image in (Path(root) / name for name in sorted(names)):
                if image.suffix.lower() not in IMAGES:
                    continue
                try:
                    row = {
                        "id": image.stem,
                        "image": image.relative_to(folder).as_posix(),
                        "caption": caption_of(image),
                    }
                except DataError as e:
                    refused[str(e)] = refused.get(str(e), 0) + 1
                    continue
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    if not count:
        new.unlink()
        raise DataError(f"{folder}: no image with a caption beside it (x.jpg and x.txt); refused: {refused}")
    os.replace(new, folder / "paired.jsonl")
    return {"records": count, "refused": refused}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m convert.captions", description="Write records of images with captions.", allow_abbrev=False
    )
    parser.add_argument("folder", help="output folder of img2dataset, with --output_format files")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(convert_captions(args.folder), indent=1))
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
