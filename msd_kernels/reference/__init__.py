"""Every op in plain PyTorch: the oracle that tests compare with, on any device, in any floating dtype."""
