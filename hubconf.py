"""Entry points of torch.hub: the networks, their released weights, and samplers.

    network = torch.hub.load("OWNER/REPO", "DiT_S_2")                     # random weights
    network = torch.hub.load("OWNER/REPO", "DiT_XL_2", pretrained=True)   # released, 256 pixels
    sampler = torch.hub.load("FOLDER", "digits_sampler", source="local")  # FOLDER: a checkout
    sampler = torch.hub.load("OWNER/REPO", "sampler", "my-dit")           # of any checkpoint
    network = torch.hub.load("OWNER/REPO", "network", "MMDiT-24/2")       # of any model's name

A Python process has one module of each name. What is loaded here takes the names in `TAKEN` for the
rest of the process: if a module of the caller has one of them already, loading raises ImportError,
and a later `import models` of the caller gets this repository's module. The names of the other
wings, such as `data` and `training`, stay free. To save a network, save its state_dict():
torch.save(network) refers to `models`, which another process finds only in this folder.
"""

from collections.abc import Callable as _Callable, Iterator as _Iterator
from contextlib import contextmanager as _contextmanager
from importlib import import_module as _import_module
from pathlib import Path as _Path
import sys
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any

import torch

if _TYPE_CHECKING:
    from checkpoints.networks import Network
    from models import DiT
    from sampling.sampler import Sampler

# torch.hub calls whatever is callable and has no underscore in front an entry point.
_HERE = _Path(__file__).resolve().parent
_DIGITS = _HERE / "examples" / "digits"

dependencies = ["torch", "timm", "diffusers", "numpy", "PIL", "safetensors", "tqdm"]
# What networks and samplers are made of; a network of random weights takes the first two alone.
TAKEN = (
    "layers", "models", "checkpoints", "conditions", "diffusion", "flow", "processes", "runtime",
    "sampling", "vae", "variants",
)  # fmt: skip


@_contextmanager
def _own_modules(names: tuple[str, ...]) -> _Iterator[None]:
    """Within it, imports are of this folder; the modules with these names are imported first.

    Once a wing is imported, its own rooms are found without sys.path, however late.

    Raises ImportError if one of the names belongs to a module from elsewhere.
    """
    sys.path.insert(0, str(_HERE))
    try:
        for name in names:
            origin = _import_module(name).__file__
            if origin is None or _HERE not in _Path(origin).resolve().parents:
                raise ImportError(
                    f"this process has another module called {name}, {origin}; call torch.hub.load "
                    "before that one is imported, or in another process"
                )
        yield
    finally:
        sys.path.remove(str(_HERE))


def _released(model: str, **arguments: _Any) -> "DiT":
    """The network with its released weights, fetched into torch.hub's folder if need be."""
    from checkpoints import load_pretrained
    from checkpoints.released import RELEASED, download_model
    from models import DiT_models
    from vae import HUB_SHAPE

    released = {file: entry for file, entry in RELEASED.items() if entry.model in DiT_models}
    for file, (name, image_size, _) in released.items():
        with torch.device("meta"):
            config = DiT_models[name](input_size=HUB_SHAPE.side(image_size)).config
        if name == model and config == config | arguments:
            path = download_model(file, _Path(torch.hub.get_dir()) / "checkpoints")
            return load_pretrained(path, config=config)[0]
    known = " and ".join(
        f"{entry.model} with input_size={HUB_SHAPE.side(entry.image_size)}"
        for entry in released.values()
    )
    given = "".join(f" {name}={value!r}" for name, value in arguments.items())
    raise ValueError(
        f"no weights were released for {model}{given and f' with{given}'}, only for {known}; "
        "leave pretrained=True out"
    )


def _entry(model: str) -> _Callable[..., "DiT"]:
    """The entry point of a network that `models.DiT_models` calls `model`."""

    def load(pretrained: bool = False, input_size: int = 32, **arguments: _Any) -> "DiT":
        with _own_modules(TAKEN if pretrained else TAKEN[:2]):
            from models import DiT_models

            arguments["input_size"] = input_size
            if pretrained:
                return _released(model, **arguments)
            return DiT_models[model](**arguments)

    load.__name__ = load.__qualname__ = model.replace("-", "_").replace("/", "_")
    load.__doc__ = f"""The network {model}, for latents of side input_size, an eighth of the images.

    Without `pretrained` its weights are random, and `arguments` are those of models.DiT, such as
    num_classes. With it they are the released ones, if there are any (DiT-XL/2, input_size=32 or
    64), fetched into torch.hub's folder on first use; the network is then in evaluation mode,
    without gradients. Raises ValueError for arguments that do not fit together, for weights that
    were not released or cannot be fetched, and ImportError for a module of another project in the
    way.
    """
    return load


with _own_modules(TAKEN[:2]):
    from models import DiT_models as _DiT_models

globals().update({entry.__name__: entry for entry in map(_entry, _DiT_models)})


def network(model: str, **arguments: _Any) -> "Network":
    """A network of random weights by its model's name, also one that reads text: "MMDiT-24/2".

    `arguments` are those of its class, such as input_size and, of MMDiT, text_width: the width of
    what outside text encoders give; without it the network has an encoder of its own. Raises
    ValueError for a name that there is not and for arguments that do not fit together, ImportError
    for a module of another project in the way.
    """
    with _own_modules(TAKEN):
        from checkpoints.networks import MODELS

        if model not in [*MODELS]:
            raise ValueError(f"`model` is {model!s:.60}; give one of {', '.join(MODELS)}")
        return MODELS[model](**arguments)


def digits_sampler(steps: int = 50, cfg_scale: float = 1.5, **options: _Any) -> "Sampler":
    """A sampler of handwritten digits, 32 pixels, from weights in the repository.

    Nothing is fetched. `sampler.images([3, 1, 4], seed=0)` is a uint8 array (N, 32, 32, 3). `steps`
    is the number of sampling steps, `cfg_scale` the scale of guidance (1: none). `options` are
    those of sampling.load_sampler, such as device (default: the GPU if there is one). Raises
    ValueError for options that do not fit together, ImportError for a module of another project in
    the way.
    """
    with _own_modules(TAKEN):
        from sampling import load_sampler

        checkpoint, vae = _DIGITS / "dit.safetensors", str(_DIGITS / "vae")
        return load_sampler(checkpoint, vae=vae, steps=steps, cfg_scale=cfg_scale, **options)


def sampler(checkpoint: "str | None" = None, **options: _Any) -> "Sampler":
    """A sampler of a checkpoint, diffusion or flow, as sampling.load_sampler returns it.

    Its `images` take labels, or of a network that reads text prompts: images(["a thin seven"]). Of
    one that makes clips they are uint8 (N, F, H, W, 3).
    `checkpoint` is what sample.py's --ckpt takes; None: the released weights, with
    model="SiT-XL/2" those of the flow. Raises ValueError for what does not fit together,
    ImportError for a module of another project in the way.
    """
    with _own_modules(TAKEN):
        from sampling import load_sampler

        return load_sampler(checkpoint, **options)
