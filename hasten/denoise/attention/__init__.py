"""Which keys a query reads."""
