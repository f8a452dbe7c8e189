"""WikiWeb2M, pages of Wikipedia with links to their pictures -> a list of addresses and captions for img2dataset.

    python -m convert.wikiweb2m wikiweb2m-train.tfrecord.gz-00000-of-00005 --limit 75000 --out wikiweb2m.tsv
    img2dataset --url_list wikiweb2m.tsv --input_format tsv --url_col url --caption_col caption --output_format files \\
        --output_folder wikiweb2m --image_size 420 --resize_mode keep_ratio
    python -m convert.captions wikiweb2m

A file of the data set (github.com/google-research-datasets/wit, wikiweb2m.md) is a TFRecord under gzip. Each record is
a page, a tf.train.SequenceExample. It has lists with an entry for each section; an entry holds a value for each picture
of the section. Of them section_image_url, section_image_mime_type and section_image_clean_ref_desc are read; the last
is what the data set's authors have as the target of their task of captioning. A picture without one is left out, and so
is what is neither JPEG nor PNG, and an address that has stood before. Neither TensorFlow nor protobuf is needed.
"""

import argparse
import csv
import gzip
import zlib

from records import DataError

URL, KIND, CAPTION = (f"section_image_{name}" for name in ("url", "mime_type", "clean_ref_desc"))
KINDS = ("image/jpeg", "image/png")


def pages(path):
    """Yield each record of a TFRecord file: 8 bytes of length, 4 of checksum, the record, 4 of checksum. (gzip has a
    checksum of its own.) DataError where the file is torn, or not there."""
    try:
        with gzip.open(path) as f:
            while head := f.read(12):
                size = int.from_bytes(head[:8], "little")
                page = f.read(size + 4)
                if len(page) < size + 4:
                    raise EOFError("a record ends too early")
                yield page[:size]
    except (EOFError, OSError, OverflowError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e}); fetch it again") from None


def varint(data, at):
    """A whole number of protobuf's: seven bits a byte, the lowest first, the eighth says that more follow."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields(data):
    """Yield (number, bytes) of each field of a protobuf message that has a length; others are passed over."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            _, at = varint(data, at)
        elif key & 7 == 2:
            size, at = varint(data, at)
            yield key >> 3, data[at : at + size]
            at += size
        else:  # a float has 4 bytes, a double 8
            at += 4 if key & 7 == 5 else 8


def part(data, number):
    """-> all fields of this number."""
    return [value for n, value in fields(data) if n == number]


def columns(page, names):
    """A SequenceExample -> {name: [[text, ...] of each section]} of its lists of texts with these names."""
    found = dict.fromkeys(names, [])
    for entry in (entry for lists in part(page, 2) for entry in part(lists, 1)):
        name = str(part(entry, 1)[0], "utf-8")
        if name in names:
            sections = [section for values in part(entry, 2) for section in part(values, 1)]
            found[name] = [[str(text, "utf-8") for texts in part(s, 1) for text in part(texts, 1)] for s in sections]
    return found


def captions(page):
    """Yield (address, caption) of a page's pictures. A section whose lists differ in length is passed over."""
    found = columns(page, (URL, KIND, CAPTION))
    for urls, kinds, texts in zip(found[URL], found[KIND], found[CAPTION]):
        if len(urls) == len(kinds) == len(texts):
            for url, kind, text in zip(urls, kinds, texts):
                if kind in KINDS and url and text.strip():
                    yield url, " ".join(text.split())


def rows(paths):
    """Yield (address, caption) of all pictures in these files."""
    for path in paths:
        for page in pages(path):
            try:
                yield from captions(page)
            except (IndexError, UnicodeDecodeError):
                raise DataError(
                    f"{path}: its records are no pages of WikiWeb2M; give wikiweb2m-*.tfrecord.gz"
                ) from None


def convert_wikiweb2m(paths, out, limit=0):
    """Write OUT, tab-separated with a head line -> how many rows. limit: at most so many; 0: all."""
    seen = set()
    with open(out, "w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, delimiter="\t", lineterminator="\n")
        table.writerow(("url", "caption"))
        for url, text in rows(paths):
            if url not in seen:
                seen.add(url)
                table.writerow((url, text))
                if len(seen) == limit:
                    break
    if not seen:
        raise DataError(f"{paths[0]}: no picture with a caption; give files such as wikiweb2m-val.tfrecord.gz")
    return len(seen)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m convert.wikiweb2m", description="List WikiWeb2M's pictures.", allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", help="wikiweb2m-*.tfrecord.gz*")
    parser.add_argument("--out", required=True, help="the list, for img2dataset")
    parser.add_argument("--limit", type=int, default=0, help="at most so many pictures; 0: all (default)")
    args = parser.parse_args(argv)
    try:
        print(f"{args.out}: {convert_wikiweb2m(args.files, args.out, args.limit)} pictures")
    except (DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
