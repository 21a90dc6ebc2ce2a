"""What answers messages: the model under study, or answers read from a file."""
