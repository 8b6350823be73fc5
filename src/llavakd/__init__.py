"""LLaVA-KD."""
