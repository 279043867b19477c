"""Gaussian diffusion: `create_diffusion` makes the process that DiT is trained and sampled with."""

from collections.abc import Sequence

from .gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from .respace import SpacedDiffusion, space_timesteps
from .schedules import get_named_beta_schedule
from .timestep_sampler import create_named_schedule_sampler

__all__ = [
    "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "SpacedDiffusion",
    "create_diffusion", "create_named_schedule_sampler", "space_timesteps",
]  # fmt: skip


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None, noise_schedule: str = "linear",
    use_kl: bool = False, sigma_small: bool = False, predict_xstart: bool = False,
    learn_sigma: bool = True, rescale_learned_sigmas: bool = False, diffusion_steps: int = 1000,
) -> SpacedDiffusion:  # fmt: skip
    """The process as a SpacedDiffusion: all steps with "" or None, else fewer.

    "250", "ddim50" and "10,15,20" ask for fewer steps. Raises ValueError for a respacing or
    schedule that does not exist and for options that contradict one another.
    """
    if learn_sigma and sigma_small:
        raise ValueError("sigma_small chooses a fixed variance; it needs learn_sigma=False")
    if rescale_learned_sigmas and (use_kl or not learn_sigma):
        raise ValueError(
            "rescale_learned_sigmas scales the bound beside the MSE; it needs learn_sigma=True and "
            "use_kl=False"
        )
    if learn_sigma:
        variance = ModelVarType.LEARNED_RANGE
    else:
        variance = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    if use_kl:
        loss = LossType.RESCALED_KL
    else:
        loss = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(diffusion_steps, timestep_respacing),
        betas=get_named_beta_schedule(noise_schedule, diffusion_steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=variance,
        loss_type=loss,
    )
