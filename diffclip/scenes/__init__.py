"""The built-in world of coloured shapes: `drawing` makes scenes and images, `text` captions, `questions` conversations;
`parts` writes each in its format, `export` all of them into a folder.
"""
