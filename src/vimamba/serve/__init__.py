"""A trained run behind HTTP: `vimamba serve`. docs/serve.md shows it from outside."""
