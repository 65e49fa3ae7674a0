"""The Streamlit example, run by Streamlit's own test driver against our server."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason="the server needs the extra 'server'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Streamlit imports
    testing = pytest.importorskip("streamlit.testing.v1", reason="Streamlit is not installed")

from web_page import ScriptedEngine, demo_tokenizer, scripted_model, served  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "streamlit_chat.py"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Streamlit's own


@pytest.fixture
def engine(monkeypatch) -> Iterator[ScriptedEngine]:
    model = scripted_model(demo_tokenizer())
    with served(lambda: model) as port:
        monkeypatch.setenv("CHATGLM_URL", f"http://127.0.0.1:{port}")
        yield model.engine


def test_the_example_holds_a_conversation(engine):
    page = testing.AppTest.from_file(str(EXAMPLE), default_timeout=30).run()
    page.slider[0].set_value(0.25)
    page.chat_input[0].set_value("first").run()
    page.chat_input[0].set_value("second").run()
    assert not page.exception
    said = [message.markdown[0].value for message in page.chat_message]
    assert said == ["first", "You said: first", "second", "You said: second"]
    assert "You said: first" in engine.prompt(engine.requests[-1])
    assert engine.requests[-1].temperature == 0.25


def test_without_a_server_the_example_tells_how_to_start_one(monkeypatch):
    monkeypatch.setenv("CHATGLM_URL", "http://127.0.0.1:9")
    page = testing.AppTest.from_file(str(EXAMPLE), default_timeout=30).run()
    page.chat_input[0].set_value("first").run()
    assert not page.exception
    assert "start the server" in page.error[0].value
