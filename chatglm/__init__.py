"""ChatGLM on today's transformers."""

__version__ = "0.1.0"
