"""Errors that a person can act on."""


class Diverged(ArithmeticError):
    """NaN or infinity appeared while sampling."""
