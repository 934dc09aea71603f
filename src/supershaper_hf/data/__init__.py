"""From files to masked batches: documents are read, cut into sequences of tokens, and masked."""
