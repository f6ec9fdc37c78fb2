"""Adapters for tools that know PyTorch's own layers alone; each module needs its tool, the package needs none."""
