"""What memory is used, exactly: peaks over a region, bytes held by tensors, bytes still free."""
