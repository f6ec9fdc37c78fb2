"""Images to train on, and their augmentation."""
