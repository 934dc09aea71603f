"""From text to masked batches: `documents` reads it, `sequences` makes tokens of it, and `batches` masks them.

Text can be stored and cached, or streamed. In both cases a training run resumes exactly where it stopped.
"""
