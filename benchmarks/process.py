"""The diffusion process alone, its coefficients in one tensor on the device, against NumPy tables looked up at each use.

    python -m benchmarks.process

One reverse step and one training loss with a network that does nothing, on a batch of 8 × 4×32×32. The other side has the same
formulas; but each coefficient is fetched from its float64 table where it is used, copied to the device, cast and spread over
the batch's shape, as schedule tables in NumPy make one do.
"""

import argparse

import torch

from benchmarks.sides import RATIO, alternate, device, ratios, table, write
from diffusion import SpacedDiffusion, create_diffusion, space_timesteps
from diffusion.gaussian_diffusion import Coefficients

SHAPE, STEPS = (8, 4, 32, 32), 250


class LookedUp(SpacedDiffusion):
    """The process with its tables in NumPy."""

    def _at(self, t, x):
        return Lookup(dict(zip(Coefficients._fields, self._table.T)), t, x)

    def _model_steps(self, t):
        return torch.tensor(self.timestep_map, device=t.device)[t]


class Lookup:
    """Coefficients at steps t (N,) that are fetched when they are asked for, each in x's shape."""

    def __init__(self, tables, t, x):
        self.tables, self.t, self.x = tables, t, x

    def __getattr__(self, name):
        values = torch.from_numpy(self.tables[name]).to(self.t.device)[self.t].to(self.x.dtype)
        return values.view(-1, *[1] * (self.x.dim() - 1)).expand_as(self.x)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=51, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=100, help="steps in each round (default: %(default)s)")
    args = parser.parse_args(argv)
    ours = create_diffusion(str(STEPS))
    theirs = LookedUp(
        use_timesteps=space_timesteps(1000, str(STEPS)), betas=create_diffusion("").betas,
        model_mean_type=ours.model_mean_type, model_var_type=ours.model_var_type, loss_type=ours.loss_type,
    )  # fmt: skip
    x, t = torch.randn(SHAPE, device=device()), torch.arange(SHAPE[0], device=device()) * 30
    output = torch.randn(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], device=device())
    noise, results = torch.randn_like(x), {}
    calls = {
        "p_sample": lambda process: process.p_sample(
            lambda *_: output, x, t, clip_denoised=False, noise_fn=lambda x: noise
        )["sample"],
        "training_losses": lambda process: process.training_losses(lambda *_: output, x, t, noise=noise)["loss"],
    }
    for name, call in calls.items():
        torch.testing.assert_close(call(ours), call(theirs))

        def side(process):
            for _ in range(args.repeats):
                call(process)

        with torch.no_grad():
            seconds = alternate({"tables in NumPy": lambda: side(theirs), "ours": lambda: side(ours)}, args.rounds)
        results[name] = ratios(seconds, "tables in NumPy")
        print(name)
        table({key: [value] for key, value in results[name].items()}, ("ratio, quartiles",))
    write(f"process-{device().type}", {"settings": vars(args) | {"batch": SHAPE}, RATIO: results})


if __name__ == "__main__":
    main()
