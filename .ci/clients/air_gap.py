"""A server with --air-gap in a network that has nothing but the machine itself: it answers as anywhere else, and nothing gets out.

usage: air_gap.py QWENKIT MODEL        standard library only; where no such network can be made, what needs none is checked
"""

import fcntl
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time

from listening import wait_until_listening

PORT = 18432
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12, "temperature": 0}


def call(method, path, body=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    connection.request(method, path, body, {"content-type": kind})
    response = connection.getresponse()
    data = response.read()
    assert response.status == 200, (path, response.status, data[:300])
    return json.loads(data)


def loopback_up():
    """The one interface of a new network is down at first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        up = 0x1
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", up))


def interfaces():
    return [name for _, name in socket.if_nameindex()]


def in_a_batch():
    line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": QUESTION})
    form = (f'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\ncontent-disposition: form-data; '
            f'name="file"; filename="in.jsonl"\r\n\r\n{line}\r\n--b--\r\n').encode()
    file = call("POST", "/v1/files", form, "multipart/form-data; boundary=b")
    made = call("POST", "/v1/batches", json.dumps({
        "input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}))
    while made["status"] in ("validating", "in_progress", "finalizing"):
        time.sleep(0.2)
        made = call("GET", f"/v1/batches/{made['id']}")
    assert made["status"] == "completed", made
    return call("GET", f"/v1/files/{made['output_file_id']}/content")["response"]["body"]


def served(qwenkit, model, flags):
    """What a server says in all ways, and whether each of its threads is locked."""
    with tempfile.TemporaryDirectory() as store:
        server = subprocess.Popen(
            [qwenkit, "serve", model, "--port", str(PORT), "--ctx", "2048", "--store", store, *flags], stderr=subprocess.DEVNULL)
        try:
            wait_until_listening(PORT, server)
            chat = call("POST", "/v1/chat/completions", json.dumps(QUESTION))["choices"][0]["message"]["content"]
            batched = in_a_batch()["choices"][0]["message"]["content"]
            vector = call("POST", "/v1/embeddings", json.dumps({"input": "text"}))["data"][0]["embedding"]
            tasks = f"/proc/{server.pid}/task"
            locks = [open(f"{tasks}/{task}/status").read().split("Seccomp:")[1].split()[0] for task in os.listdir(tasks)]
            return (chat, batched, vector), locks
        finally:
            server.terminate()
            server.wait()


def inside(qwenkit, model):
    loopback_up()
    assert interfaces() == ["lo"], interfaces()
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=5)
        raise AssertionError("this network has a way out")
    except OSError as error:
        assert error.errno == 101, error
    answers, locks = served(qwenkit, model, ["--air-gap"])
    assert set(locks) == {"2"}, locks
    print(json.dumps(answers))


def main():
    qwenkit, model = sys.argv[1:3]
    if sys.argv[3:] == ["inside"]:
        return inside(qwenkit, model)
    free, _ = served(qwenkit, model, [])
    assert "Paris" in free[0] and free[0] == free[1], free[:2]
    locked, locks = served(qwenkit, model, ["--air-gap"])
    assert locked == free and set(locks) == {"2"}, (locked[:2], locks)
    network = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*network, "true"], capture_output=True).returncode != 0:
        print("air gap: the same answers with all ways out locked; this system allows no network apart, so that was not checked")
        return None
    apart = subprocess.run([*network, sys.executable, __file__, qwenkit, model, "inside"], check=True, stdout=subprocess.PIPE)
    assert json.loads(apart.stdout) == [*free], apart.stdout[:300]
    print("air gap: the same answers with all ways out locked, and in a network without any")
    return None


main()
