"""Operations on tensors, imported as ``qgnn.kernels``: one file per operation, no autograd, no PyG, no modules."""
