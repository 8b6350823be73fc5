"""The Shapes world: drawn pictures with questions, written as an ordinary LLaVA-format folder.

It is small enough to run all three stages of the distillation in minutes on one machine, every answer in it is
known, and no kind of question can be answered well without looking.
"""

from llavakd.shapes.world import WorldSummary, examples, write_world

__all__ = ["WorldSummary", "examples", "write_world"]
