"""Graph layers with PyTorch Geometric's constructor arguments and state-dict keys, and a quantization scheme."""
