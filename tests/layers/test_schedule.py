"""Networks that are told at which step they are asked."""
import pytest

from layers.schedule import Scheduled, at_step
from models import DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from sampling.sampler import Sampler
from vae import PixelSpace

STEPS = 6


class Told(DiT):
    """A DiT that notes what it is told, and the times at which it is asked."""

    def __init__(self, **kwargs):
        super().__init__(
            input_size=4, patch_size=2, in_channels=3, hidden_size=8, depth=1, num_heads=2,
            num_classes=2, **kwargs,
        )  # fmt: skip
        self.now, self.times, self.asked = None, None, []

    def schedule(self, times):
        self.times = list(times)

    def expect(self, step):
        self.now = step

    def forward(self, x, t, y=None, force_drop_ids=None):
        self.asked.append((self.now, t.unique().tolist()))
        return super().forward(x, t, y, force_drop_ids)


SOLVERS = [
    (process, name) for process in (GaussianProcess, FlowProcess) for name in process.solvers
]


@pytest.mark.parametrize("cfg_scale", (1.0, 2.0))
@pytest.mark.parametrize("process, solver", SOLVERS, ids=[name for _, name in SOLVERS])
def test_a_network_is_told_the_time_at_which_it_is_asked(process, solver, cfg_scale):
    """Each time that it is asked inside a step, all samples have the time of that step; solvers
    that ask at other times, too, tell it nothing.
    """
    network = Told(learn_sigma=process.learns_sigma).eval()
    assert isinstance(network, Scheduled)
    sampler = Sampler(
        network, PixelSpace(), None, STEPS, solver, cfg_scale=cfg_scale,
        process=process.of(network, {}),
    )  # fmt: skip
    sampler.images([0, 1])
    told = process.solvers[solver].at_beginnings
    assert len(network.asked) == STEPS if told else len(network.asked) > STEPS
    if told:
        assert network.times == pytest.approx(sampler.steps())
        assert [step for step, _ in network.asked] == list(range(STEPS))
        for step, times in network.asked:
            assert times == [pytest.approx(network.times[step])]
    else:
        assert {step for step, _ in network.asked} == {None} and network.times is None
    assert network.now is None


def test_a_network_forgets_the_step_when_it_fails():
    network = Told()
    with pytest.raises(RuntimeError), at_step(network, 3):
        assert network.now == 3
        raise RuntimeError
    assert network.now is None


def test_a_dit_has_no_schedule():
    assert not isinstance(DiT(input_size=2, hidden_size=8, depth=1, num_heads=2), Scheduled)
