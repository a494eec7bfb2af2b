"""The published model: its repository, and the commit that the program pins (src/model/hub/mod.rs)."""

REPO = "stabilityai/sd-x2-latent-upscaler"
COMMIT = "1f2883b22f62cfb29323770ba9cfdcf601757bd3"
