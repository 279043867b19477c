"""A few emoji in the form of npm's packages, for examples/emoji without a network."""

import io
import json
import sys
import tarfile

from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "emoji"))

from sources import NAMES, archive

SUBGROUPS = {  # of Unicode's, one for each of our groups, and what a name there begins with
    "face-smiling": "smiling face", "person-role": "cook", "hands": "clapping hands",
    "animal-mammal": "cow", "food-fruit": "pear", "food-sweet": "cake", "place-building": "house",
    "transport-ground": "bus", "sky-weather": "sun", "country-flag": "flag: land", "tool": "hammer",
}  # fmt: skip
COLOURS = {
    "red": "#dd2e44", "orange": "#f4900c", "yellow": "#fdcb58", "green": "#78b159",
    "blue": "#55acee", "purple": "#aa8ed6", "brown": "#824a32", "black": "#31373d",
    "white": "#e6e7e8",
}  # fmt: skip
EACH = 8  # emoji of a subgroup
SIZES = {"noto": 128, "fluent-emoji-flat": 32, "twemoji": 36}


def rows():
    """(subgroup, name, colour) of each emoji."""
    colours = list(COLOURS)
    for subgroup, name in SUBGROUPS.items():
        for i in range(EACH):
            yield subgroup, f"{name} {'abcdefgh'[i]}", colours[i % 6]
    for colour in COLOURS:
        yield "heart", f"{colour} heart", colour
        yield "geometric", f"{colour} circle", colour
        yield "geometric", f"{colour} square", colour
    yield "skin-tone", "light skin tone", "brown"


def drawing(name, colour, side):
    """The inside of an SVG of side × side."""
    middle, fill = side / 2, COLOURS[colour]
    if name.endswith("square"):
        at, length = side / 8, side * 3 / 4
        return f'<rect x="{at}" y="{at}" width="{length}" height="{length}" fill="{fill}"/>'
    eye = f'<circle cx="{middle}" cy="{middle}" r="{side / 10}" fill="#ffffff"/>'
    shape = f'<circle cx="{middle}" cy="{middle}" r="{side * 0.4}" fill="{fill}"/>'
    return shape if name.endswith(("circle", "heart")) else shape + eye


def pack(path, files):
    """Write {name: contents as JSON} as npm packs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, contents in files.items():
            data = json.dumps(contents).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_packages(folder):
    """Write the four packages into a folder."""
    emojis = [(f"1F{i + 0x300:03X}", *row) for i, row in enumerate(rows())]
    subgroups = sorted({subgroup for _, subgroup, _, _ in emojis})
    data = [
        dict(hexcode=code, label=name.title(), tags=["tag", name.split()[0]], order=i, group=0,
             subgroup=subgroups.index(subgroup))
        for i, (code, subgroup, name, _) in enumerate(emojis)
    ]  # fmt: skip
    data.append(dict(hexcode="1F1E6", label="regional indicator A"))
    pack(
        archive(folder, NAMES),
        {
            "en/data.json": data[::-1],
            "meta/groups.json": {"subgroups": {str(i): one for i, one in enumerate(subgroups)}},
        },
    )
    for prefix, side in SIZES.items():
        icons = {
            name.replace(" ", "-"): {"body": drawing(name, colour, side)}
            for _, subgroup, name, colour in emojis
            if prefix != "fluent-emoji-flat" or subgroup != "country-flag"
        }
        pack(
            archive(folder, f"@iconify-json/{prefix}"),
            {
                "icons.json": {"prefix": prefix, "icons": icons, "width": side, "height": side},
                "chars.json": {code.lower(): name.replace(" ", "-") for code, _, name, _ in emojis},
                "info.json": {
                    "name": prefix, "author": {"name": "Somebody", "url": "https://example.org"},
                    "license": {"title": "Some licence", "url": "https://example.org/licence"},
                },
            },
        )  # fmt: skip
