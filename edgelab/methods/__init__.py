"""Methods: pure functions from torch tensors to nouns, on whatever device the tensor is."""
