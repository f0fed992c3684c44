"""The built-in world of coloured shapes: drawing, captions, questions, export in every format the stages read."""
