"""Class labels as vectors."""

import torch
from torch import Tensor, nn


class LabelEmbedder(nn.Module):
    """A class label as a vector, with label dropout for guidance (Ho & Salimans 2022)."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.null_label = num_classes if dropout_prob > 0 else None  # "no class", the last row
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Labels (N,), some made null: those with a 1 in force_drop_ids (N,), or drawn if None.

        Raises ValueError if the model was built without dropout and so has no null label.
        """
        if self.null_label is None:
            raise ValueError("no label can be dropped: the model was built with "
                             "class_dropout_prob=0; build it with more")  # fmt: skip
        if force_drop_ids is None:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.null_label, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        """labels (N,) → (N, D); force_drop_ids, if given, drops some of them, else train does."""
        if force_drop_ids is not None or (train and self.null_label is not None):
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)
