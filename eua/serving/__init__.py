"""An OpenAI-compatible chat endpoint with the guard on: requests → queue → one thread that owns the model → answers."""
