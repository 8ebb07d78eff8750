"""An image through the official Python clients of OpenAI, Anthropic and Ollama, unmodified: each gets the same answer.

usage: images.py BASE_URL MODEL IMAGE     MODEL sees images; IMAGE is a PNG file
"""

import base64
import pathlib
import sys

import anthropic
import ollama
import openai

BASE, MODEL, IMAGE = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
DATA = base64.b64encode(IMAGE.read_bytes()).decode()
URL = f"data:image/png;base64,{DATA}"
QUESTION = "What is this?"


def main():
    by_openai = openai.OpenAI(base_url=f"{BASE}/v1", api_key="sk-test", max_retries=0)
    by_anthropic = anthropic.Anthropic(base_url=BASE, api_key="sk-test", max_retries=0)
    by_ollama = ollama.Client(host=BASE)
    found = {}

    parts = [{"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}, {"type": "text", "text": QUESTION}]
    chat = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
    whole = by_openai.chat.completions.create(**chat)
    found["chat"] = whole.choices[0].message.content
    blind = by_openai.chat.completions.create(**chat | {"messages": [{"role": "user", "content": QUESTION}]})
    assert whole.usage.prompt_tokens > blind.usage.prompt_tokens + 2, (whole.usage, blind.usage)
    assert found["chat"], whole
    chunks = by_openai.chat.completions.create(stream=True, **chat)
    found["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    items = [{"type": "input_image", "image_url": URL, "detail": "auto"}, {"type": "input_text", "text": QUESTION}]
    asked = [{"role": "user", "content": items}]
    response = by_openai.responses.create(model=MODEL, input=asked, max_output_tokens=8, temperature=0)
    found["responses"] = response.output_text

    source = {"type": "base64", "media_type": "image/png", "data": DATA}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": blocks}]
    message = by_anthropic.messages.create(model=MODEL, messages=turns, max_tokens=8, extra_body={"temperature": 0})
    found["messages"] = message.content[0].text
    counted = by_anthropic.messages.count_tokens(model=MODEL, messages=turns).input_tokens
    assert counted == whole.usage.prompt_tokens == response.usage.input_tokens, (counted, whole.usage, response.usage)

    options = {"temperature": 0, "num_predict": 8}
    turns = [{"role": "user", "content": QUESTION, "images": [str(IMAGE)]}]
    found["ollama"] = by_ollama.chat(model=MODEL, messages=turns, options=options).message.content
    assert "vision" in by_ollama.show(MODEL).capabilities

    assert len(set(found.values())) == 1, found
    try:
        far = [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]
        by_openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": far}])
    except openai.BadRequestError as error:
        assert "fetches nothing" in str(error), error
    else:
        raise AssertionError("a URL was taken")
    print(f"an image by {len(found)} ways: one answer")


main()
