"""What is reused inside the network."""
