"""Distillation losses over rows of hidden states; they return weighted sums and know nothing of models or data."""

from llavakd.losses.objective import objective
from llavakd.losses.offline import distill_rows_topk
from llavakd.losses.relation import gram, relation_distance
from llavakd.losses.rows import LogitForm, RowLosses, distill_rows

__all__ = ["LogitForm", "RowLosses", "distill_rows", "distill_rows_topk", "gram", "objective", "relation_distance"]
