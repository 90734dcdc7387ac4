"""The floating-point graph, from ``torch.onnx.export``, and the map from its nodes to decoder modules."""
