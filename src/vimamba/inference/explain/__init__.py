"""What a model looks at: maps over its patches, and what its tokens and directions hold."""
