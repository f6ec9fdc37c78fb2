"""What runs kernels: the compiled extension, Triton's launches and plans, the processor, the tuned parameters."""
