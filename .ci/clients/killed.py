"""A server that is killed in the middle of a batch and of responses has lost nothing that was finished, and does nothing twice.

usage: killed.py begin BASE_URL STATE_FILE     starts a batch and responses, and returns in the middle of them
       killed.py end BASE_URL STATE_FILE       after a kill and a new start: everything is there
"""

import json
import sys
import time

import openai

step, base, path = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


def wait(what, until):
    end = time.monotonic() + 180
    while time.monotonic() < end:
        found = what()
        if until(found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"not reached: {found}")


def line(i):
    body = {"max_tokens": 24, "temperature": 0, "messages": [{"role": "user", "content": f"Write the number {i} in words."}]}
    return json.dumps({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})


if step == "begin":
    finished = client.responses.create(model="default", input="Say hello.", max_output_tokens=8, temperature=0)
    file = client.files.create(file=("in.jsonl", "\n".join(line(i) for i in range(40)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    # Without its end token: an answer that ends by itself may be whole before the kill.
    running = client.responses.create(
        model="default", input="Count to 1000.", max_output_tokens=7000, background=True, extra_body={"ignore_eos": True}
    )
    found = wait(lambda: client.batches.retrieve(batch.id), lambda found: found.request_counts.completed >= 5)
    assert found.status == "in_progress", found
    answer = client.responses.retrieve(running.id)
    assert answer.status in ("queued", "in_progress"), answer
    state = {"response": finished.id, "text": finished.output_text, "running": running.id, "batch": batch.id}
    with open(path, "w") as file:
        json.dump(state, file)
    print(f"killed after {found.request_counts.completed} of 40 lines", flush=True)
else:
    with open(path) as file:
        state = json.load(file)
    assert client.responses.retrieve(state["response"]).output_text == state["text"]
    running = client.responses.retrieve(state["running"])
    assert running.status == "failed", running
    batch = wait(lambda: client.batches.retrieve(state["batch"]), lambda batch: batch.status not in ("validating", "in_progress"))
    assert batch.status == "completed" and batch.request_counts.completed == 40, batch
    results = [json.loads(text) for text in client.files.content(batch.output_file_id).text.splitlines()]
    assert [result["custom_id"] for result in results] == [f"c{i}" for i in range(40)], "each line once, in order"
    alone = json.loads(line(17))["body"]
    alone = client.chat.completions.create(model="default", **alone)
    told = results[17]["response"]["body"]["choices"][0]["message"]["content"]
    assert told == alone.choices[0].message.content, (told, alone)
    print("after the kill: 40 of 40 lines once each, the finished response whole, the running one failed", flush=True)
