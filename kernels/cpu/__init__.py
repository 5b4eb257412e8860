"""Bitwise convolution on a CPU, from plain loops (scalar.py) to the register tile (vector.py); engine.py calls them.

staircase.py and levels.py are for training.
"""
