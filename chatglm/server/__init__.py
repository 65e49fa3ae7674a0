"""HTTP around the engine: OpenAI's routes, those of the published api.py, the page, health and metrics.

guard.py              who may come in, and how much they may bring
schemas.py            what may be asked, field by field
openai_routes.py      /v1/...          published_routes.py   POST / and /stream
status_routes.py      /health, /info, /metrics, /docs, and the page
answers.py            from requests to running answers, and to their pieces
app.py                create_app: all of it together          run.py   under uvicorn, with a graceful end
"""
