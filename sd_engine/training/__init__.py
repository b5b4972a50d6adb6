"""Training of the shipped model: pictures that we draw, a tokenizer, the VAE, then the U-Net with its text encoder."""
