"""`python -m MODULE ARGUMENTS`, where the compiled part of torchvision, which diffusers and lpips import, may not load."""

import runpy
import sys

if __name__ == "__main__":
    from host import import_torchvision

    import_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
