"""The diffusion process alone, its coefficients in one tensor on the device, against NumPy tables
looked up at each use.

    python -m benchmarks.process

One reverse step and one training loss with a network that does nothing, on a batch of 8 × 4×32×32.
The other sides have the same formulas; but each coefficient is fetched from its float64 table where
it is used: the table is copied to the device, indexed and cast; in "looked up and spread", as is
usual where schedule tables live in NumPy, also made a tensor of the batch's shape.
"""

import argparse
from functools import partial

import torch

from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from diffusion import SpacedDiffusion, create_diffusion, space_timesteps
from diffusion.gaussian_diffusion import Coefficients

SHAPE, STEPS = (8, 4, 32, 32), 250


class LookedUp(SpacedDiffusion):
    """The process with its tables in NumPy."""

    spread = False

    def _at(self, t, x):
        return Lookup(dict(zip(Coefficients._fields, self._table.T)), t, x, self.spread)

    def _model_steps(self, t):
        return torch.tensor(self.timestep_map, device=t.device)[t]


class LookedUpAndSpread(LookedUp):
    """The same, its coefficients as large as the batch."""

    spread = True


class Lookup:
    """Coefficients at steps t (N,) that are fetched when they are asked for: (N, 1, ..., 1) beside
    x, or in x's shape.
    """

    def __init__(self, tables, t, x, spread):
        self.tables, self.t, self.x, self.spread = tables, t, x, spread

    def __getattr__(self, name):
        values = torch.tensor(self.tables[name], device=self.t.device)[self.t].to(self.x.dtype)
        values = values.view(-1, *[1] * (self.x.dim() - 1))
        return values.expand_as(self.x).contiguous() if self.spread else values


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=51, help="(default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=100, help="steps in each round (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    ours = create_diffusion(str(STEPS))
    same = dict(
        use_timesteps=space_timesteps(1000, str(STEPS)), betas=create_diffusion("").betas,
        model_mean_type=ours.model_mean_type, model_var_type=ours.model_var_type,
        loss_type=ours.loss_type,
    )  # fmt: skip
    processes = {
        "ours": ours, "looked up": LookedUp(**same),
        "looked up and spread": LookedUpAndSpread(**same),
    }  # fmt: skip
    x, t = torch.randn(SHAPE, device=device()), torch.arange(SHAPE[0], device=device()) * 30
    output = torch.randn(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], device=device())
    noise, results = torch.randn_like(x), {}
    calls = {
        "p_sample": lambda process: process.p_sample(
            lambda *_: output, x, t, clip_denoised=False, noise_fn=lambda x: noise
        )["sample"],
        "training_losses": lambda process: process.training_losses(
            lambda *_: output, x, t, noise=noise
        )["loss"],
    }
    for name, call in calls.items():
        for process in processes.values():
            torch.testing.assert_close(call(ours), call(process))

        def side(process, call=call):
            for _ in range(args.repeats):
                call(process)

        with torch.no_grad():
            seconds = alternate(
                {key: partial(side, process) for key, process in processes.items()}, args.rounds
            )
        results[name] = {
            f"ours to {key}": ratios(seconds, key)["ours"] for key in list(processes)[1:]
        }
        print(name)
        table({key: [value] for key, value in results[name].items()}, ("ratio, quartiles",))
    write(f"process-{device().type}", {"settings": vars(args) | {"batch": SHAPE}, RATIO: results})


if __name__ == "__main__":
    main()
