"""How codes are chosen: tensors in, QuantizedWeight out. Nothing here knows a model, a file or a command line."""
