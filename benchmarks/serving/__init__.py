"""The service benchmark: a service and its callers as processes of their own, and what is asked of them."""
