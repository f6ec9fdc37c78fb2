"""Triton kernels. Importing this package needs no Triton; the modules named ``*_kernels`` do.

A module with kernels also says how to compile them with no GPU at hand, see :mod:`msd_kernels.aot`.
"""
