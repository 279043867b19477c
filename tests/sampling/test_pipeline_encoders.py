"""A whole pipeline of diffusers is sampled by prompts: its encoders read them as it does itself."""

from diffusers import (
    AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline,
)  # fmt: skip
import pytest
import torch

from conditions.encoders import reader_of
from sampling import load_sampler
from small_encoders import save_clip, save_t5

PROMPTS = ["a thin seven leaning left", "three", ""]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """(the folder of a small pipeline with all of its encoders, the pipeline)."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    folder = tmp_path_factory.mktemp("sd3")
    clips = [save_clip(folder / f"clip{n}", n, width=12, length=77) for n in (1, 2)]
    places = [*clips, save_t5(folder / "t5")]
    kinds = [CLIPTextModelWithProjection] * 2 + [T5EncoderModel]
    texts = [kind.from_pretrained(place).eval() for kind, place in zip(kinds, places)]
    words = [AutoTokenizer.from_pretrained(place, model_max_length=77) for place in places]
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24,
        caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=32)
    made = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, texts[0], words[0], texts[1],
        words[1], texts[2], words[2],
    )  # fmt: skip
    made.save_pretrained(folder / "pipeline")
    return folder / "pipeline", made


def test_prompts_are_read_as_the_pipeline_reads_them(pipeline):
    folder, theirs = pipeline
    sampler = load_sampler(folder, steps=2, sampler="euler", device="cpu")
    ours = sampler.reader.encode(PROMPTS)
    tokens, _, pooled, _ = theirs.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, device="cpu", do_classifier_free_guidance=False
    )
    assert ours.mask is None
    torch.testing.assert_close(ours.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-5)


def test_a_pipeline_is_sampled_by_prompts(pipeline):
    sampler = load_sampler(pipeline[0], steps=2, sampler="euler", cfg_scale=3.0, device="cpu")
    images = sampler.images(PROMPTS)
    assert images.shape == (3, 8, 8, 3)
    assert (images[0] != images[2]).any()


def test_a_pipeline_without_an_encoder_says_what_is_missing(pipeline, tmp_path):
    folder, _ = pipeline
    for name in ("transformer", "vae", "scheduler", "model_index.json", "text_encoder"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ValueError, match="with all of its text encoders"):
        load_sampler(tmp_path, steps=2, device="cpu")


def test_encoders_whose_files_are_not_known_are_taken_and_others_are_not(pipeline):
    folder, _ = pipeline
    says = load_sampler(folder, steps=2, device="cpu").network.text
    assert [one["sha256"] for one in says] == [""] * 3
    says = [*says[:2], says[2] | {"length": 7}]
    assert reader_of(says).parts == [77, 7]
    with pytest.raises(ValueError, match="give those"):
        reader_of([says[0] | {"length": 70}, *says[1:]])
