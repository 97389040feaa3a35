"""Tables: many pictures through many solvers, from a config, resumable and shared between processes. `dmap evaluate`."""
