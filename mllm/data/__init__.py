"""Conversations about images: `files` and `layouts` read them, `examine` finds faults, `rows` keeps what was found,
`images` finds images, `judge` decodes and counts, `examples` are learnt from.
"""
