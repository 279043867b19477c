"""Fetch the released checkpoints, DiT-XL/2 and SiT-XL/2.

    python download.py                         # both of DiT-XL/2
    python download.py DiT-XL-2-256x256.pt     # one
    python download.py SiT-XL/2                # the flow

A download that breaks off is taken up where it stopped. A file gets its name only when its length
is the one announced and every part of it passes the archive's own CRC-32; before, it is called
NAME.partial.
"""

from runtime.command_line import Parser, door, end_at_interrupt, one_line, reason

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import sys

from checkpoints.choice import MODEL
from checkpoints.released import (
    FOLDER, RELEASED, download_model, find_model, pretrained_models,
)  # fmt: skip

# main, and what others import from here
__all__ = ["download_model", "find_model", "main", "pretrained_models"]


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    released = ", ".join(RELEASED)
    models = dict.fromkeys(entry.model for entry in RELEASED.values())
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help=f"{released}, or {' or '.join(models)} for all of it (default: {MODEL})",
    )  # fmt: skip
    parser.add_argument("--folder", default=FOLDER, help="where to put them (default: %(default)s)")
    return parser


@door(resumes=True)
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    wanted = []
    for model in args.models or [MODEL]:
        names = [name for name, entry in RELEASED.items() if model in (name, entry.model)]
        if not names:
            parser.error(f"nothing was released as {model!r}; there are {', '.join(RELEASED)}")
        wanted += names
    for name in dict.fromkeys(wanted):
        try:
            print(download_model(name, args.folder))
        except (ValueError, OSError) as error:
            sys.exit(f"{parser.prog}: error: {one_line(reason(error))}")


if __name__ == "__main__":
    main()
