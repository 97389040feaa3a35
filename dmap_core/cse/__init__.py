"""The conditional score estimator (CSE): a ControlNet trained with about 100 pictures (Sec. 4.2, B.2), better than DPS's own estimate to start from.

Nothing here imports diffusers or accelerate but `train` and `diffusers_models`, which the command line uses; a host trains with its own networks.
"""
