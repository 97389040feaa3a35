"""What DMAP's guided steps cost: `python -m benchmarks` and its subcommands. Uses ComfyUI's classes (COMFYUI_PATH), as the nodes do."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for `host`, which makes ComfyUI importable
