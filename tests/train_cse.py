"""`python -m dmap_core.cse.train`, where the compiled part of torchvision, which diffusers imports, may not load."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if __name__ == "__main__":  # and not in the processes that read pictures
    from host import import_torchvision

    import_torchvision()

    from dmap_core.cse.train import main

    main()
