"""Generation: how tokens are drawn, and the engine that draws whole answers."""
