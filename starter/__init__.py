"""The embedded default: a tiny Stable Diffusion that knows a small world, and what it has yet to learn."""
