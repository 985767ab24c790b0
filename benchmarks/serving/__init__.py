"""Parts of the service benchmark: the service and its clients as processes, measurements and targets."""
