"""Holds connections open that have streamed an answer each and say nothing more, until it is told to end.

usage: idle.py BASE_URL COUNT [SECONDS]        standard library only
"""

import http.client
import json
import sys
import time
import urllib.parse

where, count = urllib.parse.urlsplit(sys.argv[1]), int(sys.argv[2])
body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": True})
held = []
for _ in range(count):
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    connection.getresponse().read()
    held.append(connection)
print(f"{len(held)} streams have ended, their connections are open", flush=True)
time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 600)
