"""The VAE of Wan: what turns frames into latents."""
