"""What is said to agents: scenarios (the packs), the wording around them, and how messages are made."""
