"""Vision Mamba: images through bidirectional state space models."""
