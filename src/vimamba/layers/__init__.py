"""The parts of Vision Mamba."""
