"""graphsurgeon passes that turn the floating-point graph into a static quantized one.

Each module is one pass: it says what it matches and shows the subgraph before and after.
:mod:`pq_export.rewrite.pipeline` runs them in order.
"""
