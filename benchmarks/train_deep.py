"""train.py with one model more, DiT-Deep/1: DiT-Ti/1 with twelve blocks, to try on it what leaves
blocks out. Flags are train.py's.

    python -m benchmarks.train_deep --model DiT-Deep/1 --data-path digits/train ...

No model of train.py is as deep and as small: this one learns digits in an hour on a CPU core.
docs/dynamic.md has the whole command.
"""

from functools import partial
from unittest.mock import patch

from models import SIZES, DiT, DiT_models
import train

NAME = "DiT-Deep/1"
DEEP = partial(DiT, patch_size=1, **SIZES["Ti"] | {"depth": 12})


def build_parser():
    with patch.dict(DiT_models, {NAME: DEEP}):
        return train.build_parser()


def main(argv=None):
    with patch.dict(DiT_models, {NAME: DEEP}):
        train.main(argv)


if __name__ == "__main__":
    main()
