"""What every room uses and nothing about diffusion: files, streams, checks of arguments, memory, pictures."""
