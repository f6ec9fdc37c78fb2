"""Every op as a loop of PyTorch's own calls over the stages: cuDNN, oneDNN and SDPA on each segment."""
