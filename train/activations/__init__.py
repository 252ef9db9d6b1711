"""What the backward pass finds saved, recomputed or offloaded."""
