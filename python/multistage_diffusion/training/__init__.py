"""Training: configuration, batches, the trainer, and what a run folder holds."""
