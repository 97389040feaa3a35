"""python -m benchmarks <what>"""

from . import costs

costs.main()
