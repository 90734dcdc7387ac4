"""A bundle on an NVIDIA GPU: PyTorch, the kernels of :mod:`pq_export.plugins`, and CUDA graphs.

``source``     the integers and constants of a decoder; ``readers``: from a bundle or a calibration
``weights``    the same on the GPU, packed for the kernels
``cache``      static KV cache of codes, 4-bit ones two to a byte
``eager``      what happens between two linears of attention, in PyTorch: the definition
``fused``      the same in three Triton kernels (``triton_kernels``)
``decoder``    the forward: prefill and one decode step
``generate``   tokens of a bundle, decode as one CUDA graph
``bench``      speed and memory beside FP16 (``float_decoder``) and dynamic scales (``dynamic``), random weights
"""
