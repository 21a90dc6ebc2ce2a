"""Language models: configuration, the decoder, and Hugging Face directories in and out."""
