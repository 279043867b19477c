"""Train a DiT, or a network that reads captions, on images or on latents of extract_latents.py.

    python train.py --data-path imagenet/train                       # one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py --data-path imagenet/train  # the global batch stays 256
    torchrun --nproc_per_node=8 train.py --latents imagenet-latents --mixed-precision bf16 \\
      --compile --resume auto
    python train.py --data-path digits/train --num-classes 10 --no-flip --model DiT-Ti/1 \\
      --image-size 32 --vae examples/digits/vae
    python train.py --data-path captioned --model MMDiT-18/2 --process flow  # NAME.txt, NAME.png

Each run gets a folder results/NNN-MODEL with log.txt, metrics.jsonl and checkpoints/SSSSSSS.pt. The
same seed gives the same run on any number of processes and workers, up to float rounding; with
--resume auto the same command goes on where a run stopped, however it stopped. SIGTERM, SIGUSR1 and
Ctrl-C save a checkpoint first.
"""

from runtime.command_line import door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import sys

from data.images import center_crop_arr
from runtime.command_line import INTERRUPTED
from runtime.devices import tf32
from training.assembly import assemble
from training.flags import build_parser, read_options
from training.folder_lock import FolderLock
from training.run import carry_out
from training.run_log import RunEnded, RunInterrupted
from training.step import requires_grad, update_ema

# main, and what others import from here
__all__ = ["center_crop_arr", "main", "requires_grad", "update_ema"]


@door("--global-batch-size, or raise --grad-accum")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    args = parser.parse_args(argv)
    with parser.refusing():
        options = read_options(args, parser.given(argv))
    with FolderLock() as lock, tf32(options.tf32):
        with parser.refusing():
            job = assemble(options, lock, parser.worded)
        try:
            carry_out(job)
        except RunEnded as ended:
            sys.exit(1 if ended.told else f"{parser.prog}: error: {parser.worded(str(ended))}")
        except RunInterrupted:
            sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
