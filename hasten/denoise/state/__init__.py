"""What the network is given of the sample: sizes, tokens, particles."""
