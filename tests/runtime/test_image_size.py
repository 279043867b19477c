"""Sizes of images as users write them, and as files have them."""
from argparse import ArgumentTypeError
import json

import pytest

from runtime.command_line import read_size
from runtime.image_size import settled, sides, written


@pytest.mark.parametrize("text, size", [
    ("256", 256), ("256x384", (256, 384)), ("384x256", (384, 256)), ("32x32", 32),
    ("+8x1_0", (8, 10)),
])  # fmt: skip
def test_a_size_is_read_and_written_height_first(text, size):
    assert read_size(text) == size and read_size(written(size)) == size
    assert settled(json.loads(json.dumps(size))) == size
    assert sides(size) == (size if isinstance(size, tuple) else (size, size))


NONE = ["256*384", "256x", "x3", "1e9", "x", "8x8x8", "8.0x8", "", "9" * 5000]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_size_gets_a_sentence(text):
    with pytest.raises(ArgumentTypeError, match="is no size; give pixels, such as 256, or HEIGHTx"):
        read_size(text)


@pytest.mark.parametrize("size", ["256", 8.0, True, [8], [8, 8, 8], [8, None], None, [True, 8]])
def test_other_values_from_python_or_files_are_refused(size):
    with pytest.raises(ValueError, match="^`image_size` is .*; give a whole number of pixels"):
        settled(size)
