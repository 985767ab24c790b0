"""Fair queue and batching in front of the device."""
