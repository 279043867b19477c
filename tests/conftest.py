"""What several test files share: random weights, a small network, and a stand-in for one with a
closed form.
"""
from pathlib import Path
import sys

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import DiT  # noqa: E402

SMALL = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=10
)


# Files of tests that take longest. They come first, so that two workers end at about the same time.
LONGEST = [
    "test_commands", "test_sample_kills", "test_kills", "test_runs", "test_digits", "test_scaling",
    "test_scoring", "test_evaluate", "test_count", "test_switches", "test_blocks", "test_train",
    "test_flags_fuzz", "test_app", "test_solvers", "test_flow_sampling", "test_house",
    "test_without_locks", "test_benchmarks", "test_flow_study", "test_ode", "test_flow_likelihood",
    "test_architecture", "test_sde", "test_models", "test_latents",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Bring the tests into the order of LONGEST, and skip those that are marked as needing a GPU
    where there is none.
    """
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def generator(seed=0):
    """A generator of the CPU with this seed."""
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers that depend on the shape and seed alone."""
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def fill_randomly(model, seed=0, std=0.05):
    """The model with N(0, std²) in every parameter but the frozen table: a fresh DiT returns 0
    whatever it is given.
    """
    source = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=source, dtype=torch.float64) * std
                )
    return model


def small_dit(seed=0, **changes):
    """A small DiT of random weights in float64, evaluation mode; `changes` replace arguments of
    SMALL.
    """
    return fill_randomly(DiT(**{**SMALL, **changes}), seed).double().eval()


def smooth_eps(x, t, **_):
    """A stand-in for a network that predicts the noise, smooth in x and in the original step
    number.

    Close to exact for standard normal data under the linear schedule, so that trajectories stay of
    order 1.
    """
    t = t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    share_of_noise = torch.sqrt(-torch.expm1(-1e-5 * t**2))
    return share_of_noise * x + 0.4 * (1 - share_of_noise) * torch.sin(2 * x + 0.01 * t)


def smooth_eps_and_v(x, t, **_):
    """smooth_eps, and a variance fraction in (-1, 1)."""
    return torch.cat([smooth_eps(x, t), torch.tanh(0.7 * x - 0.1)], dim=1)


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A folder with an autoencoder of ratio 2 and random weights."""
    folder = tmp_path_factory.mktemp("vae")
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, latent_channels=4,
        sample_size=8,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of torch-fidelity's Inception weights, random ones: the trained ones cannot be had
    without a network.
    """
    pytest.importorskip(
        "torch_fidelity", reason="Inception comes with torch-fidelity: pip install .[evaluate]"
    )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    source = generator()
    state = Untrained("untrained", ["2048"], str(path)).state_dict()
    for name, tensor in state.items():
        # Such that signals come through: matrices by He, scales and variances about 1
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=source)
            if tensor.dim() > 1:
                state[name] = drawn * (2 / tensor[0].numel()) ** 0.5
            else:
                state[name] = 0.1 * drawn + (
                    1 if name.endswith(("bn.weight", "running_var")) else 0
                )
    torch.save(state, path)
    return path
