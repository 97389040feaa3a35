"""The conditional score estimator (CSE): a ControlNet trained with about 100 pictures (Sec. 4.2, B.2), better than DPS's own estimate to start from.

Nothing here imports diffusers or accelerate but `train` and `generate`, which the command line uses, at the moment that they run; a host trains with its own networks.
"""
