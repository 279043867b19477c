"""Text encoders and a CLIP of random weights in a few kilobytes, for tests of what reads them."""

from pathlib import Path

import torch

WORDS = ("a", "thin", "thick", "three", "seven", "leaning", "left", "right", "one", "Übermut")
T5_WIDTH, CLIP_WIDTH, PROJECTED, CLIP_LENGTH, IMAGE = 24, 16, 8, 10, 32


def tokenizer(vocabulary, begin, end, pad):
    """A tokenizer of whole words, which are put between `begin`, if any, and `end`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [word for word in (begin, end) if word]
    made.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, (begin, "$A", end))),
        special_tokens=[(word, vocabulary.index(word)) for word in around],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token=end, unk_token="<unk>",
        **({"bos_token": begin} if begin else {}),
    )  # fmt: skip


def randomly(network, seed):
    """The network with N(0, 0.2²) in every parameter."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    return network.eval()


def clip_sizes(seed, width=CLIP_WIDTH, length=CLIP_LENGTH):
    vocabulary = ["<unk>", *WORDS, "<s>", "</s>"]
    return vocabulary, dict(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=length,
        projection_dim=PROJECTED, bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )  # fmt: skip


def save_clip(
    folder, seed=0, kind="CLIPTextModelWithProjection", width=CLIP_WIDTH, length=CLIP_LENGTH
):
    """A folder with a CLIP's text encoder."""
    import transformers

    vocabulary, sizes = clip_sizes(seed, width, length)
    network = getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes))
    randomly(network, seed).save_pretrained(folder)
    tokenizer(vocabulary, "<s>", "</s>", "</s>").save_pretrained(folder)
    return str(folder)


def save_t5(folder, seed=0):
    """A folder with T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    vocabulary = ["<pad>", "</s>", "<unk>", *WORDS]
    config = T5Config(
        vocab_size=len(vocabulary), d_model=T5_WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    randomly(T5EncoderModel(config), seed).save_pretrained(folder)
    tokenizer(vocabulary, None, "</s>", "<pad>").save_pretrained(folder)
    return str(folder)


def save_both(folder, seed=0):
    """A folder with a CLIP of text and images, which are squares of IMAGE pixels."""
    from transformers import CLIPConfig, CLIPModel

    vocabulary, sizes = clip_sizes(seed)
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=IMAGE, patch_size=8, projection_dim=PROJECTED,
    )  # fmt: skip
    config = CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=PROJECTED)
    randomly(CLIPModel(config), seed).save_pretrained(folder)
    tokenizer(vocabulary, "<s>", "</s>", "</s>").save_pretrained(folder)
    return str(folder)


def save_encoders(folder):
    """[two CLIPs, of widths 16 and 12, and a T5]: folders below one."""
    folder = Path(folder)
    return [
        save_clip(folder / "clip", 1), save_clip(folder / "other-clip", 2, width=12),
        save_t5(folder / "t5", 3),
    ]  # fmt: skip
