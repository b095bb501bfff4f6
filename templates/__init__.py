"""Jinja sources of the generated kernels; rendered by `spt_compiler.lowering.render`."""
