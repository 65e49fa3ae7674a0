"""A server with scripted answers in a process of its own, for tests that kill it.

python tests/scripted_server.py PORT QUESTION ANSWER      PORT 0: any; prints the one that it has
"""

import sys
import threading

from web_page import demo_tokenizer, scripted_model, served

if __name__ == "__main__":
    _, port, question, answer = sys.argv
    model = scripted_model(demo_tokenizer())
    model.engine.script[question] = answer
    with served(lambda: model, port=int(port)) as listening:
        print(listening, flush=True)
        threading.Event().wait()
