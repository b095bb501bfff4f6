"""Lowerings: fast implementations of the `spt::` ops, one module per device and op family. See `registry.py`."""
