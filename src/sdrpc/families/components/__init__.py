"""Networks that several families share: CLIP, T5, the UNet, the autoencoder."""
