"""What a training step and a sampler hand over to a network as its condition."""

import pytest
import torch

from conditions.condition import condition_of
from conftest import small_dit

LABELS, DROP = torch.tensor([3, 1, 2]), torch.tensor([0, 1, 0])


def handed_over(**changes):
    """The condition of a network, and its keywords in sampling and in training."""
    condition = condition_of(small_dit(**changes))
    return condition, condition.keywords(LABELS), condition.dropped(LABELS, DROP)


def test_labels_are_handed_over_dropped_and_doubled():
    condition, plain, dropped = handed_over()
    assert condition.has_null and plain == {"y": LABELS}
    assert dropped == {"y": LABELS, "force_drop_ids": DROP}
    assert condition.doubled(LABELS)["y"].tolist() == [3, 1, 2, 10, 10, 10]
    assert condition.blank(2, "cpu").tolist() == [0, 0]


@pytest.mark.parametrize("changes, keywords", [
    (dict(class_dropout_prob=0.0), {"y": LABELS}), (dict(num_classes=0), {}),
])  # fmt: skip
def test_without_a_null_label_nothing_is_dropped_or_guided(changes, keywords):
    condition, plain, dropped = handed_over(**changes)
    assert not condition.has_null and plain == dropped == keywords
    with pytest.raises(ValueError, match="needs a null label.*`cfg_scale=1`"):
        condition.doubled(LABELS)
