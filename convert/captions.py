"""Images with captions -> records beside them: a folder of img2dataset's (CC12M, CC3M, SBU and their like), or N24News.

    img2dataset --url_list cc12m.tsv --input_format tsv --url_col url --caption_col caption --output_format files \\
        --output_folder cc12m --image_size 420 --resize_mode keep_ratio
    python -m convert.captions cc12m
    python -m convert.captions N24News --form n24news

The form `img2dataset`: FOLDER holds 00000/000000000.jpg with the caption in 00000/000000000.txt, and so on, at any
depth. The form `n24news`: FOLDER is its authors' archive (github.com/billywzh717/N24News), unpacked. It holds
news/nytimes_dataset.json, a list of {"image_id", "caption", "headline", "section", ...}, and imgs/IMAGE_ID.jpg.
Written:

    FOLDER/paired.jsonl    {"id": "000000000", "image": "00000/000000000.jpg", "caption": "..."}, in that order

An image without a caption, or a caption without an image, is left out and counted. Pictures are not opened: a stage
does that, and refuses a torn one.
"""

import argparse
import html
import json
import os
from functools import partial
from pathlib import Path

from records import ROW_BYTES, DataError

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
NEWS = "news/nytimes_dataset.json"


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


def img2dataset(folder):
    """Yield (image, function that gives its caption) for each image, by its path."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for image in (Path(root) / name for name in sorted(names)):
            if image.suffix.lower() in IMAGES:
                yield image, caption_of


def n24news(folder):
    """Yield (image, function that gives its caption) for each article, in the order of the file."""
    try:
        articles = json.loads((folder / NEWS).read_text(encoding="utf-8"))
        images = [folder / "imgs" / f"{article['image_id']}.jpg" for article in articles]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise DataError(f"{folder / NEWS}: cannot be read ({e}); unpack the archive of N24News into {folder}") from None
    for image, article in zip(images, articles):
        yield image, partial(caption_in, article)


def caption_in(article, image):
    """-> the caption of an article, in which HTML's names of characters occur (&rsquo;). DataError as above."""
    if not image.is_file():
        raise DataError("no image")
    text = html.unescape(article.get("caption") or "").strip()
    if not text:
        raise DataError("an empty caption")
    return text


FORMS = {"img2dataset": img2dataset, "n24news": n24news}


def convert_captions(folder, form="img2dataset"):
    """Write FOLDER/paired.jsonl -> {"records": how many, "refused": {reason: how many}}. No row is kept in memory."""
    folder, count, refused = Path(folder), 0, {}
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the output folder of img2dataset, or N24News unpacked")
    new = folder / "paired.jsonl.new"
    with open(new, "w", encoding="utf-8") as f:
        for image, caption in FORMS[form](folder):
            try:
                text = caption(image)
            except DataError as e:
                refused[str(e)] = refused.get(str(e), 0) + 1
                continue
            row = {"id": image.stem, "image": image.relative_to(folder).as_posix(), "caption": text}
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
    parser.add_argument("folder", help="output folder of img2dataset with --output_format files, or N24News unpacked")
    parser.add_argument("--form", choices=FORMS, default="img2dataset", help="what it is (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(convert_captions(args.folder, args.form), indent=1))
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
