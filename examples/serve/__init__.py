"""A server for the models of this package: `python -m examples.serve`, or `make serve`.

In reading order: schema (what a request may say), job (one request), texts (from its text to a canvas), watch (what
one step wrote), engine (the queue, and the one thread that writes), then a file for each interface that clients speak:
openai_api, llama_api, generate_api, canvas_api; app puts them together and guards the door.
"""
