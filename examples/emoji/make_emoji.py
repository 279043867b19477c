"""Write colour emoji as a data set: folders by group, and captions.

    python examples/emoji/make_emoji.py --output emoji

npm's client fetches three sets of drawings and Unicode's names, 16 MB, into DIR/packages. DIR/train
and DIR/heldout get 64×64 PNGs on white in a folder for each of a dozen groups; heldout has a fifth
of all emoji, every drawing of them. DIR/words is for training with captions: train's drawings,
those of one main colour once more in others ("a purple cow"), and the shapes of examples/shapes.
Left out of it are two colours each of hearts, circles and squares, and an eighth of recoloured
drawings.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "shapes"), str(EXAMPLES / "emoji")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import random
import zlib

import numpy as np

from colours import TURNED, main_colour, main_hue, name_of, turned
from drawing import COLOURS, UNSEEN, with_article
from make_shapes import shape_images, write_images
from runtime.disk import write_whole
from sources import (
    SETS, VERSIONS, all_emoji, as_laid_out, fetch, on_white, read_json, rasterised,
)  # fmt: skip

NOTICE = "NOTICE.txt"
TURNED_GROUPS = ("faces", "animals", "plants", "food", "places", "transport", "sky", "things")
TURNS = 3  # colours that a drawing is also made in
LEFT_OUT = 8  # one (name, colour) of so many is never made
# What the demo asks for, to show what was never seen.
SHOWN = frozenset({
    ("strawberry", "blue"), ("pear", "purple"), ("unicorn", "red"), ("mushroom", "blue"),
    ("fox", "purple"), ("crown", "red"),
})  # fmt: skip
NO_ARTICLE = ("flags", "symbols")
# Name of an emoji → (shape, colour), of those shapes that emoji have in all nine colours.
PAIRS = {
    f"{colour} {size}{shape}": (shape, colour)
    for shape in ("heart", "circle", "square") for colour in COLOURS for size in ("", "large ")
}  # fmt: skip


def part_of(emoji):
    """"train" or "heldout"."""
    pair = PAIRS.get(emoji.name)
    held_out = emoji.held_out if pair is None else pair in UNSEEN
    return "heldout" if held_out else "train"


def plain(name):
    """A name without the colours in it."""
    return " ".join(word for word in name.split() if word not in COLOURS)


def captions_of(emoji, style, colour):
    """What can be said of a drawing, its name first; `colour` is its main colour's name or None."""
    name, keywords = emoji.name, " ".join(emoji.keywords[:3])
    found = [name if emoji.group in NO_ARTICLE else with_article(name), f"{name}, {style}"]
    if keywords:
        found.append(keywords)
    if colour and emoji.group not in NO_ARTICLE and not set(name.split()) & set(COLOURS):
        found.append(with_article(f"{colour} {name}"))
    return found


def is_left_out(name, colour):
    """Whether a thing is never made in a colour."""
    return (name, colour) in SHOWN or zlib.crc32(f"{name} {colour}".encode()) % LEFT_OUT == 0


def file_name(emoji, style, colour=""):
    """The name of a drawing's file, below DIR/train or so."""
    words = "".join(c if c.isalnum() else "-" for c in emoji.name)
    return f"{emoji.group}/{words}-{emoji.code}-{style}{colour and '-' + colour}.png"


def drawings(emoji):
    """(its set's name, RGBA image) of each of an Emoji's drawings.

    Raises ValueError if one is no SVG.
    """
    for style, svg in emoji.drawings.items():
        try:
            yield style, rasterised(svg, SETS[style][1])
        except ValueError as error:
            package = SETS[style][0]
            raise ValueError(
                f"{emoji.name} of {package} cannot be drawn ({error}); remove the archive of "
                f"{package}, and it is fetched again"
            ) from None


def colour_of(image, hue):
    """The name of the main colour of an RGBA drawing that has one."""
    return None if hue is None else name_of(main_colour(np.asarray(on_white(image))))


def other_colours(emoji, style, image, hue, colour):
    """A drawing in other colours: (name, image, captions) of each."""
    name = plain(emoji.name)
    if hue is None or emoji.group not in TURNED_GROUPS or not name:
        return
    chance = random.Random(f"{emoji.code} {style}")
    others = [c for c in TURNED if c != colour and c not in emoji.name.split()]
    for other in chance.sample(others, TURNS):
        if not is_left_out(name, other):
            words = f"{other} {name}"
            captions = [with_article(words), words, f"{words}, {style}"]
            yield file_name(emoji, style, other), on_white(turned(image, hue, other)), captions


def all_images(emojis):
    """{"train", "heldout" or "words": [(file's name, image, captions)]}."""
    found = {"train": [], "heldout": [], "words": []}
    for emoji in emojis:
        part = part_of(emoji)
        for style, image in drawings(emoji):
            hue = main_hue(image)
            colour = colour_of(image, hue)
            captions = captions_of(emoji, style, colour)
            row = (file_name(emoji, style), on_white(image), captions)
            found[part].append(row)
            if part == "train":
                found["words"] += [row, *other_colours(emoji, style, image, hue, colour)]
    found["words"] += [(f"shapes/{name}", *rest) for name, *rest in shape_images(copies=1)]
    return found


def write_notice(folder, packages):
    """Say in NOTICE.txt whose the drawings are, and under which licences, unless it is there.

    Raises ValueError for packages that are damaged, or laid out in another way.
    """
    lines = ["The drawings in this folder, and the licences that they are under:\n"]
    for package, _ in SETS.values():
        info = read_json(packages, package, "info.json")
        with as_laid_out(packages):
            licence, author = info["license"], info["author"]
            lines.append(
                f"{info['name']} by {author['name']} ({author['url']}), {licence['title']} "
                f"({licence['url']}); package {package} {VERSIONS[package]}\n"
            )
    lines.append("They were rasterised, and some of them put in other colours.\n")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NOTICE).exists():
        text = "".join(lines)
        write_whole(folder / NOTICE, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def build_parser():
    parser = Parser(__file__, description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("emoji"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--packages", type=Path, help="folder that has npm's packages (default: DIR/packages)"
    )
    return parser


@door(resumes=True)
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    packages = args.packages or args.output / "packages"
    with parser.refusing():
        fetch(packages)
        emojis = all_emoji(packages)
        write_notice(args.output, packages)  # first, as drawing is long, and the disk may refuse
        found = all_images(emojis)
    for part, images in found.items():
        write_images(args.output / part, images)
        print(f"{len(images)} images in {args.output / part}", flush=True)


if __name__ == "__main__":
    main()
