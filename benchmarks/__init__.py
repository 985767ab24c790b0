"""Benchmarks: speed and numerics of evaluators, service and trainer; parity with the references."""
