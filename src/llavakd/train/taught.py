"""What a teacher says of each row: written once, by `llava-kd cache`, and read in its place."""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llavakd.config import LossConfig, TeacherConfig
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch, RowDataset, collate
from llavakd.data.readers import reading
from llavakd.errors import UserError
from llavakd.losses.objective import row_places
from llavakd.losses.offline import Taught
from llavakd.losses.products import operand_dtype, product
from llavakd.losses.rows import rows_at_once
from llavakd.progress import bar, say
from llavakd.train.checkpoint import contents
from llavakd.train.step import TrainState, look

INDEX = "index.json"
_SHARD = 2**27  # bytes of ids in one file


def rows_of(batch: Batch) -> Iterator[tuple[str, Tensor, int]]:
    """Of each row that is used its name, its flat positions, and 64 bits of its ids, segments and pixels."""
    rows, _ = row_places(batch.labels, batch.position_ids)
    for number, name in enumerate(batch.sample_ids):
        where = ((rows == number) & (batch.segments != Segment.PADDING)).flatten().nonzero().squeeze(1)
        text = torch.stack([batch.input_ids.flatten()[where], batch.segments.flatten()[where].long()])
        found = hashlib.blake2b(text.numpy().tobytes(), digest_size=8)
        if batch.pixel_values is not None:
            found.update(batch.pixel_values[batch.image_rows == number].numpy().tobytes())
        if Segment.RESPONSE in text[1]:  # else it stands for a row that is left out
            yield name, where, int.from_bytes(found.digest(), "big", signed=True)


def key_of(teacher: TeacherConfig) -> list[str]:
    """What decides what a teacher says."""
    return [teacher.dtype, teacher.quantize, *contents(teacher.path)]


class TaughtStore:
    """A stage's part of a cache; UserError where there is none, or it is not what this teacher and these losses need."""

    def __init__(self, folder: Path, teacher: TeacherConfig, losses: LossConfig) -> None:
        self.index = json.loads(path.read_text(encoding="utf-8")) if (path := folder / INDEX).is_file() else {}
        if self.index.get("teacher") != key_of(teacher):
            reason = "is of another teacher" if self.index else "holds none"
            raise UserError(f"teacher.cache: {folder} {reason}; write it anew: llava-kd cache RECIPE")
        if losses.visual_kl and not self.index["visual_share"]:
            raise UserError(f"teacher.cache: {folder} has no visual tokens, but losses.visual_kl is {losses.visual_kl}")
        self._spans: dict[int, tuple[Any, int, int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            shard: Any = safe_open(file, "pt")  # memory-mapped
            ends = (counts := shard.get_tensor("counts")).cumsum(0)
            for key, start, end in torch.stack([shard.get_tensor("keys"), ends - counts, ends], 1).tolist():
                self._spans[key] = shard, start, end

    def add(self, batch: Batch) -> Batch:
        """The batch with what was said of it; UserError for a row whose text or pixels are not those that were shown."""
        found = []
        for name, where, key in rows_of(batch):
            if key not in self._spans:
                raise UserError(f"teacher.cache has no row {name!r} as it is now; write it anew: llava-kd cache RECIPE")
            shard, start, end = self._spans[key]
            parts = [shard.get_slice(part)[start:end] for part in ("places", "visual", "ids", "logp", "tail")]
            found.append([where[parts[0]], *parts[1:]])
        if not found:
            return batch
        places, seen, ids, logp, tail = map(torch.cat, zip(*found, strict=True))
        visual = torch.zeros(batch.visual.numel(), dtype=torch.bool).index_fill_(0, places[seen], True)
        total = logp.float().exp().sum(-1) + tail  # one, but for the rounding to two bytes
        taught = Taught(places, ids.long(), logp.float() - total.log()[:, None], tail / total)
        return dataclasses.replace(batch, visual=visual.view_as(batch.visual), taught=taught)


def write_taught(folder: Path, state: TrainState, dataset: RowDataset, index: dict[str, Any], *, workers: int) -> None:
    """Put what the teacher says of all rows into files of `folder`, with `index`, which says how.

    Of each row all positions that predict a response, and the `visual_share` of visual ones that its key draws: the
    `top_k` likeliest ids (int32), their log-probabilities (float16), the probability of all others (float32).
    Raises UserError: too little room.
    """
    if index["top_k"] > index["vocab_size"]:
        raise UserError(f"got --top-k {index['top_k']}, but the models share {index['vocab_size']} ids; lower it")
    together, held = functools.partial(collate, pad_token_id=state.student.tokenizer.pad_token_id), dict[str, Any]()
    spread = together([dataset[row] for row in range(0, len(dataset), -(-len(dataset) // 16))])
    size = len(dataset) / len(spread.sample_ids) * sum(part.nbytes for part in _said(state, spread, index).values())
    told, free = f"cache {state.stage.name}: about {size / 2**30:.2g} GiB", shutil.disk_usage(folder).free
    say(told)
    if free < size:
        raise UserError(f"{told}, but {free / 2**30:.2g} are free; lower --top-k or --visual-share")
    read, batches = reading(dataset, batch_size=16, num_workers=workers, collate_fn=together), -(-len(dataset) // 16)
    with bar(f"cache {state.stage.name}", batches) as advance, read as found:
        for number, batch in enumerate(found, start=1):
            for name, values in _said(state, batch, index).items():
                held.setdefault(name, []).append(values)
            if held and (number == batches or sum(ids.nbytes for ids in held["ids"]) > _SHARD):
                save_file({name: torch.cat(held.pop(name)) for name in [*held]}, folder / f"{number:07}.safetensors")
            advance(number)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


@torch.no_grad()
def _said(state: TrainState, batch: Batch, index: dict[str, Any]) -> dict[str, Tensor]:
    """What a file holds of these rows; `places` are from a row's start."""
    predicts = torch.nn.functional.pad(row_places(batch.labels, None)[1], (0, 1)).flatten()
    table, chosen, visual = [], [], batch.visual.flatten()
    for _, where, key in rows_of(batch):
        pictured = visual[where].nonzero().squeeze(1)
        drawn = torch.randperm(len(pictured), generator=torch.Generator().manual_seed(key))
        seen = torch.zeros(len(where), dtype=torch.bool)
        seen[pictured[drawn[: round(index["visual_share"] * len(pictured))]]] = True
        places = (seen | predicts[where]).nonzero().squeeze(1)
        table.append((torch.tensor([key]), torch.tensor([len(places)]), places, seen[places]))
        chosen.append(where[places])
    if not table:
        return {}
    hidden: Any = look(state, batch)[1]
    live, head = hidden.flatten(0, 1)[torch.cat(chosen).to(hidden.device)], state.teacher.head  # type: ignore[union-attr]
    head = head[: index["vocab_size"]].to(operand_dtype(live))
    said = []
    for rows in live.split(rows_at_once(len(head), 4, live.device.type)):
        logp = product(rows.to(head.dtype), head.T).log_softmax(-1)
        values, ids = logp.topk(index["top_k"])
        said.append((ids.int(), values.half(), logp.scatter(1, ids, -torch.inf).exp().sum(-1)))
    columns = [torch.cat(parts).cpu() for rows in (table, said) for parts in zip(*rows, strict=True)]
    return dict(zip(("keys", "counts", "places", "visual", "ids", "logp", "tail"), columns, strict=True))
