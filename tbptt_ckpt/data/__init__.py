"""Where steps come from: tensors, files, lanes, and anything with `read(start, stop)`."""
