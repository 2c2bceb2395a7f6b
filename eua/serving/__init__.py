"""An OpenAI-compatible chat endpoint with the guard: requests → queue → one thread that owns the model → answers."""
