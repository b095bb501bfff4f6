"""Measurements of the generated kernels on a GPU: `python -m benchmarks.gpu --help`, docs/gpu.md."""
