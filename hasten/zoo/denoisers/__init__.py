"""The zoo's picture models: an autoencoder, a transformer, a U-Net and a video transformer."""
