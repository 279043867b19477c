"""Write the EMA weights of a training checkpoint as a .safetensors file, configuration and class names in its metadata.

python examples/digits/export.py results/000-DiT-Ti-1 dit.safetensors
"""

import argparse
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoints import load_weights, save_weights


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint file or run folder")
    parser.add_argument("output", help="file to write")
    args = parser.parse_args(argv)
    if Path(args.output).exists():
        parser.error(f"{args.output} exists already; give another name")
    try:
        save_weights(args.output, load_weights(args.checkpoint))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
