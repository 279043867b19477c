"""Train a DiT on a folder of images, or on latents that extract_latents.py cached.

    python train.py --data-path imagenet/train                               # one process, CPU or GPU
    torchrun --nproc_per_node=8 train.py --data-path imagenet/train          # eight; the global batch stays 256
    torchrun --nproc_per_node=8 train.py --latents imagenet-latents --mixed-precision bf16 --compile --resume auto
    python train.py --data-path digits/train --num-classes 10 --no-flip --model DiT-Ti/1 --image-size 32 \
      --vae examples/digits/vae

Each run gets a folder results/NNN-MODEL with log.txt, metrics.jsonl and checkpoints/SSSSSSS.pt. The
same seed gives the same run on any number of processes and workers, up to float rounding; with
--resume auto the same command goes on where a run stopped, however it stopped. SIGTERM, SIGUSR1 and
Ctrl-C save a checkpoint first.
"""

from runtime.command_line import door, end_at_interrupt, why_lost

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import signal
import sys

from data.images import center_crop_arr
from data.loader import LoaderFailed, explained
from runtime.devices import tf32
from training.flags import build_parser
from training.folder_lock import FolderLock
from training.job import introduce, prepare
from training.loop import train
from training.records import leave
from training.run_log import StopSignals
from training.step import requires_grad, update_ema

# main, and what others import from here
__all__ = ["center_crop_arr", "main", "requires_grad", "update_ema"]


@door("--global-batch-size, or raise --grad-accum")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    args = parser.parse_args(argv)
    with FolderLock() as lock, tf32(args.tf32):
        with parser.refusing():
            job = prepare(args, lock)
        introduce(job, lock)
        try:
            with StopSignals() as signals:
                train(job, signals)
        except (LoaderFailed, RuntimeError) as error:  # torch tells of a lost worker wherever the program is
            failure = explained(error) if type(error) is RuntimeError else error
            if not isinstance(failure, LoaderFailed):
                first = (str(error).splitlines() or [""])[0]
                job.log(
                    f"stopped after step {job.state.step} by an error: {why_lost(error) or first}"
                )
                raise
            leave(job, f"{failure}; --resume auto goes on from the last checkpoint")
        except KeyboardInterrupt:
            job.log(
                f"interrupted after step {job.state.step}, not saved; --resume auto goes on from the last checkpoint"
            )
            sys.exit(128 + signal.SIGINT)
        finally:
            job.log.close()
        job.accelerator.end_training()
        if signals.received == signal.SIGINT:
            sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
