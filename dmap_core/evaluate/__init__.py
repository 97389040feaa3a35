"""Tables: many pictures through many solvers, from a config, resumable and shared between processes. `python -m dmap_core.cli evaluate`."""
