"""Bitwise convolution on a CPU, from plain loops (scalar.py) to the register tile (vector.py); and a pass to train with.

engine.py calls them.
"""
