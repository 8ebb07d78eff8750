"""The Shepherd Model Gateway in front of two workers on this machine: routing, the same prefix to the same worker, and a
worker that is killed under load without a lost request.

usage: smg.py QWENKIT MODEL SMG        standard library only; SMG is the program of `pip install smg`
"""

import concurrent.futures
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

QWENKIT, MODEL, SMG = sys.argv[1:]
GATEWAY, WORKERS = 18440, (18441, 18442)


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return answer.read().decode()


def wait(port, path):
    for _ in range(240):
        try:
            return get(port, path)
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"port {port} does not answer")


def ask(system, question, tokens=8):
    body = {"model": NAME, "max_tokens": tokens, "temperature": 0,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{GATEWAY}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


def answered(port):
    lines = get(port, "/metrics").splitlines()
    return float(next(line for line in lines if line.startswith("vllm:request_success_total{")).split()[-1])


store = tempfile.TemporaryDirectory()
workers = [
    subprocess.Popen([QWENKIT, "serve", MODEL, "--port", str(port), "--ctx", "8192", "--store", f"{store.name}/{port}"],
                     stderr=subprocess.DEVNULL)
    for port in WORKERS
]
gateway = None
try:
    for port in WORKERS:
        wait(port, "/ready")
    NAME = json.loads(get(WORKERS[0], "/v1/models"))["data"][0]["id"]
    log = open(f"{store.name}/smg.log", "w")
    gateway = subprocess.Popen(
        [SMG, "launch", "--worker-urls", *(f"http://127.0.0.1:{port}" for port in WORKERS), "--policy", "cache_aware",
         "--host", "127.0.0.1", "--port", str(GATEWAY), "--prometheus-port", "18449", "--health-check-interval-secs", "1"],
        stdout=log, stderr=log)
    wait(GATEWAY, "/v1/models")
    for _ in range(120):
        try:
            ask("Warm up.", "Hi")
            break
        except urllib.error.HTTPError:
            time.sleep(0.5)

    shops = [f"You answer for shop number {n}. " + "The shop is open from nine to five. " * 30 for n in range(4)]
    first = [ask(shop, "When do you open?") for shop in shops]
    cached = [ask(shop, f"Question {i}: and when do you close?")["usage"] for i in range(3) for shop in shops]
    shares = [usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"] for usage in cached]
    known = sum(share > 0.8 for share in shares)
    print(f"the same prefix found its worker in {known} of {len(shares)} requests", flush=True)
    assert known >= 0.9 * len(shares), shares

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        load = [pool.submit(ask, shops[i % 4], f"Load {i}: tell me about the shop.", 48) for i in range(36)]
        while sum(task.done() for task in load) < 6:
            time.sleep(0.02)
        share = [answered(port) for port in WORKERS]
        workers[share.index(max(share))].send_signal(signal.SIGKILL)
        answers = [task.result() for task in load]
    assert all(answer["usage"]["completion_tokens"] > 0 for answer in answers)
    print(f"the busier worker killed under load: {len(answers)} of {len(load)} requests answered", flush=True)
finally:
    for process in [gateway, *workers]:
        if process:
            process.terminate()
            process.wait()
