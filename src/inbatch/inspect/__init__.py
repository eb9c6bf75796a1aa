"""What a batch does, in pictures and numbers."""
