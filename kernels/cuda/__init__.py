"""The CUDA ladder: rung1_pack.py to rung8_fused.py, one idea a file, called by engine.py."""
