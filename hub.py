"""Networks for others: folders as the Hugging Face hub has them, and pipelines of diffusers, both ways.

A pretrained folder has `model.safetensors`, `config.json` (DiT's arguments, class names under id2label) and a model card,
`README.md`. Reading is checkpoints.load_weights' task; here are the hub's names, and what writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import json
from pathlib import Path
import re
from tempfile import TemporaryDirectory

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors import SafetensorError
import torch

from checkpoints import (
    OUR_CLASS, PRETRAINED, Weights, check_classes, check_fits, check_readable, id2label, load_weights, read_json,
    save_weights, weights_file,
)  # fmt: skip
from diffusers_format import OWN, OWN_CLASSES, config_to_diffusers, is_diffusers, to_diffusers
from diffusion import create_diffusion
from dit_config import arguments_in, check_outline
from models import DiT
from offline import cache_of_the_hub, why_offline
from vae import LatentSpace, Space

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What is needed of a repository on the hub.
HUB_FILES = ["config.json", PRETRAINED, "diffusion_pytorch_model.*", "model_index.json", "transformer/*", "vae/*"]


def local_path(name: Path | str) -> Path:
    """The path of a checkpoint file or folder; for the hub's OWNER/NAME that is no path here, of its copy, fetched if need be.

    Raises ValueError if it cannot be had.
    """
    path = Path(name)
    with suppress(OSError, ValueError):  # of names that no file can have
        if path.exists():
            return path
    if not HUB_NAME.fullmatch(str(name)) or path.suffix in (".pt", ".safetensors"):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if offline := why_offline(error):
            reason = f"{offline}, and there is no copy in the cache {cache_of_the_hub()}"
        raise ValueError(
            f"{name} is no file or folder here, and cannot be fetched from the hub ({reason}); give a path, or fetch it where "
            "there is a network (hf download) and set HF_HOME to that cache"
        ) from None


def network_of(weights: Weights, origin: Path | str) -> DiT:
    """The network of Weights that have a configuration, in float32 and for evaluation.

    Raises ValueError, naming `origin`, if the two do not fit.
    """
    assert weights.config is not None
    try:
        config = arguments_in(weights.config)
        check_outline(config, weights.tensors)
        with torch.device("meta"):
            network = DiT(**config)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{origin} has a configuration that this version does not know ({error})") from None
    check_fits(network, weights.tensors, origin)
    network.load_state_dict(weights.tensors, assign=True)
    return network.float().eval().requires_grad_(False)


def load_pretrained(
    name: Path | str, which: str = "ema", config: dict | None = None
) -> tuple[DiT, list[str] | None]:
    """(network, class names or None) of a checkpoint: a folder or file as in checkpoints.load_weights, or the hub's OWNER/NAME.

    The network is in float32, for evaluation, without gradients; for training call `.train().requires_grad_(True)` and then
    `pos_embed.requires_grad_(False)`. `config` are DiT's arguments for a file that does not carry them. Raises ValueError if
    it cannot be loaded.
    """
    weights = load_weights(local_path(name), which)
    config = weights.config or config
    if config is None:
        raise ValueError(f"{name} does not say how its network is built; pass config, DiT's arguments")
    return network_of(weights._replace(config=config), name), weights.classes


def save_pretrained(
    network: DiT, folder: Path | str, classes: list[str] | None = None, training: dict | None = None, vae: str | None = None
) -> None:
    """Write a network as a pretrained folder: weights, config.json and model card.

    For the card: training, the {"step", "args"} of its run, and vae, the name of its autoencoder. Raises ValueError if the
    folder has files already, or cannot be written.
    """
    check_classes(classes, network.config, "the network")
    check_readable(classes)
    with whole_folder(folder) as partial:
        tensors = {name: value.detach().cpu() for name, value in network.state_dict().items()}
        save_weights(partial / PRETRAINED, Weights(tensors, network.config, classes))
        names = {"id2label": id2label(classes)} if classes else {}
        contents = {"_class_name": OUR_CLASS, **network.config, **names}
        (partial / "config.json").write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        card = model_card(network, classes, training, vae)  # arguments of the run may be paths that are no UTF-8
        (partial / "README.md").write_text(card, encoding="utf-8", errors="replace")


def export_diffusers(network: DiT, space: Space, folder: Path | str, classes: list[str] | None = None) -> None:
    """Write a network and the LatentSpace behind which it was trained as a pipeline of diffusers, with a DDIM scheduler.

    `load_exported` loads it and gives our numbers; DiTPipeline.from_pretrained loads it as well, and is a little off (see
    there). Raises ValueError for a network or space that diffusers' pipeline cannot have, and as save_pretrained.
    """
    if not isinstance(space, LatentSpace):
        raise ValueError("diffusers' pipeline decodes latents, and this network makes pixels; it cannot be exported")
    if space.shift:
        raise ValueError(f"the autoencoder's latents are shifted by {space.shift}, which diffusers' pipeline leaves out")
    check_classes(classes, network.config, "the network")
    check_readable(classes)
    config = config_to_diffusers(network.config)
    transformer = DiTTransformer2DModel(**{key: value for key, value in config.items() if key != OWN})
    transformer.register_to_config(**config, **({OWN_CLASSES: classes} if classes else {}))
    transformer.load_state_dict(to_diffusers(network.state_dict(), network.config))  # strict: every weight of theirs is given
    betas = create_diffusion("").betas
    scheduler = DDIMScheduler(
        num_train_timesteps=len(betas), beta_start=float(betas[0]), beta_end=float(betas[-1]), beta_schedule="linear",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading",
    )  # fmt: skip
    with whole_folder(folder) as partial:
        DiTPipeline(transformer.eval(), space.autoencoder, scheduler).save_pretrained(partial)
        if classes:  # the pipeline reads them and does not write them
            index = partial / "model_index.json"
            contents = json.loads(index.read_text(encoding="utf-8")) | {"id2label": id2label(classes)}
            index.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def load_exported(folder: Path | str) -> DiTPipeline:
    """The DiTPipeline in a folder, or on the hub, with the timestep frequencies of a DiT.

    diffusers divides their exponents by 127 where DiT has 128, and its configuration cannot say so. Raises ValueError for
    a folder whose parts are not diffusers' own, and OSError or ValueError, diffusers', if it cannot be loaded.
    """
    folder = local_path(folder)
    for name, part in read_json(folder / "model_index.json").items():
        if isinstance(part, list) and part[:1] not in (["diffusers"], [None]):
            raise ValueError(f"{folder}: its {name} is of {part[:1]}, not of diffusers; code in a folder is never run")
    pipeline = DiTPipeline.from_pretrained(folder)
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return pipeline


def import_diffusers(folder: Path | str) -> tuple[DiT, list[str] | None]:
    """(network, class names or None) of a DiT in diffusers' format: a pipeline's folder, its transformer/, or OWNER/NAME.

    Its autoencoder is the folder's vae/. Raises ValueError if it is none, or its blocks have embedders of their own.
    """
    file = weights_file(local_path(folder)).with_name("config.json")
    if not file.is_file() or not is_diffusers(read_json(file)):
        raise ValueError(f"{folder} is no DiT of diffusers; load_pretrained reads everything else")
    return load_pretrained(folder)


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if nothing is raised. Raises ValueError if that has files or cannot be made."""
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists already; give another name")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name[:20]}.", dir=folder.parent) as temporary:
            partial = Path(temporary) / folder.name
            partial.mkdir()
            yield partial
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    except (OSError, SafetensorError) as error:  # the second of diffusers' writing
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot write {folder} ({reason}); nothing is left of it: make room or choose another place, and give the command "
            "again"
        ) from None


CARD = """---
library_name: pytorch
pipeline_tag: {task}
tags:
- dit
- diffusion
---

# {title}

A diffusion transformer (DiT, [Peebles & Xie 2023](https://arxiv.org/abs/2212.09748)), {parameters:,} parameters, that makes
{what}. It is for the PyTorch implementation at REPOSITORY; transformers and diffusers do not read it.

| | |
|---|---|
{rows}

## Use

In a clone of REPOSITORY, after `pip install .`:

```bash
python sample.py --ckpt OWNER/NAME --vae {vae}
```

```python
from hub import load_pretrained

network, classes = load_pretrained("OWNER/NAME")   # or a path to this folder
```

## Data, evaluation, licence

To be filled in by whoever publishes this: REPOSITORY, OWNER/NAME and, if it stands above, VAE; what it was trained on, how good
its samples are and how that was measured, what it must not be used for, and under which licence it is given.
"""


def model_card(
    network: DiT, classes: list[str] | None = None, training: dict | None = None, vae: str | None = None
) -> str:
    """A model card in Markdown, filled with what the network and its checkpoint say."""
    config, args = network.config, (training or {}).get("args") or {}
    rows = {key.replace("_", " "): value for key, value in config.items()}
    if training:
        shown = ("model", "image_size", "global_batch_size", "lr", "ema_decay", "mixed_precision", "global_seed")
        rows |= {"training steps": training.get("step")} | {key.replace("_", " "): args[key] for key in shown if key in args}
    if classes:
        rows["classes"] = ", ".join(classes[:10]) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
    vae = str(vae or args.get("vae", "VAE"))
    with suppress(OSError, ValueError):  # of what is no path
        vae = "VAE" if Path(vae).is_absolute() or Path(vae).is_dir() else vae  # a folder of this machine
    return CARD.format(
        title=args.get("model", "DiT"), parameters=sum(p.numel() for p in network.parameters()), vae=vae,
        task="unconditional-image-generation" if not config["num_classes"] else "other",
        what=f"images of {config['num_classes']} classes" if config["num_classes"] else "images",
        rows="\n".join(f"| {key} | {' '.join(str(value).split()).replace('|', '&#124;')} |" for key, value in rows.items()),
    )  # fmt: skip
