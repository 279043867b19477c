"""Options that are of another kind than their field, as Python code may give them."""

from functools import partial
from pathlib import Path

import pytest

from sampling.options import ManyOptions, SamplingOptions
from training.options import TrainOptions

MADE = {
    "train": partial(TrainOptions, data_path="x"), "sample": SamplingOptions, "many": ManyOptions,
}  # fmt: skip


@pytest.mark.parametrize("made, name, value, wanted", [
    ("train", "flip", "no", "it is true or false"), ("train", "learn_sigma", 1, "it is true"),
    ("train", "data_path", 3, "give a text"), ("train", "results_dir", None, "give a value"),
    ("train", "vae", "", "give a text"), ("train", "lr", None, "give a number"),
    ("train", "ema_decay", ["0.9"], "each must be at least 0"),
    ("sample", "compile", "yes", "it is true or false"),
    ("sample", "cfg_scale", None, "give a number"),
    ("many", "sample_dir", 3, "give a text"),
    ("many", "num_fid_samples", None, "give a number"),
])  # fmt: skip
def test_a_value_of_another_kind_is_refused(made, name, value, wanted):
    with pytest.raises(ValueError, match=f"^`{name}` is .*{wanted}"):
        MADE[made](**{name: value})


@pytest.mark.parametrize("seed", ["4", 1.0, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="^the seed is .*; give a whole number$"):
        ManyOptions(global_seed=seed)


def test_paths_may_be_texts_or_paths_and_what_may_be_left_out_none():
    assert TrainOptions(data_path=Path("a"), learn_sigma=None, resume=None).data_path == "a"
    assert ManyOptions(sample_dir=Path("b")).sample_dir == "b"
