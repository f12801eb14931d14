"""The model `demo`: a tiny Qwen2 that ships with the package, and the scripts that made it."""
