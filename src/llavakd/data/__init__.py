"""From a LLaVA-format file to batches: samples -> chat -> collate, in the order that sampler gives."""
