"""Teach the world's vision tower what stands in each cell of a picture, before any language: two minutes on a CPU.

    python recipes/shapes/make_tower.py OUT

A tower that had only captioned in reading order hid shapes and places from whoever read its tokens one by one
(docs/log.md), and no language model learnt to look things up. So each visual token is taught to tell, through linear heads that are thrown away, its cell, and the size, colour and shape
in it: labelled pretraining, as towers have had since ImageNet.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from llavakd.models.parts import load_image_processor
from llavakd.progress import bar, say
from llavakd.shapes.scenes import COLORS, PLACES, SHAPES, SIZES, Scene, draw, scene_in

PARTS = Path(__file__).parents[2] / "src" / "llavakd" / "assets" / "shapes" / "parts" / "tower"
CLASSES = (len(PLACES), 1 + len(SIZES), 1 + len(COLORS), 1 + len(SHAPES))  # 0: an empty cell
STEPS, BATCH, RATE, SEED = 800, 128, 1.5e-3, 0


def contents(scene: Scene) -> np.ndarray:
    """int64 [9, 4]: cell, size, colour and shape of every cell."""
    labels = np.zeros((len(PLACES), 4), np.int64)
    labels[:, 0] = np.arange(len(PLACES))
    for thing in scene.things:
        named = (SIZES.index(thing.size), COLORS.index(thing.color), SHAPES.index(thing.shape))
        labels[thing.cell, 1:] = 1 + np.array(named)
    return labels


def train_tower() -> tuple[nn.Module, dict[str, float]]:
    """The tower and how often each head was right in the last 10 steps, on pictures it had not seen before."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    config = AutoConfig.from_pretrained(PARTS)
    config = getattr(config, "vision_config", config)
    config.vision_use_head = False
    tower, processor = AutoModel.from_config(config), load_image_processor(str(PARTS))
    norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
    heads = nn.ModuleList(nn.Linear(config.hidden_size, classes) for classes in CLASSES)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], betas=(0.9, 0.98), weight_decay=0.01)
    right: list[Tensor] = []
    with bar("tower", STEPS) as advance:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / STEPS)) / 2
            scenes = [scene_in("train", rng) for _ in range(BATCH)]
            pixels = processor(images=[draw(scene, rng) for scene in scenes], return_tensors="pt").pixel_values
            labels = torch.from_numpy(np.stack([contents(scene) for scene in scenes]))
            tokens = norm(tower(pixels, output_hidden_states=True).hidden_states[-1])
            logits = [head(tokens) for head in heads]
            loss = sum(
                nn.functional.cross_entropy(one.flatten(0, 1), labels[..., part].flatten())
                for part, one in enumerate(logits)
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            right.append(
                torch.stack([(one.argmax(-1) == labels[..., part]).double().mean() for part, one in enumerate(logits)])
            )
            if (step + 1) % 50 == 0:
                advance(step + 1, f"loss {float(loss):.4f}")
    last = torch.stack(right[-10:]).mean(0).tolist()
    return tower, dict(zip(("cell", "size", "color", "shape"), last, strict=True))


def main() -> None:
    """Parse, train, write an ordinary transformers folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    tower, right = train_tower()
    tower.save_pretrained(out)
    load_image_processor(str(PARTS)).save_pretrained(out)
    say(f"{out}: " + ", ".join(f"{name} {share:.4f}" for name, share in right.items()))


if __name__ == "__main__":
    main()
