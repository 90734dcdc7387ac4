"""pq-export: static quantization of LLMs with PrefixQuant (arXiv 2410.05265), from checkpoint to ONNX.

Importing this package imports nothing heavy; each module says in its docstring what it is for.
"""

__version__ = "0.5.0"
