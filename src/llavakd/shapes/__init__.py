"""The Shapes world: drawn pictures with questions of known answers, small enough to run all three stages in minutes."""

from llavakd.shapes.world import examples, write_world

__all__ = ["examples", "write_world"]
