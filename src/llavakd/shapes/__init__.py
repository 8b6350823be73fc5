"""The Shapes world: drawn pictures with questions of known answers, small enough to run all three stages in minutes."""
