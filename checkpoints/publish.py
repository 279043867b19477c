"""Networks for others: folders as the Hugging Face hub has them, and pipelines of diffusers.

A pretrained folder has `model.safetensors`, `config.json` (the network's class and arguments, class
names under id2label) and a model card, `README.md`. Reading is checkpoints.load_weights' task; here
are the hub's names, and what writes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import diffusers
from diffusers import DiTPipeline
from safetensors import SafetensorError
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.diffusers_format import OWN_CLASSES, OWN_TEXT
from checkpoints.formats import EULER, FORMATS as THEIRS
from checkpoints.loading import (
    build_network, check_trained_size, choose_vae, class_names, find_checkpoint, process_learned,
    recorded_vae,
)  # fmt: skip
from checkpoints.names import PRETRAINED, local_path
from checkpoints.network_config import with_process
from checkpoints.networks import CLASS, OURS, Network, class_in, makes_clips, reads_text
from checkpoints.weights import (
    Weights, check_classes, check_readable, id2label, load_weights, save_weights,
)  # fmt: skip
from diffusion import create_diffusion
from runtime.disk import check_name, check_writable
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from processes.process import Process
from processes.table import process_of
from runtime.json_files import read_json
from vae import LatentSpace, Space, latent_shape, load_vae

RELEASED_VAE = "ema"  # for the released weights, where nobody names the autoencoder
FORMATS = ("hub", "diffusers", "safetensors")


def export_checkpoint(
    choice: NetworkChoice, output: Path | str, format: str = "hub", half: bool = False
) -> None:
    """Write a chosen network in a form that others read: "hub", a pretrained folder; "diffusers", a
    pipeline of diffusers with the autoencoder; "safetensors", one file.

    With `half` the numbers are in float16, in half of the space. The autoencoder is the one that is
    given, else the pipeline's own, else the one that the checkpoint names. Raises ValueError if
    nobody names one, if the output exists, or for a network that cannot be written so; OSError
    where the disk refuses.
    """
    output = Path(output)
    check_name(output)
    if format not in FORMATS:
        raise ValueError(f"`format` is {format}; give one of {', '.join(FORMATS)}")
    if os.path.lexists(output):  # a link that leads nowhere is somebody's as well
        raise ValueError(f"`output` {output} exists already; give another name")
    if format == "safetensors":
        check_writable(output)
        if output.suffix != ".safetensors":
            raise ValueError(
                f"`output` {output} is to be one file; give a name that ends in .safetensors"
            )
    checkpoint = find_checkpoint(choice)
    weights = load_weights(checkpoint, choice.weights)
    vae = _trained_with(choice, checkpoint, weights)
    network, classes = build_network(choice, weights, vae), class_names(choice, weights)
    check_trained_size(choice, network, latent_shape(vae))
    if half:
        halve(network)
    process = process_learned(choice, weights, network)
    if format == "diffusers":
        check_pipeline(process, network)
        export_diffusers(network, load_vae(vae), output, classes, process)
    elif format == "hub":
        save_pretrained(network, output, classes, weights.training, vae, process)
    else:
        tensors = network.state_dict()
        said, text = process.config, weights.text
        weights = Weights(tensors, network.config, classes, process=said, text=text)
        save_weights(output, weights)


def halve(network: Network) -> None:
    """Cast a network to float16. Raises ValueError if a weight is too large for it."""
    network.half()
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"`half`: {name} has a number beyond {torch.finfo(torch.half).max:,.0f}, which "
                "float16 does not have; export without it"
            )


def _trained_with(choice, checkpoint, weights):
    """The autoencoder's name: as given, the pipeline's own, or what the checkpoint says.

    Raises ValueError if nobody says it.
    """
    released = RELEASED_VAE if choice.ckpt is None else None
    vae = choose_vae(choice, checkpoint) or recorded_vae(weights) or released
    if vae is None:
        raise ValueError(
            f"{choice.ckpt} does not say behind which autoencoder it was trained; pass `vae`"
        )
    return vae


def save_pretrained(
    network: Network, folder: Path | str, classes: list[str] | None = None,
    training: dict | None = None, vae: str | None = None, process: Process | None = None,
) -> None:  # fmt: skip
    """Write a network as a pretrained folder: weights, config.json and model card.

    For the card: training, the {"step", "args"} of its run, and vae, the name of its autoencoder.
    `process` is what the network has learned; None for what it was loaded with, else the Gaussian
    process. Raises ValueError if the folder has files already, or cannot be written.
    """
    check_classes(classes, network.config, "the network")
    check_readable(classes)
    process = process or process_of(network)
    said, text = process.config, getattr(network, "text", None)
    with whole_folder(folder) as partial:
        tensors = {name: value.detach().cpu() for name, value in network.state_dict().items()}
        weights = Weights(tensors, network.config, classes, process=said, text=text)
        save_weights(partial / PRETRAINED, weights)
        names = {"id2label": id2label(classes)} if classes else {}
        contents = {CLASS: OURS, **with_process(network.config, said, text), **names}
        (partial / "config.json").write_text(
            json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        # Arguments of the run may be paths that are no UTF-8
        card = model_card(network, classes, training, vae, process)
        (partial / "README.md").write_text(card, encoding="utf-8", errors="replace")


class Pipeline(NamedTuple):
    """A pipeline of diffusers that a class of our networks goes into: names of diffusers' classes
    of pipeline and network, and the parts of the pipeline that are left out, the encoders of text.
    `process` is the one that it samples, `shifts` whether it also takes latents that are shifted;
    `scheduler` makes its scheduler.
    """

    name: str
    transformer: str
    process: type[Process]
    scheduler: Callable[[Process], Any]
    shifts: bool = False
    without: tuple[str, ...] = ()


def gaussian_scheduler(kind: str, **options: Any) -> Any:
    """A scheduler of diffusers, of this class, with the betas of the Gaussian process."""
    betas = create_diffusion("").betas
    return getattr(diffusers, kind)(
        num_train_timesteps=len(betas), beta_start=float(betas[0]), beta_end=float(betas[-1]),
        beta_schedule="linear", **options,
    )  # fmt: skip


def ddim_scheduler(process: Process) -> Any:
    """The DDIM scheduler of the Gaussian process, with our own times."""
    return gaussian_scheduler(
        "DDIMScheduler", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )


def multistep_scheduler(process: Process) -> Any:
    """The multistep scheduler of the Gaussian process, as PixArt's pipelines have it."""
    return gaussian_scheduler("DPMSolverMultistepScheduler")


def euler_scheduler(process: Process) -> Any:
    """The scheduler of a flow, its times shifted as in training.

    Raises ValueError for a flow on another path than the straight one, or of another prediction
    than the velocity.
    """
    flow = process.config
    if (flow["path"], flow["prediction"]) != ("linear", "velocity"):
        raise ValueError(
            f"diffusers' {EULER} is for the velocity on the path linear, and this network has "
            f"learned the {flow['prediction']} on the path {flow['path']}"
        )
    return getattr(diffusers, EULER)(shift=flow["time_shift"])


PIPELINES = {  # by the class of our network
    OURS: Pipeline("DiTPipeline", "DiTTransformer2DModel", GaussianProcess, ddim_scheduler),
    "MMDiT": Pipeline(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", FlowProcess, euler_scheduler, True,
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
         "tokenizer_3"),
    ),
    "PixArt": Pipeline(
        "PixArtAlphaPipeline", "PixArtTransformer2DModel", GaussianProcess, multistep_scheduler,
        without=("text_encoder", "tokenizer"),
    ),
}  # fmt: skip


def check_pipeline(process: Process, network: Network) -> None:
    """Raise ValueError for a network that goes into no pipeline of diffusers', and for a process
    that its pipeline cannot sample.
    """
    kind, instead = class_in(network.config), (
        'write a folder for the hub (`format="hub"`) or one file (`format="safetensors"`)'
    )
    if kind not in PIPELINES:
        raise ValueError(f"a {kind} goes into no pipeline of diffusers'; {instead}")
    pipeline = PIPELINES[kind]
    if not isinstance(process, pipeline.process):
        raise ValueError(
            f"diffusers' {pipeline.name} cannot sample a {process.word}; {instead}"
        )


def export_diffusers(
    network: Network, space: Space, folder: Path | str, classes: list[str] | None = None,
    process: Process | None = None,
) -> None:  # fmt: skip
    """Write a network and its LatentSpace as the pipeline of PIPELINES that it goes into.

    The network was trained behind that space. `process` is what it has learned; None for what it
    was loaded with, else the Gaussian process. Of a DiT, `load_exported` loads the folder and gives
    our numbers; DiTPipeline.from_pretrained loads it as well, and is a little off (see there). Of a
    network that reads captions, the encoders of text are not in it: they are given to
    from_pretrained, or the pipeline is called with what they gave. Raises ValueError for a network,
    process or space that diffusers' pipeline cannot have, and as save_pretrained.
    """
    process, kind = process or process_of(network), class_in(network.config)
    check_pipeline(process, network)
    row, theirs = PIPELINES[kind], THEIRS[kind]
    dtype = next(network.parameters()).dtype
    autoencoder = decoder(space, row).to(dtype)
    check_classes(classes, network.config, "the network")
    check_readable(classes)
    config, scheduler = theirs.config_to(network.config), row.scheduler(process)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    transformer = getattr(diffusers, row.transformer)(**public)
    kept = {OWN_CLASSES: classes, OWN_TEXT: getattr(network, "text", None)}
    transformer.register_to_config(**config, **{key: one for key, one in kept.items() if one})
    # strict: every weight of theirs is given
    transformer.load_state_dict(theirs.tensors_to(network.state_dict(), network.config))
    with quiet(), whole_folder(folder) as partial:
        getattr(diffusers, row.name)(
            transformer=transformer.eval().to(dtype), vae=autoencoder, scheduler=scheduler,
            **dict.fromkeys(row.without),
        ).save_pretrained(partial)  # fmt: skip
        if classes:  # the pipeline reads them and does not write them
            index = partial / "model_index.json"
            contents = json.loads(index.read_text(encoding="utf-8")) | {
                "id2label": id2label(classes)
            }
            index.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' warnings, which are of the parts that are left out."""
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(before)


def decoder(space: Space, row: Pipeline) -> Any:
    """The autoencoder of a Space, as diffusers' pipeline decodes with it.

    Raises ValueError for a space without one, or whose latents the pipeline takes otherwise.
    """
    if not isinstance(space, LatentSpace):
        raise ValueError(
            "diffusers' pipeline decodes latents, and this network makes pixels; it cannot be "
            "exported"
        )
    if not isinstance(space.scale, (int, float)):
        raise ValueError(
            "the autoencoder's latents are normalised in each channel (latents_mean and "
            "latents_std), which diffusers' pipeline leaves out"
        )
    if space.shift and not row.shifts:
        raise ValueError(
            f"the autoencoder's latents are shifted by {space.shift}, which diffusers' pipeline "
            "leaves out"
        )
    return space.autoencoder


def load_exported(folder: Path | str) -> DiTPipeline:
    """The DiTPipeline in a folder, or on the hub, with the timestep frequencies of a DiT.

    diffusers divides their exponents by 127 where DiT has 128, and its configuration cannot say so.
    Raises ValueError for a folder whose parts are not diffusers' own, and OSError or ValueError,
    diffusers', if it cannot be loaded.
    """
    folder = local_path(folder)
    for name, part in read_json(folder / "model_index.json").items():
        if isinstance(part, list) and part[:1] not in (["diffusers"], [None]):
            raise ValueError(
                f"{folder}: its {name} is of {part[:1]}, not of diffusers; code in a folder is "
                "never run"
            )
    pipeline = DiTPipeline.from_pretrained(folder)
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return pipeline


def check_free(folder: Path | str) -> None:
    """Raise ValueError if a folder that is to be written has files, or is a file."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give another name")


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if nothing is raised; a link stays one, and what it
    leads to is written.

    Raises ValueError if that has files or cannot be made.
    """
    folder = Path(os.path.realpath(folder))
    try:
        check_free(folder)
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
            f"cannot write {folder} ({reason}); nothing is left of it: make room or choose another "
            "place, and give the command again"
        ) from None


# Class of network → its paper, in a card
LATTE = "for clips, after Latte, [Ma et al. 2024](https://arxiv.org/abs/2401.03048)"
PAPERS = {
    "DiT": "DiT, [Peebles & Xie 2023](https://arxiv.org/abs/2212.09748)",
    "DynamicDiT": "a dynamic DiT, after [Zhao et al. 2024](https://arxiv.org/abs/2410.03456)",
    "MMDiT": "MM-DiT, [Esser et al. 2024](https://arxiv.org/abs/2403.03206)",
    "PixArt": "PixArt-α, [Chen et al. 2023](https://arxiv.org/abs/2310.00426)",
    "VideoDiT": LATTE, "TextVideo": LATTE,
    "ExitDiT": "DiT with early exits by time, [2408.05927](https://arxiv.org/abs/2408.05927)",
}  # fmt: skip

CARD = """---
library_name: pytorch
pipeline_tag: {task}
tags:
- dit
- diffusion
---

# {title}

A diffusion transformer ({paper}), \
{parameters:,} parameters, that makes
{what}. It is for the PyTorch implementation at REPOSITORY; transformers and diffusers do not \
read it.

| | |
|---|---|
{rows}

## Use

In a clone of REPOSITORY, after `pip install .`:

```bash
python sample.py --ckpt OWNER/NAME --vae {vae}{prompt}
```

```python
from checkpoints import load_pretrained

network, classes = load_pretrained("OWNER/NAME")   # or a path to this folder
```

## Data, evaluation, licence

To be filled in by whoever publishes this: REPOSITORY, OWNER/NAME and, if it stands above, VAE; \
what it was trained on, how good
its samples are and how that was measured, what it must not be used for, and under which licence \
it is given.
"""


def model_card(
    network: Network, classes: list[str] | None = None, training: dict | None = None,
    vae: str | None = None, process: Process | None = None,
) -> str:  # fmt: skip
    """A model card in Markdown, filled with what the network and its checkpoint say.

    `process` is as in save_pretrained.
    """
    config, args = network.config, (training or {}).get("args") or {}
    rows = {
        key.strip("_").replace("_", " "): value
        for key, value in config.items() if value is not None
    }  # fmt: skip
    if process is not None and not isinstance(process, GaussianProcess):
        rows["process"] = ", ".join(f"{name} {value}" for name, value in process.config.items())
    if training:
        shown = (
            "model", "image_size", "global_batch_size", "lr", "ema_decay", "mixed_precision",
            "global_seed",
        )  # fmt: skip
        rows |= {"training steps": training.get("step")} | {
            key.replace("_", " "): args[key] for key in shown if key in args
        }
    if encoders := getattr(network, "text", None):
        names = [str(one.get("name")) for one in encoders]
        # Of a folder of this machine the last part alone
        rows["text encoders"] = ", ".join(
            Path(name).name if Path(name).is_absolute() else name for name in names
        )
    if classes:
        rows["classes"] = ", ".join(classes[:10]) + (
            f" and {len(classes) - 10} more" if len(classes) > 10 else ""
        )
    vae = str(vae or args.get("vae", "VAE"))
    with suppress(OSError, ValueError):  # of what is no path
        # A folder of this machine
        vae = "VAE" if Path(vae).is_absolute() or Path(vae).is_dir() else vae
    task, what = made_by(network)
    return CARD.format(
        title=args.get("model", class_in(config)), vae=vae, paper=PAPERS[class_in(config)],
        parameters=sum(p.numel() for p in network.parameters()), task=task, what=what,
        prompt=' --prompt "WORDS"' if reads_text(network) else "",
        rows="\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
    )  # fmt: skip


def made_by(network: Network) -> tuple[str, str]:
    """What a network is for: (the hub's name of the task, in words)."""
    many, one = ("clips", "video") if makes_clips(network) else ("images", "image")
    if network.num_classes:
        return "other", f"{many} of {network.num_classes} classes"
    if reads_text(network):
        return f"text-to-{one}", f"{many} of captions"
    return "other" if makes_clips(network) else "unconditional-image-generation", many


def _cell(value):
    """A value in one line of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "&#124;")
