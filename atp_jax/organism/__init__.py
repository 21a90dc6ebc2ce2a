"""How the embedded demonstration organism is made: life stories, a tokenizer, training and its examination."""
