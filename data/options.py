"""What a user chooses of data: the source that training reads, and the cache that is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conditions.encoders import T5_LENGTH
from data.shapes import SQUARE
from runtime.image_size import ImageSize, settled

LABELS, TEXT = CONDITIONS = ("labels", "text")  # what may be learned with the images


@dataclass(frozen=True)
class DataOptions:
    """Which source training reads, and what it must fit. None: not given."""

    data_path: Path | str | None = None  # a folder of images
    latents: Path | str | None = None  # a folder of cached latents
    image_size: ImageSize = 256  # pixels along each side, or (height, width), after the crop
    num_classes: int = 1000  # 0: none, all images below data_path
    flip: bool = True  # whether mirror images are asked for
    skip_bad_images: bool = False  # whether the next image stands in for an unreadable one
    vae: str = "ema"  # the autoencoder, which cached latents must come from
    sizes: str = SQUARE  # or "buckets" or "own": images keep their aspect (data/shapes.py)
    frames: int | None = None  # of the clips to learn from; None: images
    frame_stride: int = 1  # every so many frames of a clip one is taken
    frame_rate: float | None = None  # frames per second that clips are brought to; None: their own
    patch_size: int = 2  # of the network; with the autoencoder's ratio, the pixels of a token
    condition: str = LABELS  # or "text": captions
    text_length: int | None = None  # tokens of a caption, for a network's own encoder
    # Encoders outside of the network, whose output lies beside the latents
    text_encoder: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", settled(self.image_size))


@dataclass(frozen=True)
class TextCacheOptions:
    """What cache_text reads and writes: what encoders make of captions, beside cached latents."""

    data_path: Path | str  # the folder of images with captions, as for CacheOptions
    output: Path | str  # the folder of their latents
    text_encoder: Sequence[str]  # each a local folder or a hub id of a T5 or CLIP
    text_length: int = T5_LENGTH  # tokens that a T5 reads
    num_classes: int = DataOptions.num_classes  # as for CacheOptions
    latents_dtype: str = "float16"  # or "float32": how the output is stored
    tf32: bool = True  # whether NVIDIA GPUs may use TF32
    device: str | None = None  # such as "cpu" or "cuda:1"; None: the GPU if there is one


@dataclass(frozen=True)
class CacheOptions:
    """What cache_latents reads and writes. None: not given."""

    data_path: Path | str  # a folder with one folder of images per class
    output: Path | str  # the folder to write
    image_size: ImageSize = DataOptions.image_size  # after the crop
    num_classes: int = DataOptions.num_classes  # 0: none, all images below data_path
    flip: bool = DataOptions.flip  # whether mirror images are cached as well
    skip_bad_images: bool = DataOptions.skip_bad_images
    vae: str = DataOptions.vae  # "ema", "mse", a hub id, or a local folder
    sizes: str = DataOptions.sizes  # or "buckets" or "own": images keep their shape
    patch_size: int = DataOptions.patch_size  # of networks to train, where images keep their shape
    clips: bool = False  # whether data_path holds clips, of which all frames are cached
    frame_rate: float | None = DataOptions.frame_rate  # that clips are brought to before
    latents_dtype: str = "float16"  # or "float32"
    tf32: bool = True  # whether NVIDIA GPUs may use TF32
    num_workers: int = 4  # loader processes of each process
    device: str | None = None  # such as "cpu" or "cuda:1"; None: the GPU if there is one

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", settled(self.image_size))
