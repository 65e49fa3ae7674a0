"""A chat page made with Streamlit, for those who know web_demo2.py; it talks to a running server.

    pip install streamlit
    chatglm serve THUDM/chatglm2-6b                    # in one terminal
    streamlit run examples/streamlit_chat.py           # in another

CHATGLM_URL and CHATGLM_API_KEY name another server and its key. The page that the server has itself does more:
see docs/web.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import streamlit as st

from chatglm.client import Client, ServerError

Message = dict[str, str]  # role and content, as OpenAI's API has them


def answer(
    client: Client, messages: Sequence[Message], temperature: float, top_p: float, length: int
) -> Iterator[str]:
    """Yields the answer to the last message in pieces."""
    model = client.models()[0]
    settings = {"temperature": temperature, "top_p": top_p, "max_tokens": length}
    for chunk in client.stream_chat(model, messages, **settings):
        yield chunk.text


def page() -> None:
    """Draws the page; Streamlit calls it again after everything that a user does."""
    st.title("ChatGLM")
    temperature = st.sidebar.slider("temperature", 0.0, 2.0, 0.8)
    top_p = st.sidebar.slider("top_p", 0.05, 1.0, 0.8)
    length = st.sidebar.slider("max_tokens", 16, 1024, 512)
    if st.sidebar.button("Clear"):
        st.session_state.clear()
    messages: list[Message] = st.session_state.setdefault("messages", [])
    for message in messages:
        st.chat_message(message["role"]).write(message["content"])
    if question := st.chat_input("Ask something"):
        st.chat_message("user").write(question)
        messages.append({"role": "user", "content": question})
        client = Client(
            os.environ.get("CHATGLM_URL", "http://127.0.0.1:8000"), os.environ.get("CHATGLM_API_KEY")
        )
        try:
            said = st.chat_message("assistant").write_stream(
                answer(client, messages, temperature, top_p, length)
            )
            messages.append({"role": "assistant", "content": str(said)})
        except ServerError as error:
            st.error(str(error))
        finally:
            client.close()


if __name__ == "__main__":
    page()
