"""Samplers, the plans of their steps, and networks captured in CUDA graphs."""
