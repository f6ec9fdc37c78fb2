"""Programs for those who work on the kernels: what they compile to, without a GPU."""
