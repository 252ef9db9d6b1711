"""What runs between the GEMMs: layout, pointwise and low-rank kernels, each beside its reference
implementation.
"""
