"""The operators `spt::*`: schema, fake, autograd, autocast, and the readable references that define them."""
