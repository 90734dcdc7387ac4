"""Hand-written CUDA kernels for the quantized linear, as one library for TensorRT, PyTorch and tests.

``csrc/pq_kernels.h`` is the interface: its definitions and weight layouts are what everything here follows.
"""
