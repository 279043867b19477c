"""What is known of flows for normal data, from formulas written here, in float64.

An `Oracle` is a path whose data are N(mean, std²) in each of their elements.
"""

import cmath
import math
from typing import NamedTuple

import torch


def vp_alpha(t):
    """exp(-½∫beta), beta rising from 0.1 to 20 as t falls from 1 to 0."""
    s = 1 - t
    return cmath.exp(-(0.1 * s + 19.9 * s * s / 2) / 2)


ALPHA = {"linear": lambda t: t, "gvp": lambda t: cmath.sin(math.pi * t / 2), "vp": vp_alpha}
SIGMA = {
    "linear": lambda t: 1 - t,
    "gvp": lambda t: cmath.cos(math.pi * t / 2),
    "vp": lambda t: cmath.sqrt(1 - vp_alpha(t) ** 2),
}
PATHS = tuple(ALPHA)
PREDICTIONS = ("velocity", "score", "noise")
STEP = 1e-30  # a derivative by a complex step is exact to rounding


def value_and_slope(function, t):
    found = function(complex(t, STEP))
    return found.real, found.imag / STEP


class At(NamedTuple):
    """alpha, sigma and their derivatives at one time."""

    a: float
    s: float
    da: float
    ds: float


def at(path, t):
    (a, da), (s, ds) = value_and_slope(ALPHA[path], t), value_and_slope(SIGMA[path], t)
    return At(a, s, da, ds)


def form(name, path, t, norm=1.0):
    """D(t) as published for SiT's code."""
    c = at(path, t)
    if name == "sbdm":
        if path == "vp":
            return norm * (0.1 + (1 - t) * 19.9) / 2
        return norm * (c.da / c.a * c.s**2 - c.s * c.ds)
    return {
        "constant": norm, "sigma": norm * c.s, "linear": norm * (1 - t),
        "decreasing": 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": norm * math.sin(math.pi * t) ** 2,
    }[name]  # fmt: skip


class Oracle:
    """Data N(mean, std²); mean and std are numbers, or tensors that broadcast with x."""

    def __init__(self, path, mean=0.3, std=0.5):
        self.path, self.mean, self.std = path, mean, std

    def variance(self, t):
        c = at(self.path, t)
        return c.a**2 * self.std**2 + c.s**2

    def score(self, x, t):
        return -(x - at(self.path, t).a * self.mean) / self.variance(t)

    def data(self, x, t):
        c = at(self.path, t)
        return self.mean - c.a * self.std**2 * self.score(x, t)

    def noise(self, x, t):
        return -at(self.path, t).s * self.score(x, t)

    def velocity(self, x, t):
        c = at(self.path, t)
        return c.da * self.data(x, t) + c.ds * self.noise(x, t)

    def network(self, prediction):
        """A network that has learned them: its output for x (N, ...) at times t (N,)."""
        says = getattr(self, prediction)

        def network(x, t, **_):
            if (t == t[0]).all():
                return says(x, float(t[0]))
            return torch.stack([says(row, float(one)) for row, one in zip(x, t)])

        return network

    def end(self, x, start, end):
        """Where the ODE takes x from one time to another: the number of standard deviations stays.
        """
        (a, *_), (b, *_) = at(self.path, start), at(self.path, end)
        ratio = (self.variance(end) / self.variance(start)) ** 0.5
        return b * self.mean + ratio * (x - a * self.mean)
