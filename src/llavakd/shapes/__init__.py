"""The Shapes world: drawn pictures with questions of known answers, small enough to run all three stages in minutes."""

from llavakd.config import WorldConfig
from llavakd.shapes.world import examples, write_world

__all__ = ["WorldConfig", "examples", "write_world"]
