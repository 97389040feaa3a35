"""What guided steps cost.

python -m benchmarks [options]         steps of every plan and solver, against a plain reference and the floor
python -m benchmarks memory [options]  peak memory, counted without a device, and its calibration
python -m benchmarks costs             the constants of dmap_core/costs.py, counted anew
python -m benchmarks cards             README's table of graphics cards, counted
python -m benchmarks gpu [--tiny]      all that is to be known of a CUDA device, in minutes
"""

import json
import sys


def main(arguments: list[str]) -> None:
    what = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if what == "one":  # a process of the others
        from .step import measure

        print(json.dumps(measure(json.loads(arguments[1]))))
    elif what == "memory":
        from .memory import main

        main(arguments[1:])
    elif what == "costs":
        from .costs import main

        main()
    elif what == "cards":
        from .cards import main

        main()
    elif what == "gpu":
        from .gpu import main

        main(arguments[1:])
    elif what is None:
        from .bench import main

        main(arguments)
    else:
        sys.exit(f"python -m benchmarks: there is no {what}\n{__doc__}")


main(sys.argv[1:])
