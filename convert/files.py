"""What every converter of a data set does at its end: images beside the records, files of records, their counts."""

import json
import os
import shutil

from records import DataError


def image_name(name):
    """An image as a row names it -> its path below the data set's folder; '' without one. DataError says why not."""
    if not isinstance(name, str):
        raise DataError("the image is no path")
    name = os.path.normpath(name) if name else ""
    if os.path.isabs(name) or name.split(os.sep)[0] == "..":
        raise DataError("the image lies outside the folder")
    return name


def first_file(*paths):
    """-> the first of these paths that is a file, as text; '' if none is."""
    return next((str(p) for p in paths if os.path.isfile(p)), "")  # False for names too long


def place_images(sources, out):
    """Link or copy images into out/images, where their records look for them. sources: {name below images: path}."""
    for image, source in sources.items():
        target = out / "images" / image
        if target.exists() and os.path.samefile(source, target):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(source), target)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(source, target)


def write_files(files, refused, out):
    """Write {name: records} as out/NAME.jsonl, and out/counts.json with how many there are and the reasons `refused`
    (a Counter). -> what counts.json has."""
    counts = {"refused": refused}
    for name, records in files.items():
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = {"records": len(records), "with image": sum(bool(r["images"]) for r in records)}
    (out / "counts.json").write_text(json.dumps(counts, indent=1))
    return counts
