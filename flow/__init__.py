"""Flow matching: `create_flow` makes the process that SiT is trained and sampled with."""

from .flow import Flow
from .paths import PATHS, Coefficients
from .times import TimeSampling, shifted

__all__ = ["PATHS", "Coefficients", "Flow", "TimeSampling", "create_flow", "shifted"]


def create_flow(
    path: str = "linear", prediction: str = "velocity", loss_weight: str | None = None,
    train_eps: float | None = None, sample_eps: float | None = None, cosine_loss: bool = False,
) -> Flow:  # fmt: skip
    """The Flow along a path of PATHS, for a network that predicts a velocity, a score or the noise.

    Time runs from t = 0, noise, to t = 1, data, as in SiT's code; SiT's paper, Stable Diffusion 3
    and diffusers run the other way. The network is given t as it is.

    loss_weight: None, "velocity" or "likelihood", for a score or the noise alone. train_eps,
    sample_eps: how far from the ends, where a term is infinite, training and sampling stay; None
    for the published distances. cosine_loss: also learn the velocity's direction (LightningDiT).

    Raises ValueError for names that do not exist, and for options that contradict one another.
    """
    return Flow(path, prediction, loss_weight, train_eps, sample_eps, cosine_loss)
