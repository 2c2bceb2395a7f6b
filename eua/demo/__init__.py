"""The demo: fictional people, a small model that knows them, and what unlearning does to it."""
