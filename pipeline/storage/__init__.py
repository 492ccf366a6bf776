"""Records of a beton: encode, write, decode, read in place, select a subset."""
