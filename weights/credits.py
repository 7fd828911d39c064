"""Who took the photographs that the weights were trained on, and what their licences say, from the manifest beside them.

    python weights/credits.py DIR/free_manifest.tsv > weights/CREDITS.md

A manifest has a line a picture, cells with tabs between, and names its columns in the first line: split, source, path, licence,
author and link are read, of the pictures whose split is "train".
"""
import csv
import sys
from collections import Counter
from itertools import groupby

COLUMNS = ("split", "source", "path", "licence", "author", "link")


def read(path):
    """The training rows of a manifest, each a dict of COLUMNS. Raises SystemExit with one line if it is none, or a row lacks a licence."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"credits.py: cannot read {path}: {e}")
    if missing := [c for c in COLUMNS if not rows or c not in rows[0]]:
        sys.exit(f"credits.py: {path} has no column {', '.join(missing)}: it is no manifest of photographs")
    rows = [{c: (row[c] or "").strip() for c in COLUMNS} for row in rows if row["split"] == "train"]
    if unknown := [row["path"] for row in rows if not row["licence"]]:
        sys.exit(f"credits.py: {path} says no licence for {unknown[0]}, and {len(unknown)} pictures in all")
    return rows


def credits(rows):
    """The rows of a manifest as Markdown: a table of sources, and by name whoever a licence (CC BY) asks to be named, picture by picture."""
    lines = ["# The photographs behind the weights", "",
             f"{len(rows)} squares of photographs, each of which anyone may use, the weights' training included. Made by `python weights/credits.py`; source is a repository at a commit.", "",
             "| licence | source | pictures |", "|---|---|---|"]
    count = Counter((row["licence"], row["source"]) for row in rows)
    lines += [f"| {licence} | {source} | {n} |" for (licence, source), n in sorted(count.items())]
    lines += ["", "## Attribution", "", "What CC BY asks for. The squares were cut from these, made smaller, and not published."]
    named = sorted((row for row in rows if row["licence"].startswith("CC-BY")), key=lambda r: (r["source"], r["licence"], r["author"], r["path"]))
    for (source, licence), group in groupby(named, key=lambda r: (r["source"], r["licence"])):
        lines += ["", f"**{source}**, {licence}", ""]
        for author, theirs in groupby(group, key=lambda r: r["author"]):
            names = [f"[{row['path']}]({row['link']})" if row["link"].startswith("https://") else row["path"] for row in theirs]
            lines.append(f"- {author or 'its authors'}: {', '.join(dict.fromkeys(names))}")
    others = sorted({row["author"] for row in rows if row["author"] and not row["licence"].startswith("CC-BY")})
    return "\n".join([*lines, "", "## Thanks", "", f"No licence asks for it: {', '.join(others)}.", ""])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.reconfigure(encoding="utf-8")
    print(credits(read(sys.argv[1])), end="")
