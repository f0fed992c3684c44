"""The built-in world of coloured shapes: `drawing` makes scenes and images, `text` captions.

`questions` and `conversations` ask, `parts` writes each in its format, `export` all of them into a folder.
"""
