"""From text to masked batches: `documents` reads it, `sequences` makes tokens of it, and `batches` masks them.

All of it can be stored and cached, or streamed, and a training run goes on in it exactly where it stopped.
"""
