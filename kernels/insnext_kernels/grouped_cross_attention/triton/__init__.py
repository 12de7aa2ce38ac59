"""Kernels of grouped cross-attention and their launchers. Importing a module of these needs Triton."""
