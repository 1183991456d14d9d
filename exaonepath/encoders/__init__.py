"""The patch encoder and the slide encoder as Hugging Face models: mathematics, inference, memory, loading."""
