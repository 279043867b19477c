"""What a network on a path predicts, and what else its output says of x.

Shapes: an output and x are (N, C, *space); coefficients broadcast with them.
"""

from typing import NamedTuple

from torch import Tensor

from .paths import PATHS, Coefficients

PREDICTIONS = ("velocity", "score", "noise")


class Prediction(NamedTuple):
    """One of PREDICTIONS on one of PATHS.

    An output is either the velocity dx/dt, the score, which is the gradient of log p_t(x), or the
    noise in x. Each follows from each other (SiT, section 2.2): x and the velocity are two
    equations for data and noise, and the score is -noise/sigma.
    """

    path: str
    prediction: str

    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha, sigma and their derivatives at t, of its shape."""
        return PATHS[self.path](t)

    def velocity(self, out: Tensor, x: Tensor, at: Coefficients) -> Tensor:
        """The velocity at x. Of a score or the noise it is infinite where alpha is 0."""
        if self.prediction == "velocity":
            return out
        noise = out if self.prediction == "noise" else -at.sigma * out
        return (at.d_alpha * x - at.turn * noise) / at.alpha

    def score(self, out: Tensor, x: Tensor, at: Coefficients) -> Tensor:
        """The score at x. Of a velocity or the noise it is infinite where sigma is 0."""
        if self.prediction == "score":
            return out
        if self.prediction == "noise":
            return -out / at.sigma
        return (at.alpha * out - at.d_alpha * x) / (at.sigma * at.turn)

    def data(self, out: Tensor, x: Tensor, at: Coefficients) -> Tensor:
        """The data that x comes from: the mean of them, given x."""
        if self.prediction == "velocity":
            return (at.sigma * out - at.d_sigma * x) / at.turn
        noise = out if self.prediction == "noise" else -at.sigma * out
        return (x - at.sigma * noise) / at.alpha
