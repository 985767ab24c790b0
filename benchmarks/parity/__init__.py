"""Parity of our scores with the references' own code on the same random weights: `make parity`."""
