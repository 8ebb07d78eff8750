"""Many users at once for a long while: mixed, cancelled, oversized and broken requests. Every answer must be the one that
the same request gets alone, memory must not grow, and no page of the cache may stay taken.

usage: soak.py QWENKIT MODEL MINUTES        standard library only
"""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time

from listening import wait_until_listening

QWENKIT, MODEL, MINUTES = sys.argv[1], sys.argv[2], float(sys.argv[3])
PORT = int(os.environ.get("QWENKIT_SOAK_PORT", "18090"))
USERS = 12
# What the first minutes fill (caches of prefixes, buffers of the allocator) is not growth.
WARM_SHARE = 0.2
GROWTH_MB = 64


def post(path, body):
    return call("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())


def call(method, path, data=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    try:
        connection.request(method, path, data, {"content-type": kind})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def words(seed, count):
    picked = random.Random(seed)
    return " ".join(picked.choice(["river", "stone", "seven", "blue", "under", "quick", "paper", "light", "cold"]) for _ in range(count))


def requests():
    schema = {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}}}
    shared = "You answer in one sentence. " + words(1, 300)
    made = []
    for i in range(8):
        question = {"role": "user", "content": f"{words(i + 10, 5)}? Tell me about number {i}."}
        made.append(("/v1/chat/completions", {"messages": [question], "max_tokens": 24 + 8 * i, "seed": i, "temperature": 0.8}))
        made.append(("/v1/chat/completions", {
            "messages": [{"role": "system", "content": shared}, question], "max_tokens": 24, "temperature": 0}))
    for i in range(4):
        made.append(("/v1/chat/completions", {
            "messages": [{"role": "user", "content": f"Person {i}: {words(i, 3)}, {20 + i} years old."}], "max_tokens": 80, "seed": i,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}}))
        made.append(("/v1/chat/completions", {
            "messages": [{"role": "user", "content": f"What is the weather in city {i}?"}], "tools": [tool], "tool_choice": "required",
            "parallel_tool_calls": False, "max_tokens": 60, "seed": i}))
        made.append(("/v1/completions", {
            "prompt": words(i + 40, 700 if i == 3 else 60), "max_tokens": 12, "temperature": 0, "echo": True, "logprobs": 2}))
        made.append(("/v1/embeddings", {"input": [words(i + 60, 20 * (j + 1)) for j in range(3)]}))
        question = {"role": "user", "content": f"{words(i + 80, 6)}? Tell me about number {i}."}
        made.append(("/v1/messages", {
            "model": "default", "system": f"x-soak-header: {i};\n{shared}", "messages": [question], "max_tokens": 24, "temperature": 0}))
        made.append(("/v1/responses", {
            "input": question["content"], "max_output_tokens": 24, "seed": i, "temperature": 0.8, "repetition_penalty": 1.1}))
        made.append(("/api/chat", {
            "model": "default", "messages": [question], "stream": False, "options": {"num_predict": 24, "seed": i, "temperature": 0.8}}))
    return made


VARYING = {
    "id", "created", "created_at", "prompt_tokens_details", "input_tokens_details", "input_tokens", "cache_read_input_tokens",
}


def essence(data):
    """What must be the same each time: everything but ids, moments, durations and what the cache spared."""
    if isinstance(data, dict):
        return {key: essence(value) for key, value in data.items() if key not in VARYING and not key.endswith("_duration")}
    if isinstance(data, list):
        return [essence(value) for value in data]
    return data


def batch(lines):
    """A batch of chats, from its file to its results: the bodies of the answers in the order of the lines."""
    content = "\n".join(json.dumps({
        "custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}) for i, body in enumerate(lines))
    form = (f'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\ncontent-disposition: form-data; '
            f'name="file"; filename="in.jsonl"\r\n\r\n{content}\r\n--b--\r\n').encode()
    _, data = call("POST", "/v1/files", form, "multipart/form-data; boundary=b")
    _, data = post("/v1/batches", {
        "input_file_id": json.loads(data)["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"})
    made = json.loads(data)
    while made["status"] in ("validating", "in_progress", "finalizing"):
        time.sleep(0.2)
        made = json.loads(call("GET", f"/v1/batches/{made['id']}")[1])
    assert made["status"] == "completed" and made["request_counts"]["failed"] == 0, made
    _, data = call("GET", f"/v1/files/{made['output_file_id']}/content")
    results = sorted((json.loads(line) for line in data.splitlines()), key=lambda result: int(result["custom_id"]))
    return [essence(result["response"]["body"]) for result in results]


def alone(request):
    status, data = post(*request)
    assert status == 200, (request, data[:500])
    return essence(json.loads(data))


def resident_mb(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


class Soak:
    def __init__(self):
        self.requests = requests()
        self.expected = [alone(request) for request in self.requests]
        self.end = time.monotonic() + MINUTES * 60
        self.faults, self.counts, self.lock = [], {}, threading.Lock()

    def count(self, kind):
        with self.lock:
            self.counts[kind] = self.counts.get(kind, 0) + 1

    def same(self, picked):
        i = picked.randrange(len(self.requests))
        status, data = post(*self.requests[i])
        if status != 200 or essence(json.loads(data)) != self.expected[i]:
            raise AssertionError(f"request {i} gave {status} {data[:600]}, expected {json.dumps(self.expected[i])[:600]}")

    def batched(self, picked):
        chats = [i for i, (path, _) in enumerate(self.requests) if path == "/v1/chat/completions"]
        lines = picked.sample(chats, 4)
        found = batch([self.requests[i][1] for i in lines])
        assert found == [self.expected[i] for i in lines], f"a batch of the requests {lines} gave {json.dumps(found)[:600]}"

    def cancelled(self, picked):
        body = {"messages": [{"role": "user", "content": words(picked.random(), 200)}], "max_tokens": 2000, "stream": True, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        for _ in range(picked.randrange(1, 12)):
            response.readline()
        connection.close()

    def oversized(self, picked):
        body = {"messages": [{"role": "user", "content": words(1, 20000)}]}
        status, data = post("/v1/chat/completions", body)
        assert status == 400 and b"context" in data, (status, data[:300])

    def broken(self, picked):
        path, body, wanted = picked.choice([
            ("/v1/chat/completions", b"{", 400), ("/v1/chat/completions", b'{"messages": "\xff"}', 400), ("/v1/nothing", b"{}", 404),
            ("/v1/completions", json.dumps({"prompt": "x", "stop": ["s"] * 10000}).encode(), 400),
            ("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "x"}], "response_format": {
                "type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"$ref": "#/x"}}}}}).encode(), 400),
            ("/v1/embeddings", b'{"input": 7}', 400), ("/v1/messages", b"[]", 400), ("/api/chat", b'{"model": 1}', 400),
        ])
        status, data = post(path, body)
        assert status == wanted, (path, status, data[:300])

    def large(self, picked):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 104857600\r\n\r\n"
        with socket.create_connection(("127.0.0.1", PORT), timeout=60) as connection:
            connection.sendall(head + b"x" * 65536)
            answer = connection.recv(4096)
        assert b" 413 " in answer.split(b"\r\n")[0], answer[:200]

    def half_open(self, picked):
        connection = socket.create_connection(("127.0.0.1", PORT), timeout=60)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{")
        time.sleep(picked.random())
        connection.close()

    def user(self, seed):
        picked = random.Random(seed)
        kinds = [self.same] * 16 + [self.cancelled] * 3 + [self.batched, self.oversized, self.broken, self.broken, self.large, self.half_open]
        while time.monotonic() < self.end and not self.faults:
            kind = picked.choice(kinds)
            try:
                kind(picked)
                self.count(kind.__name__)
            except Exception as fault:
                with self.lock:
                    self.faults.append(f"{kind.__name__}: {fault!r}")

    def run(self, pid):
        users = [threading.Thread(target=self.user, args=(seed,)) for seed in range(USERS)]
        for user in users:
            user.start()
        begun, warm = time.monotonic(), None
        while any(user.is_alive() for user in users):
            time.sleep(1)
            if warm is None and time.monotonic() - begun > MINUTES * 60 * WARM_SHARE:
                warm = resident_mb(pid)
                print(f"memory when warm: {warm:.0f} MB", flush=True)
        assert not self.faults, self.faults[:3]
        time.sleep(1)
        for i, request in enumerate(self.requests):
            assert alone(request) == self.expected[i], f"request {i} after the soak"
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        connection.request("GET", "/v1/loads")
        [load] = json.loads(connection.getresponse().read())["loads"]
        connection.close()
        final = resident_mb(pid)
        print(f"requests: {self.counts}\nmemory at the end: {final:.0f} MB\nload: {load}", flush=True)
        assert load["running"] == load["waiting"] == load["kv_pages_used"] == 0, load
        assert final < warm + GROWTH_MB, f"memory grew from {warm:.0f} to {final:.0f} MB"


def main():
    with tempfile.TemporaryDirectory() as store:
        # So few megabytes that kept pages come and go.
        kept = ["--prefix-cache", os.path.join(store, "prefixes"), "--prefix-cache-mb", "128"]
        command = [QWENKIT, "serve", MODEL, "--port", str(PORT), "--ctx", "16384", "--store", store, *kept]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            wait_until_listening(PORT, server)
            Soak().run(server.pid)
            sizes = [file.stat().st_size for model in os.scandir(kept[1]) for file in os.scandir(model) if file.name.endswith(("page", "state"))]
            print(f"kept pages: {len(sizes)} files of {sum(sizes) / 2**20:.0f} MiB", flush=True)
            assert sizes and sum(sizes) <= 136 * 2**20, sizes
            assert server.poll() is None, "the server has ended"
        finally:
            server.terminate()
            server.wait()
    print(f"{MINUTES:g} minutes: every answer as alone, no page left, memory flat")


main()
