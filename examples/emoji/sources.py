"""Emoji as Unicode names and groups them, and as three sets draw them; from packages of npm."""

from contextlib import contextmanager
from dataclasses import dataclass, field
import json
import io
import re
import shutil
import subprocess
import tarfile
import zlib

from PIL import Image

from runtime.surroundings import is_installed

SIDE = 64
# Set → (npm's package, how large its drawings are made: Twemoji's have no margin).
SETS = {
    "noto": ("@iconify-json/noto", 64), "fluent": ("@iconify-json/fluent-emoji-flat", 64),
    "twemoji": ("@iconify-json/twemoji", 56),
}  # fmt: skip
NAMES = "emojibase-data"  # Unicode's names, keywords and groups
VERSIONS = {
    "@iconify-json/noto": "1.2.9", "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5", NAMES: "17.0.0",
}  # fmt: skip
# Folder → the beginnings of Unicode's subgroups that are in it; the first that fits counts.
GROUPS = {
    "faces": ("face-", "cat-face", "monkey-face"),
    "people": ("person", "family"),
    "hands": ("hand", "body-parts"),
    "animals": ("animal-",),
    "plants": ("plant-", "food-fruit", "food-vegetable"),
    "food": ("food-", "drink", "dishware"),
    "places": ("place-", "hotel"),
    "transport": ("transport-ground", "transport-water", "transport-air"),
    "sky": ("sky-weather",),
    "flags": ("flag", "country-flag", "subdivision-flag"),
    "symbols": (
        "heart", "emotion", "warning", "arrow", "religion", "zodiac", "av-symbol", "gender",
        "math", "punctuation", "currency", "other-symbol", "keycap", "alphanum", "geometric",
        "transport-sign",
    ),
    "things": ("",),  # the rest: objects, activities, clocks
}  # fmt: skip
CODE = re.compile(r"[0-9a-f]+(-[0-9a-f]+)*")  # it becomes part of a file's name
SHARES = 5  # one emoji in so many is held out


@dataclass(frozen=True)
class Emoji:
    """One of Unicode's emoji: `code` in hexadecimal, its name and keywords, the folder it is in,
    and its drawings as SVG, {set: text}.
    """

    code: str
    name: str
    keywords: tuple[str, ...]
    group: str
    drawings: dict[str, str] = field(repr=False)

    @property
    def held_out(self) -> bool:
        """Whether it is in the fixed fifth that nothing is trained on."""
        return zlib.crc32(self.code.encode()) % SHARES == 0


def fetch(folder):
    """Have npm's client download what of the packages is not in the folder yet.

    Raises ValueError if there is no npm, or if it fails, or nothing to draw with.
    """
    if not is_installed("resvg_py"):
        raise ValueError(
            "emoji are drawn with resvg-py, which is not installed; pip install .[emoji]"
        )
    missing = [
        f"{name}@{version}" for name, version in VERSIONS.items()
        if not archive(folder, name).exists()
    ]  # fmt: skip
    if not missing:
        return
    if shutil.which("npm") is None:
        raise ValueError(
            f"npm is not installed, and {', '.join(missing)} is not in {folder}; install Node.js "
            f"(apt install npm), or put there what `npm pack {missing[0]}` makes"
        )
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "pack", "--silent", *missing], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        reason = done.stderr.strip()[-300:] or "no reason given"
        raise ValueError(f"npm pack {' '.join(missing)} failed: {reason}")


def archive(folder, package):
    """Where npm's client puts a package."""
    return folder / f"{package.removeprefix('@').replace('/', '-')}-{VERSIONS[package]}.tgz"


def read_json(folder, package, name):
    """A JSON file of a package. Raises ValueError if the archive is damaged."""
    path = archive(folder, package)
    try:
        with tarfile.open(path) as files:
            return json.load(files.extractfile(f"package/{name}"))
    except (tarfile.TarError, EOFError, KeyError, ValueError, AttributeError, OSError,
            zlib.error) as error:  # fmt: skip
        if getattr(error, "errno", None):  # the disk's answer, not that of what unpacks
            raise
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and it is fetched again"
        ) from None


@contextmanager
def as_laid_out(folder):
    """Within it, a ValueError is raised if packages in the folder lack what they had when this was
    written.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        versions = ", ".join(f"{name}@{version}" for name, version in VERSIONS.items())
        raise ValueError(
            f"the packages in {folder} are not laid out as {versions} are ({error!r}); remove "
            "them, and they are fetched again"
        ) from None


def group_of(subgroup):
    """The folder for one of Unicode's subgroups."""
    return next(name for name, begins in GROUPS.items() if subgroup.startswith(begins))


def svg_of(icons, name):
    """An icon of a set as SVG, or None where it is a mere alias."""
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )


def all_emoji(folder):
    """Every Emoji that Unicode puts in a group and a set has drawn, without skin tones, in
    Unicode's order.

    Raises ValueError for packages that are damaged, or laid out in another way.
    """
    with as_laid_out(folder):
        return [emoji for _, emoji in sorted(_numbered(folder), key=lambda pair: pair[0])]


def _numbered(folder):
    """Yields (its place in Unicode's order, Emoji) of each."""
    sets = {}
    for name, (package, _) in SETS.items():
        icons = read_json(folder, package, "icons.json")
        sets[name] = icons, read_json(folder, package, "chars.json")
    subgroups = read_json(folder, NAMES, "meta/groups.json")["subgroups"]
    for row in read_json(folder, NAMES, "en/data.json"):
        subgroup = subgroups.get(str(row.get("subgroup")))
        if subgroup is None or subgroup in ("skin-tone", "hair-style"):
            continue
        code = row["hexcode"].lower()
        if not CODE.fullmatch(code):
            raise ValueError(
                f"{archive(folder, NAMES)} has an emoji with the code {code!r}, and codes are "
                "hexadecimal; remove it, and it is fetched again"
            )
        drawings = {}
        for name, (icons, characters) in sets.items():
            icon = characters.get(code) or characters.get(code.replace("-fe0f", ""))
            if icon and (svg := svg_of(icons, icon)):
                drawings[name] = svg
        if drawings:
            keywords = tuple(row.get("tags", ()))
            emoji = Emoji(code, row["label"].lower(), keywords, group_of(subgroup), drawings)
            yield row["order"], emoji


def rasterised(svg, side):
    """An SVG as an RGBA image of SIDE × SIDE, itself `side` wide, in the middle."""
    import resvg_py

    png = bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    )
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    whole = Image.new("RGBA", (SIDE, SIDE))
    whole.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return whole


def on_white(image):
    """An RGBA image as RGB on white."""
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
