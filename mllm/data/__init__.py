"""Conversations about images: `rows` reads and checks them, `images` finds images, `examples` are learnt from."""
