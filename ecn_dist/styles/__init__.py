"""The camera-style generator: a StarGAN that learns how each camera renders, and writes style copies into shards."""
