"""The adapter to ComfyUI: everything that this pack knows about its internals."""
