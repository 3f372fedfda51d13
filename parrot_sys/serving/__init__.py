"""`parrot serve`: an OpenAI-compatible server on the engine, and the page that it shows."""
