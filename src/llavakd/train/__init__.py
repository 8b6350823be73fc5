"""One stage's training: step.py is the arithmetic, loop.py the order of things, checkpoint.py what survives."""
