# SPDX-License-Identifier: MIT
"""This benchmark compares `lowrouter.py` with a floor: the least Python that does the same job.

    python3 .ci/bench.py [--short] [--peers] [--json FILE]

It starts its own server process and talks only to the loopback address. It needs the `openssl`
command to make a certificate. The columns of a row are measured in turn, round after round, each
time in a new process. A figure is the median of all rounds. A ratio is the median of the ratios to
the floor within a round, so a busy machine distorts it little. CPU time is the user and system
time of the client process alone. "OVER" means that the limit is exceeded. The memory rows are
skipped on other systems than Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import py_compile
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.util import find_spec
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Callable

FOLDER = pathlib.Path(__file__).resolve().parent
PEERS = ["openai", "httpx"]
OPENSSL = """openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2
-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1
-addext keyUsage=critical,digitalSignature,keyCertSign -keyout key.pem -out certificate.pem"""
SCALE = int(os.environ.get("BENCH_SCALE", "1"))  # With --short, this divides the amounts.

# ---- the server process ----

JSON_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
COMPLETION = """{"id": "chatcmpl-01J9Z3K7W5", "object": "chat.completion", "created": 1760000000,
"model": "openai/gpt-4o-mini", "choices": [{"index": 0, "message": {"role": "assistant", "content":
"%s"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 18, "completion_tokens": 26,
"total_tokens": 44}, "lowrouter": {"generation_id": "gen_01J9", "provider": "openai", "region":
"eu-west", "eco": {"energy_wh": 0.0021, "carbon_g": 0.00057, "accuracy": "medium"}}}"""
STREAM_HEAD = b"""HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r
Transfer-Encoding: chunked\r\nX-LowRouter-Generation-ID: gen_01J9\r\n\r\n"""
EVENT = (
    '{"id": "chatcmpl-01J9Z3K7W5", "object": "chat.completion.chunk", "created": 1760000000, '
    '"model": "openai/gpt-4o-mini", "choices": [{"index": 0, "delta": %s, "finish_reason": %s}]}'
)
EVENTS = [EVENT % ('{"content": " word%03d"}' % number, "null") for number in range(1000)]


def http_chunk(events: list[str]) -> bytes:
    """Encode server-sent events as one chunk of an HTTP body."""
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


# Each chunk is one write. A block of 50 events has 10 KB and fits into one TLS record.
CHUNKS = {
    "events": [http_chunk([event]) for event in EVENTS],
    "blocks": [http_chunk(EVENTS[start : start + 50]) for start in range(0, 1000, 50)],
}
LAST_CHUNK = http_chunk([EVENT % ("{}", '"stop"'), "[DONE]"]) + b"0\r\n\r\n"


class Handler(StreamRequestHandler):
    """The requested model selects the answer: text/BYTES, events/COUNT or blocks/COUNT."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # The client may close the connection at any time.
            for line in self.rfile:
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split()[1])
                elif line == b"\r\n":
                    request = json.loads(self.rfile.read(length))
                    kind, amount = request["model"].split("/")
                    self.answer(kind, int(amount))

    def answer(self, kind: str, amount: int) -> None:
        if kind == "text":
            body = COMPLETION % ("x" * amount)
            self.wfile.write((JSON_HEAD % len(body) + body).encode())
            return
        chunks = CHUNKS[kind]
        writes = amount * len(chunks) // len(EVENTS)
        self.wfile.write(STREAM_HEAD)
        for chunk in itertools.islice(itertools.cycle(chunks), writes):
            self.wfile.write(chunk)
        self.wfile.write(LAST_CHUNK)


def serve() -> None:
    """Print the URLs as JSON, then serve until the parent process closes standard input."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("certificate.pem", "key.pem")
    urls = {}
    for scheme in ("http", "https"):
        server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.socket.listen(1024)  # Many threads connect at once.
        urls[scheme] = f"{scheme}://127.0.0.1:{server.server_address[1]}/api/v1"
        if scheme == "https":
            # The handshake is left to the thread that reads from the connection.
            options = {"server_side": True, "do_handshake_on_connect": False}
            server.socket = context.wrap_socket(server.socket, **options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps(urls), flush=True)
    sys.stdin.read()


# ---- the client processes ----

# A client is a script, so that a cold start imports only what the client needs. In a script,
# chat() makes a call and returns its text, and texts() yields the texts of a stream.
PRELUDE = """
import sys, time
KEY = "lr-sk-bench-0123456789abcdef0123456789abcdef"
HEADERS = {"Authorization": "Bearer " + KEY, "Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "In one sentence, what is a vector database?"}]
def cold_start():
    next(texts("events/50"))
    return 1e3 * (time.time() - float(sys.argv[1]))  # The argument is the time of the start.
started = time.process_time()
"""
CLIENTS = {
    "lowrouter": """
import lowrouter
import_ms = 1e3 * (time.process_time() - started)
client = lowrouter.Client(KEY, base_url=URL)
def chat(model):
    return client.chat(MESSAGES, model=model).text
def texts(model):
    with client.stream(MESSAGES, model=model) as stream:
        for chunk in stream:
            yield chunk.text
""",
    "urllib": """
import json, urllib.request
import_ms = 1e3 * (time.process_time() - started)
def texts(model):
    body = json.dumps({"model": model, "messages": MESSAGES, "stream": True}).encode()
    request = urllib.request.Request(URL + "/chat/completions", body, HEADERS)
    with urllib.request.urlopen(request) as response:
        event = json.loads(response.readline()[6:])
        yield event["choices"][0]["delta"]["content"]
""",
    "http.client": """
import http.client, json
connect = http.client.HTTPSConnection if URL.startswith("https:") else http.client.HTTPConnection
idle = []
def chat(model):
    try:
        connection = idle.pop()
    except IndexError:
        connection = connect(URL.split("/")[2])
    body = json.dumps({"model": model, "messages": MESSAGES}).encode()
    connection.request("POST", "/api/v1/chat/completions", body, HEADERS)
    answer = json.loads(connection.getresponse().read())
    idle.append(connection)
    return answer["choices"][0]["message"]["content"]
""",
    "json.loads": """
import bench, itertools, json
def texts(model):
    count = int(model.split("/")[1])
    for event in itertools.islice(itertools.cycle(bench.EVENTS), count):
        json.loads(event)
        yield " word000"
""",
    "openai": """
import openai
import_ms = 1e3 * (time.process_time() - started)
create = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0).chat.completions.create
def chat(model):
    return create(messages=MESSAGES, model=model).choices[0].message.content
def texts(model):
    for chunk in create(messages=MESSAGES, model=model, stream=True):
        yield chunk.choices[0].delta.content or ""
""",
    "httpx": """
import httpx
import_ms = 1e3 * (time.process_time() - started)
client = httpx.Client(base_url=URL, headers=HEADERS)
def chat(model):
    response = client.post("/chat/completions", json={"model": model, "messages": MESSAGES})
    return response.json()["choices"][0]["message"]["content"]
""",
}


def call_ms(chat: Callable, threads: int, calls: int) -> tuple[float, int]:
    """Return CPU milliseconds per call, and the number of calls that failed."""
    barrier = threading.Barrier(threads + 1)
    texts = []

    def make_calls() -> None:
        barrier.wait()
        for _ in range(calls):
            texts.append(chat("text/48"))

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):  # The first pass opens the connections. The second one is measured.
            futures = [pool.submit(make_calls) for _ in range(threads)]
            start = time.process_time()
            barrier.wait()
            wait(futures)
            seconds = time.process_time() - start
    return 1e3 * seconds / calls / threads, 2 * calls * threads - len(texts)


def event_us(texts: Callable, kind: str) -> float:
    """Return CPU microseconds per event of a stream."""
    events = 100_000 // SCALE
    list(texts(f"{kind}/1000"))  # This opens the connection.
    start = time.process_time()
    size = sum(map(len, texts(f"{kind}/{events}")))
    assert size == events * len(" word000")
    return 1e6 * (time.process_time() - start) / events


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    kilobytes = status.split("VmHWM:")[1].split()[0]
    return int(kilobytes) * 1024


def growth(receive: Callable, kind: str, amount: int) -> float:
    """Return the growth of peak memory while an answer is received, divided by its size."""
    list(receive(f"{kind}/1000"))  # This opens the connection.
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak is now the memory in use.
    before = peak_memory()
    size = sum(map(len, receive(f"{kind}/{amount // SCALE}")))
    return (peak_memory() - before) / size


# ---- the table ----

# Limit, rounds, scheme, title, columns, and the figure as an expression in the script of a client.
# The first column is the floor. Without a floor, the limit applies to the figure of lowrouter.
ROWS = """
1.05 | 21 | https | import, CPU ms | urllib openai httpx | import_ms
1.10 | 15 | https | first token of a cold start, TLS, ms | urllib openai | cold_start()
1.30 | 11 | https | warm call, TLS, CPU ms | http.client openai httpx | call_ms(chat, 1, 200)[0]
2.00 |  5 | http  | event in a block, CPU us | json.loads openai | event_us(texts, "blocks")
2.00 |  5 | https | event in a block, TLS, CPU us | json.loads openai | event_us(texts, "blocks")
5.00 |  5 | https | event per TLS record, CPU us | json.loads openai | event_us(texts, "events")
1.00 |  1 | http  | memory growth by 1M events / text |  | growth(texts, "blocks", 1_000_000)
2.10 |  3 | http  | memory peak of 50 MB answer / size |  | growth(chat, "text", 50_000_000)
1.50 |  3 | http  | call by 64 threads, CPU ms | http.client openai httpx | call_ms(chat, 64, 8)[0]
0.00 |  1 | http  | failed calls by 64 threads |  | call_ms(chat, 64, 24)[1]
"""


def prepare(scale: int) -> None:
    """Fill the working folder, and set the environment of all processes that are started."""
    library = FOLDER.parent / "lowrouter.py"
    pathlib.Path("lowrouter.py").write_bytes(library.read_bytes())
    py_compile.compile("lowrouter.py", doraise=True)
    subprocess.check_call(OPENSSL.split(), stderr=subprocess.DEVNULL)
    bundle = pathlib.Path("certificate.pem").read_bytes()
    authorities = ssl.get_default_verify_paths().cafile
    if authorities:  # A client usually has to load these, so they are a part of a cold start.
        bundle += pathlib.Path(authorities).read_bytes()
    pathlib.Path("bundle.pem").write_bytes(bundle)
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("PYTHON", "LOWROUTER")):
            del os.environ[name]
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PYTHONPATH"] = f"{os.getcwd()}:{FOLDER}"
    os.environ["SSL_CERT_FILE"] = os.path.abspath("bundle.pem")
    os.environ["BENCH_SCALE"] = str(scale)


def run(figure: str, column: str, url: str) -> float:
    """Run the script of a client in a new process, and return the figure that it prints."""
    code = f"URL = {url!r}{PRELUDE}{CLIENTS[column]}"
    if figure != "cold_start()":
        code += "from bench import call_ms, event_us, growth\n"
    command = [sys.executable, "-c", f"{code}print({figure})", str(time.time())]
    return float(subprocess.check_output(command))


def measure(line: str, peers: list, urls: dict, scale: int) -> dict:
    """Measure the columns of a row in turn, print the row, and return its figures."""
    limit, rounds, scheme, title, columns, figure = line.split(" | ")
    url = urls[scheme.strip()]
    floor = columns.split(" ")[0]
    names = ["lowrouter", *columns.split()]
    names = [name for name in names if name not in PEERS or name in peers]
    results = []
    for _ in range(int(rounds) // scale or 1):
        results.append({name: run(figure, name, url) for name in names})
    medians = {}
    for name in names:
        medians[name] = statistics.median(each[name] for each in results)
    ratio = statistics.median(each["lowrouter"] / each.get(floor, 1) for each in results)
    verdict = "ok" if ratio <= float(limit) else "OVER"
    texts = {name: f"{medians[name]:.4g}" for name in names}
    floor_text = f"{texts.get(floor, '')} {floor}"
    cells = [f"{title:36}", f"{texts['lowrouter']:>9}", f"{floor_text:>18}"]
    for peer in peers:
        cells.append(texts.get(peer, ""))
    cells += [f"{ratio:5.2f}", f"{limit:>5}", f"{verdict:4}"]
    print("|", " | ".join(cells), "|", flush=True)
    return {"title": title, "medians": medians, "ratio": ratio, "limit": float(limit)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="do a small part of the work")
    parser.add_argument("--peers", action="store_true", help="measure openai and httpx too")
    parser.add_argument("--json", type=os.path.abspath, help="write the figures to this file")
    options = parser.parse_args()
    scale = 50 if options.short else 1
    peers = [name for name in PEERS if options.peers and find_spec(name)]
    if options.peers and peers != PEERS:
        print("Not installed:", *sorted(set(PEERS) - set(peers)), file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(scale)
        command = [sys.executable, "-c", "import bench; bench.serve()"]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        urls = json.loads(server.stdout.readline())
        print(f"Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}, {os.cpu_count()} cores\n")
        header = ["", "lowrouter", "floor", *peers, "ratio", "limit", ""]
        print("|", " | ".join(header), "|")
        print("|" + " --- |" * len(header))
        for line in ROWS.strip().splitlines():
            if "growth" in line and sys.platform != "linux":
                continue
            rows.append(measure(line, peers, urls, scale))
        server.communicate()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
