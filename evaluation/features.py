"""Images → features: Inception as ADM's suite taps it, any classifier, or the pixels themselves.

An extractor is called with images uint8 (n, 3, H, W) and returns Rows, float32. Work on many images
is dealt to the processes in turns, and what comes out is in the images' order, whatever the number
of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
import pickle
import re
import sys
from typing import NamedTuple
import warnings

from safetensors.torch import load_file
import timm
import torch
from torch import Tensor
import torch.nn.functional as F

from runtime.devices import tf32
from runtime.disk import check_name, file_hash
from runtime.json_files import read_json
from runtime.offline import why_offline
from runtime.surroundings import is_installed

Batch = Tensor | list[Tensor]  # images (n, 3, H, W); of several sizes a list of (3, H, W)

SPATIAL_CHANNELS = 7  # of ADM's sFID
# A covariance of so many takes half a GB, and a minute or two for its singular values
MOST_FEATURES = 8192
# Pixels a side, and the least bound for sizes, of a timm network
MOST_INPUT, SMALL_NETWORK = 4096, 1024
LOADING = {
    "self", "args", "kwargs", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "checkpoint_path", "cache_dir",
}  # fmt: skip
# Reference images kept for precision and recall, as many as in ADM's files
MANIFOLD_IMAGES = 10_000


class Rows(NamedTuple):
    """Features (n, D), spatial features (n, S) and logits (n, K) of n images.

    What an extractor does not have is None.
    """

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class Extractor:
    """extract(images) → Rows, with what a report says of the extractor: a name and, if there are
    weights, their SHA-256. Errors call it by the name of the `argument` that chose it. One that
    `resizes` brings each image to the size that it takes, whatever the image's own.
    """

    extract: Callable[[Tensor], Rows]
    name: str
    sha256: str | None = None
    argument: str = "features"
    resizes: bool = False

    @torch.no_grad()
    def __call__(self, images: Batch) -> Rows:
        """Rows of images uint8 (n, 3, H, W), or of a list of n images (3, H, W) of sizes of their
        own, then without spatial features; float32 without TF32.
        """
        if isinstance(images, list):
            return self._of_several_sizes(images)
        with tf32(False):
            return Rows._make(
                None if part is None else part.float() for part in self.extract(images)
            )

    def _of_several_sizes(self, images):
        """The Rows of a list of images (3, H, W), those of one size together."""
        groups: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault(image.shape, []).append(number)
        parts = [self(torch.stack([images[i] for i in group])) for group in groups.values()]
        place = torch.tensor([i for group in groups.values() for i in group]).argsort()  # (n,)
        rows = Rows._make(None if of[0] is None else torch.cat(of)[place] for of in zip(*parts))
        return rows._replace(spatial=None)

    def dimensions(
        self, size: tuple[int, int], device: torch.device | str
    ) -> tuple[int, int | None]:
        """How many features an image of size (width, height) has, and how many spatial ones.

        An image without spatial ones has None there. Tries it on two images of noise. Raises
        ValueError if it does not take them, gives something else than a row for each, or too much.
        """
        width, height = size
        given = f"`{self.argument}` {self.name}"
        shapes = self._shapes_for_noise(given, width, height, device)
        features, spatial, logits = shapes
        if features is None or any(
            shape is not None and (len(shape) != 2 or shape[0] != 2) for shape in shapes
        ):
            raise ValueError(
                f"{given} gives {features} features and {logits} logits for 2 images; wanted are "
                "(2, D) and (2, K), or features alone"
            )
        if features[1] > MOST_FEATURES:
            raise ValueError(
                f"{given} makes {features[1]:,} features of an image of {width}x{height}; their "
                f"covariance would be too large (at most {MOST_FEATURES:,}); pass inception or a "
                "classifier"
            )
        return features[1], spatial[1] if spatial else None

    def _shapes_for_noise(self, given, width, height, device):
        """The shapes of the Rows of two images of noise; None for a part that is not there."""
        images = torch.randint(
            256, (2, 3, height, width), generator=torch.Generator().manual_seed(0),
            dtype=torch.uint8,
        )  # fmt: skip
        try:
            rows = self(images.to(device))
            features, spatial, logits = (
                None if part is None else tuple(part.shape) for part in rows
            )
        except Exception as error:  # whatever a user's network raises
            reason = str(error).strip().splitlines()[-1:] or [""]
            raise ValueError(
                f"{given} cannot be used on uint8 images of {width}x{height} "
                f"({type(error).__name__}: {reason[0]}); it must return features (n, D), or a pair "
                "of features and logits (n, K)"
            ) from None
        return features, spatial, logits


def load_extractor(
    name: str, device: torch.device | str, inception_weights: Path | str | None = None,
    argument: str = "features",
) -> Extractor:  # fmt: skip
    """The Extractor for "inception", "pixels" or a path.

    A path is a TorchScript file, or a .safetensors with timm's config.json beside.
    inception_weights is a local file; None fetches torch-fidelity's. Errors call the extractor by
    the name of the `argument` that chose it. Raises ValueError if it cannot be had.
    """
    if name == "pixels":
        return Extractor(lambda images: Rows(images.flatten(1) / 255), name, argument=argument)
    if name == "inception":
        if not is_installed("torch_fidelity"):
            raise ValueError(
                f"`{argument}=inception` needs torch-fidelity: pip install torch-fidelity"
            )
        path = Path(inception_weights or fetch_inception())
        network = Inception(path).to(device)
        return Extractor(network, name, file_hash(path), argument, resizes=True)
    check_name(Path(name))
    path = Path(name) / "model.safetensors" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"`{argument}` {name}: there is no file {path}; give inception, pixels, a TorchScript "
            "file, or .safetensors with the config.json that timm writes beside it"
        )
    is_timm = path.suffix == ".safetensors"
    load = timm_classifier if is_timm else scripted_classifier
    sha256 = file_hash(path)
    return Extractor(load(path, device, argument), str(name), sha256, argument, resizes=is_timm)


class Inception(torch.nn.Module):
    """The Inception network of 2015, tapped where ADM's evaluation suite taps it.

    The code is torch-fidelity's port from TensorFlow. features: the 2,048 averages before the
    classifier (pool_3). spatial: the first 7 channels of mixed_6's 1×1 branch (here Mixed_6d) after
    its ReLU, 17×17, in TensorFlow's order (row, column, channel). logits: 1,008, without the bias.
    Raises ValueError if path holds other weights.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        advice = "give torch-fidelity's weights-inception-2015-12-05 as `inception_weights`"
        try:
            torch.load(path, weights_only=True)  # torch-fidelity reads it without that safeguard
            self.trunk = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(path)
            )
        except OSError as error:
            raise ValueError(f"cannot read {path} ({error.strerror}); {advice}") from None
        except pickle.UnpicklingError:
            raise ValueError(
                f"{path} holds other weights (it is no file of tensors alone); {advice}"
            ) from None
        except Exception as error:  # torch.load and load_state_dict have many kinds
            raise ValueError(
                f"{path} holds other weights ({_first_line(error)}); {advice}"
            ) from None
        self.trunk.Mixed_6d.branch1x1.register_forward_hook(self._tap)

    def _tap(self, module, args, output):
        self.tapped = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (n, 17·17·7)

    def forward(self, images: Tensor) -> Rows:
        features, logits = self.trunk(images)
        return Rows(features, self.tapped, logits)


def fetch_inception() -> Path:
    """The path of torch-fidelity's Inception weights in torch's own cache.

    Missing weights are fetched. Raises ValueError if the file cannot be had.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (hash_prefix,) = torch.hub.HASH_REGEX.findall(path.name)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix)
    except (OSError, RuntimeError) as error:
        reason = why_offline(error) or error
        raise ValueError(
            f"cannot download the Inception weights ({reason}); fetch {URL_INCEPTION_V3} by other "
            f"means and put it at {path}, or pass evaluate.py `inception_weights=FILE`; or choose "
            "other features"
        ) from None
    return path


def scripted_classifier(
    path: Path, device: torch.device | str, argument: str
) -> Callable[[Tensor], Rows]:
    """A TorchScript module, which is a program and runs as it is, as an extractor.

    Called with images uint8 (n, 3, H, W) it returns features (n, D), or those and logits (n, K).

    Raises ValueError if the file is none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that TorchScript will go some day
            module = torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        raise ValueError(
            f"`{argument}` {path} is no TorchScript file ({_first_line(error)}); save it with "
            "torch.jit.save"
        ) from None

    def extract(images):
        out = module(images)
        features, logits = (out, None) if torch.is_tensor(out) else out
        return Rows(features, None, logits)

    return extract


def timm_classifier(
    path: Path, device: torch.device | str, argument: str
) -> Callable[[Tensor], Rows]:
    """A timm classifier with the config.json that timm wrote beside it.

    The network gives the features before its classifier, and its logits. Images are brought to its
    input size and normalised as config.json says. Nothing that config.json names is fetched or
    loaded beside it. Raises ValueError if they do not fit together.
    """
    try:
        config, tensors = read_json(path.parent / "config.json"), load_file(path)
        model = timm.create_model(config["architecture"], **network_arguments(config, tensors))
        model.load_state_dict(tensors)
        size, mean, std = normalisation(config["pretrained_cfg"])
    except Exception as error:  # each library has kinds of its own
        raise ValueError(
            f"`{argument}` {path} cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "it must be what timm's save_for_hf writes, with config.json beside it"
        ) from None
    model, mean, std = (
        model.to(device).eval(), mean.to(device)[:, None, None], std.to(device)[:, None, None],
    )  # fmt: skip

    def extract(images):
        x = images.float() / 255
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        # (n, D)
        features = model.forward_head(model.forward_features((x - mean) / std), pre_logits=True)
        return Rows(features, None, model.get_classifier()(features) if model.num_classes else None)

    return extract


def network_arguments(config: dict, tensors: dict[str, Tensor]) -> dict:
    """The arguments in a timm configuration's model_args that its networks take themselves. Others,
    which may load files, are dropped.

    Raises ValueError for an architecture that is none of timm's own, and for values that are not
    plain or far larger than what is in the tensors.
    """
    name = config["architecture"]
    # timm.is_model knows no source such as "hf-hub:"
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"architecture is {str(name)[:60]!r}, none of timm's")
    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    networks = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    ]
    taken = {
        argument for network in networks for argument in signature(network.__init__).parameters
    } - LOADING
    given = {"num_classes": config["num_classes"]} | (config.get("model_args") or {})
    most = max([SMALL_NETWORK, *(side for tensor in tensors.values() for side in tensor.shape)])
    for key, value in given.items():
        limit = len(tensors) if re.search("depth|layers", key) else most
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, (str, int, float)) and part is not None:
                raise ValueError(
                    f"{key} holds a {type(part).__name__}; wanted are numbers and texts"
                )
            if isinstance(part, (int, float)) and abs(part) > limit:
                raise ValueError(f"{key} is {part}, far beyond what is in {len(tensors)} tensors")
    return {key: value for key, value in given.items() if key in taken}


def normalisation(known: dict) -> tuple[tuple[int, int], Tensor, Tensor]:
    """((height, width), mean (3,), std (3,)) of the images that a timm network takes.

    Raises ValueError for nonsense.
    """
    size = known["input_size"]
    if not (
        isinstance(size, list)
        and len(size) == 3
        and all(type(n) is int and 0 < n <= MOST_INPUT for n in size)
    ):
        raise ValueError(
            f"input_size is no list of channels, height and width, each at most {MOST_INPUT}"
        )
    mean, std = (torch.tensor(known[key], dtype=torch.float32) for key in ("mean", "std"))
    if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
        raise ValueError("mean and std are not three numbers each, those of std above 0")
    return (size[1], size[2]), mean, std


def _first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0][:300]
