"""Our scores against the references' own code, on the same random weights: `make parity`."""
