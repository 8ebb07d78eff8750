"""The official Python clients of OpenAI, Anthropic and Ollama, unmodified, against a running server.

usage: chats.py BASE_URL [--small]     --small: the model writes noise, so only shapes are looked at
"""

import json
import sys
import time

import anthropic
import ollama
import openai
from pydantic import BaseModel

BASE = sys.argv[1]
SMALL = "--small" in sys.argv
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    name: str
    age: int


def check(condition, found):
    if not condition:
        raise AssertionError(found)


def openai_chat(client):
    answer = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "What is 2+2? One word."}], max_tokens=20, temperature=0
    )
    check(answer.choices[0].message.content, answer)
    check(answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer.usage)
    text = answer.choices[0].message.content
    stream = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "What is 2+2? One word."}], max_tokens=20, temperature=0,
        stream=True, stream_options={"include_usage": True},
    )
    chunks = list(stream)
    check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text, chunks)
    check(chunks[-1].usage == answer.usage or chunks[-1].usage.total_tokens == answer.usage.total_tokens, chunks[-1])
    several = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, n=2, logprobs=True, top_logprobs=3, seed=1
    )
    check(len(several.choices) == 2 and len(several.choices[0].logprobs.content[0].top_logprobs) == 3, several)


def openai_tools(client):
    for stream in (False, True):
        request = dict(
            model="default", messages=[{"role": "user", "content": "What is the weather in Paris?"}], tools=[TOOL],
            tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=200,
        )
        if stream:
            name, arguments = "", ""
            for chunk in client.chat.completions.create(stream=True, **request):
                for call in chunk.choices[0].delta.tool_calls or []:
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
        else:
            call = client.chat.completions.create(**request).choices[0].message.tool_calls[0]
            name, arguments = call.function.name, call.function.arguments
        check(name == "get_weather" and isinstance(json.loads(arguments)["city"], str), (name, arguments))
    answer = client.chat.completions.create(
        model="default", max_tokens=40, temperature=0, tools=[TOOL],
        messages=[
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny, 21 degrees"},
        ],
    )
    check(SMALL or answer.choices[0].message.content, answer)


def openai_structured(client):
    answer = client.chat.completions.parse(
        model="default", messages=[{"role": "user", "content": "Ann is 31 years old."}], response_format=Person,
        max_tokens=100, temperature=0,
    )
    check(isinstance(answer.choices[0].message.parsed, Person), answer)
    check(SMALL or answer.choices[0].message.parsed == Person(name="Ann", age=31), answer)
    answer = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "Ann is 31 years old. Answer in JSON."}],
        response_format={"type": "json_object"}, max_tokens=100, temperature=0,
    )
    check(SMALL or isinstance(json.loads(answer.choices[0].message.content), dict), answer)


def openai_completions(client):
    answer = client.completions.create(model="default", prompt="def add(a, b):", max_tokens=8, temperature=0, echo=True, logprobs=1)
    check(answer.choices[0].text.startswith("def add(a, b):"), answer)
    check(answer.choices[0].logprobs.token_logprobs[0] is None, answer)


def openai_embeddings(client):
    found = client.embeddings.create(model="default", input=["a dog", "a puppy", "tax law"])
    check(len(found.data) == 3 and len(found.data[0].embedding) == len(found.data[2].embedding), found)
    vectors = [item.embedding for item in found.data]
    check(all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors), vectors)
    plain = client.embeddings.create(model="default", input="a dog", encoding_format="float")
    check(max(abs(a - b) for a, b in zip(plain.data[0].embedding, vectors[0])) < 1e-6, plain)


def openai_responses(client):
    first = client.responses.create(model="default", input="My name is Ann.", max_output_tokens=24, temperature=0)
    check(first.status in ("completed", "incomplete") and first.output_text, first)
    second = client.responses.create(
        model="default", input="What is my name?", previous_response_id=first.id, max_output_tokens=24, temperature=0
    )
    check(second.previous_response_id == first.id and (SMALL or "Ann" in second.output_text), second)
    check(client.responses.retrieve(first.id).output_text == first.output_text, first.id)
    with client.responses.stream(model="default", input="My name is Ann.", max_output_tokens=24, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    check(text == final.output_text == first.output_text, (text, final))
    parsed = client.responses.parse(
        model="default", input="Ann is 31 years old.", text_format=Person, max_output_tokens=100, temperature=0
    )
    check(isinstance(parsed.output_parsed, Person), parsed)
    tool = {"type": "function", "strict": True, **TOOL["function"]}
    asked = client.responses.create(
        model="default", input="What is the weather in Paris?", tools=[tool], tool_choice="required",
        parallel_tool_calls=False, max_output_tokens=100, temperature=0,
    )
    call = asked.output[-1]
    check(call.type == "function_call" and isinstance(json.loads(call.arguments)["city"], str), asked)
    told = client.responses.create(
        model="default", previous_response_id=asked.id, max_output_tokens=24, temperature=0,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    )
    check(told.status in ("completed", "incomplete"), told)
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("a deleted response came back")


def openai_batches(client):
    lines = [
        {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "default", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": f"Count to {i}."}]}}
        for i in range(6)
    ]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    check(client.files.content(file.id).read() == content, file)
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until = time.monotonic() + 120
    while batch.status not in ("completed", "failed") and time.monotonic() < until:
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    check(batch.status == "completed" and batch.request_counts.completed == 6, batch)
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    check([result["custom_id"] for result in results] == [line["custom_id"] for line in lines], results)
    check(batch.id in [item.id for item in client.batches.list()], "the list of batches")
    client.files.delete(file.id)


def openai_errors(client):
    try:
        client.chat.completions.create(model="nothing", messages=[{"role": "user", "content": "Hi"}])
    except openai.NotFoundError as error:
        check(error.code == "model_not_found", error)
    else:
        raise AssertionError("an unknown model was taken")
    try:
        client.chat.completions.create(model="default", messages=[], extra_body={"colour": "red"})
    except openai.BadRequestError as error:
        check(error.param == "messages", error)
    else:
        raise AssertionError("no messages were taken")
    check(client.models.list().data, "no models")


def anthropic_messages(client):
    request = dict(model="default", max_tokens=30, extra_body={"temperature": 0}, system="Be brief.", messages=[{"role": "user", "content": "Say hello."}])
    answer = client.messages.create(**request)
    check(answer.content and answer.content[0].type == "text" and answer.stop_reason in ("end_turn", "max_tokens"), answer)
    with client.messages.stream(**request) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    check(text == answer.content[0].text == final.content[0].text, (text, answer))
    check(final.usage.output_tokens == answer.usage.output_tokens, final)
    count = client.messages.count_tokens(model="default", system="Be brief.", messages=request["messages"])
    usage = answer.usage
    check(count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens, (count, usage))
    tools = [{"name": "get_weather", "description": "The weather in a city", "input_schema": TOOL["function"]["parameters"]}]
    request = dict(
        model="default", max_tokens=200, extra_body={"temperature": 0}, tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True},
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    )
    answer = client.messages.create(**request)
    call = answer.content[-1]
    check(answer.stop_reason == "tool_use" and call.type == "tool_use" and isinstance(call.input["city"], str), answer)
    with client.messages.stream(**request) as stream:
        final = stream.get_final_message()
    check(final.content[-1].input == call.input and final.stop_reason == "tool_use", final)
    answer = client.messages.create(
        model="default", max_tokens=40, extra_body={"temperature": 0}, tools=tools,
        messages=request["messages"] + [
            {"role": "assistant", "content": [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
        ],
    )
    check(answer.type == "message", answer)
    try:
        client.messages.create(model="default", max_tokens=0, messages=request["messages"])
    except anthropic.BadRequestError as error:
        check(error.body["error"]["type"] == "invalid_request_error", error)
    else:
        raise AssertionError("max_tokens 0 was taken")


def ollama_all(client):
    messages = [{"role": "user", "content": "Say hello."}]
    options = {"temperature": 0, "num_predict": 20}
    whole = client.chat(model="default", messages=messages, options=options)
    text = "".join(part.message.content for part in client.chat(model="default", messages=messages, options=options, stream=True))
    check(whole.message.content == text and whole.done and whole.eval_count > 0, (whole, text))
    whole = client.generate(model="default", prompt="Say hello.", options=options)
    parts = list(client.generate(model="default", prompt="Say hello.", options=options, stream=True))
    check(whole.response == "".join(part.response for part in parts) and parts[-1].done_reason, parts)
    shaped = client.chat(
        model="default", messages=[{"role": "user", "content": "Ann is 31 years old."}], format=Person.model_json_schema(),
        options={"temperature": 0, "num_predict": 100},
    )
    check(Person.model_validate_json(shaped.message.content), shaped)
    names = [model.model for model in client.list().models]
    check(names and client.show(names[0]).modelinfo, names)
    check(client.ps().models, "nothing runs")
    check(len(client.embed(model="default", input=["a", "b"]).embeddings) == 2, "vectors")
    try:
        client.chat(model="nothing", messages=messages)
    except ollama.ResponseError as error:
        check(error.status_code == 404, error)
    else:
        raise AssertionError("an unknown model was taken")


def main():
    key = "sk-test"
    by_openai = openai.OpenAI(base_url=f"{BASE}/v1", api_key=key, max_retries=0)
    by_anthropic = anthropic.Anthropic(base_url=BASE, api_key=key, max_retries=0)
    by_ollama = ollama.Client(host=BASE)
    steps = [
        (openai_chat, by_openai), (openai_tools, by_openai), (openai_structured, by_openai), (openai_completions, by_openai),
        (openai_embeddings, by_openai), (openai_responses, by_openai), (openai_batches, by_openai), (openai_errors, by_openai),
        (anthropic_messages, by_anthropic), (ollama_all, by_ollama),
    ]
    for step, client in steps:
        step(client)
        print(f"{step.__name__}: passed", flush=True)


main()
