# SPDX-License-Identifier: MIT
"""What `lowrouter.py` costs beside the least that Python can do, and beside curl.

    python3 .ci/bench.py [--short] [--peers] [--json FILE]

It starts its own server process and talks to nothing but loopback. All columns of a row are
measured in turn (A B C, A B C, ...); a cell is the median over the rounds, a ratio is the median
of the ratios within each round, so a machine that is busy for a while spoils neither. Nothing is
measured again because it looks bad. "at most" is the budget of design.md; OVER says that it is
not met. CPU is user and system time of the client alone. POSIX only; memory is told on Linux only.

A server's answer is chosen by the model of the request: `chat`, `text/BYTES`, or
`stream/EVENTS/EVENTS PER WRITE/MILLISECONDS AFTER THE FIRST WRITE`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import py_compile
import re
import resource
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple

LIBRARY = pathlib.Path(__file__).resolve().parent.parent / "lowrouter.py"
KEY = "lr-sk-bench-0123456789abcdef0123456789abcdef"
PROMPT = "In one sentence, what is a vector database?"
CYCLE = 1000  # different events in a stream, over and over
BLOCK = 50  # events per write where a stream comes in blocks: 10 KB, less than one TLS record
SHORT = 50  # --short does this part of the work
PEER_ROUNDS = 3  # one round in three is enough for those that are slower by far
OURS = ("lowrouter", "only iterated", "http.client", "urllib", "json.loads", "curl")
PEERS = ("openai", "httpx")

# ---- what is said --------------------------------------------------------------------------------


def event(number: int) -> str:
    delta = {"content": f" word{number % CYCLE:03}"}
    return chunk([{"index": 0, "delta": delta, "finish_reason": None}])


def chunk(choices: list[Any], **more: Any) -> str:
    head = {"id": "chatcmpl-01J9Z3K7W5", "object": "chat.completion.chunk", "created": 1760000000}
    return json.dumps({**head, "model": "openai/gpt-4o-mini", "choices": choices, **more})


def completion(text: str) -> bytes:
    """The documented answer, about 600 bytes around its text."""
    message = {"role": "assistant", "content": text}
    eco = {"energy_wh": 0.0021, "carbon_g": 0.00057, "accuracy": "medium"}
    routed = {"generation_id": "gen_01J9", "provider": "openai", "region": "eu-west", "eco": eco}
    answer = {
        "id": "chatcmpl-01J9Z3K7W5",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "openai/gpt-4o-mini",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 18, "completion_tokens": 26, "total_tokens": 44},
        "lowrouter": routed,
    }
    return json.dumps(answer).encode()


def request_body(prompt: str, model: str) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "stream": model.startswith("stream")}
    return json.dumps(body).encode()


HEADERS = {"Authorization": "Bearer " + KEY, "Content-Type": "application/json"}

# ---- the server: a process of its own, a thread per connection -----------------------------------

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"X-LowRouter-Generation-ID: gen_01J9\r\n\r\n"
)
counters = {"connections": 0, "handshakes": 0}
counting = threading.Lock()


def count(name: str) -> None:
    with counting:
        counters[name] += 1


def framed(data: Iterable[str]) -> bytes:
    """Server-sent events as one chunk of HTTP."""
    body = b"".join(b"data: %s\n\n" % each.encode() for each in data)
    return b"%x\r\n%s\r\n" % (len(body), body)


@functools.lru_cache()
def frames(per_write: int) -> list[bytes]:
    starts = range(0, CYCLE, per_write)
    return [framed(map(event, range(start, start + per_write))) for start in starts]


@functools.lru_cache()
def last_frame() -> bytes:
    stop = chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    return framed([stop, chunk([], usage={"total_tokens": 44}), "[DONE]"]) + b"0\r\n\r\n"


def send_stream(sock: socket.socket, events: int, per_write: int, pause: float) -> None:
    sock.sendall(STREAM_HEAD)
    for number, frame in enumerate(itertools.cycle(frames(per_write))):
        if number * per_write >= events:
            break
        sock.sendall(frame)
        if pause and not number:
            time.sleep(pause)
    sock.sendall(last_frame())


def send_json(sock: socket.socket, body: bytes) -> None:
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    sock.sendall(head.format(len(body)).encode() + body)


def read_request(sock: socket.socket, reader: Any) -> tuple[bytes, bytes]:
    """Request line and body; b"" at the end of the connection."""
    line, length = reader.readline(), 0
    for header in iter(reader.readline, b"\r\n"):
        name, _, value = header.lower().partition(b":")
        if name == b"content-length":
            length = int(value)
        elif name == b"expect":
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif not header:
            return b"", b""
    return line, reader.read(length)


def answer(sock: socket.socket, line: bytes, body: bytes) -> None:
    found = re.search(rb'"model": ?"([^"]*)"', body)
    kind, *numbers = found[1].decode().split("/") if found else [""]
    if b" /counters " in line:
        send_json(sock, json.dumps(counters).encode())
    elif kind == "stream":
        events, per_write, pause = map(int, numbers)
        send_stream(sock, events, per_write, pause / 1000)
    elif kind == "text":
        send_json(sock, completion("x" * int(numbers[0])))
    else:
        send_json(sock, completion("A vector database finds what is near in meaning."))


def converse(sock: socket.socket, context: ssl.SSLContext | None) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            sock = context.wrap_socket(sock, server_side=True)
            count("handshakes")
        with sock.makefile("rb", 1 << 16) as reader:
            for line, body in iter(lambda: read_request(sock, reader), (b"", b"")):
                answer(sock, line, body)
    except OSError:
        pass  # the client has gone
    finally:
        sock.close()


def accept(listener: socket.socket, context: ssl.SSLContext | None) -> None:
    while True:
        sock, _ = listener.accept()
        count("connections")
        threading.Thread(target=converse, args=(sock, context), daemon=True).start()


def serve(certificate: str) -> None:
    """Print the ports of http and https, and serve until standard input ends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    ports = {}
    for scheme, each in (("http", None), ("https", context)):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        ports[scheme] = listener.getsockname()[1]
        threading.Thread(target=accept, args=(listener, each), daemon=True).start()
    print(json.dumps(ports), flush=True)
    sys.stdin.read()


# ---- the clients: one class per column, run in a process of its own ------------------------------


class Column:
    """A client; where a call or an event costs much more, fewer of them are measured."""

    calls_part = events_part = 1  # such a part of the calls and of the events
    floor: HttpClient  # what the time of a first token is compared with in the same process


class Lowrouter(Column):
    def __init__(self, url: str) -> None:
        import lowrouter

        self.client = lowrouter.Client(KEY, base_url=url)

    def chat(self, prompt: str, model: str) -> str:
        return self.client.chat(prompt, model=model).text

    def texts(self, model: str) -> Iterator[str]:
        with self.client.stream(PROMPT, model=model) as stream:
            for each in stream:
                yield each.text


class LowrouterOnly(Lowrouter):
    """Looks at no chunk, but at the whole text in the end."""

    def texts(self, model: str) -> Iterator[str]:
        with self.client.stream(PROMPT, model=model) as stream:
            yield stream.result().text


def texts_of(response: Iterable[bytes]) -> Iterator[str]:
    """The loop that everybody writes: it takes a stream that was cut for a whole one."""
    for line in response:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            yield choices[0]["delta"].get("content") or "" if choices else ""


def text_of(body: bytes) -> str:
    text: str = json.loads(body)["choices"][0]["message"]["content"]
    return text


class HttpClient(Column):
    """Kept connections, last in first out as with lowrouter; it checks nothing."""

    def __init__(self, url: str) -> None:
        self.url = urllib.parse.urlsplit(url)
        self.context = ssl.create_default_context()
        self.idle: list[http.client.HTTPConnection] = []

    def connection(self) -> http.client.HTTPConnection:
        with contextlib.suppress(IndexError):
            return self.idle.pop()
        if self.url.scheme == "http":
            return http.client.HTTPConnection(self.url.netloc)
        return http.client.HTTPSConnection(self.url.netloc, context=self.context)

    def chat(self, prompt: str, model: str) -> str:
        connection = self.connection()
        path = self.url.path + "/chat/completions"
        connection.request("POST", path, request_body(prompt, model), HEADERS)
        text = text_of(connection.getresponse().read())
        self.idle.append(connection)
        return text

    def texts(self, model: str) -> Iterator[str]:
        connection = self.connection()
        path = self.url.path + "/chat/completions"
        connection.request("POST", path, request_body(PROMPT, model), HEADERS)
        yield from texts_of(connection.getresponse())
        self.idle.append(connection)


class Urllib(Column):
    calls_part = 20

    def __init__(self, url: str) -> None:
        self.url = url + "/chat/completions"

    def open(self, prompt: str, model: str) -> Any:
        request = urllib.request.Request(self.url, request_body(prompt, model), HEADERS)
        return urllib.request.urlopen(request)

    def chat(self, prompt: str, model: str) -> str:
        with self.open(prompt, model) as response:
            return text_of(response.read())

    def texts(self, model: str) -> Iterator[str]:
        with self.open(PROMPT, model) as response:
            yield from texts_of(response)


class JsonLoads(Column):
    """No network at all: the events of a stream, parsed."""

    def __init__(self, url: str) -> None:
        self.cycle = [event(number) for number in range(CYCLE)]

    def chat(self, prompt: str, model: str) -> str:
        return prompt

    def texts(self, model: str) -> Iterator[str]:
        for data in itertools.islice(itertools.cycle(self.cycle), int(model.split("/")[1])):
            yield json.loads(data) and " word000"


class OpenAI(Column):
    calls_part = events_part = 10

    def __init__(self, url: str) -> None:
        import openai

        self.create = openai.OpenAI(
            base_url=url, api_key=KEY, max_retries=0
        ).chat.completions.create

    def ask(self, prompt: str, **fields: Any) -> Any:
        return self.create(messages=[{"role": "user", "content": prompt}], **fields)

    def chat(self, prompt: str, model: str) -> str:
        text: str = self.ask(prompt, model=model).choices[0].message.content
        return text

    def texts(self, model: str) -> Iterator[str]:
        with self.ask(PROMPT, model=model, stream=True) as stream:
            for each in stream:
                yield each.choices[0].delta.content or "" if each.choices else ""


class Httpx(Column):
    calls_part = events_part = 10

    def __init__(self, url: str) -> None:
        import httpx

        self.client = httpx.Client(base_url=url, headers=HEADERS)

    def chat(self, prompt: str, model: str) -> str:
        body = request_body(prompt, model)
        return text_of(self.client.post("/chat/completions", content=body).content)

    def texts(self, model: str) -> Iterator[str]:
        body = request_body(PROMPT, model)
        with self.client.stream("POST", "/chat/completions", content=body) as response:
            yield from texts_of(line.encode() for line in response.iter_lines())


CLIENTS = {
    "lowrouter": Lowrouter,
    "only iterated": LowrouterOnly,
    "http.client": HttpClient,
    "urllib": Urllib,
    "json.loads": JsonLoads,
    "openai": OpenAI,
    "httpx": Httpx,
}

# ---- the operations of a client process: each returns numbers, less is better --------------------


def read_all(client: Any, model: str) -> int:
    """Read a stream and return its length; a wrong one must not count as a fast one."""
    events = int(model.split("/")[1])
    size = sum(map(len, client.texts(model)))
    if size != events * len(" word000"):
        raise RuntimeError(f"{size} characters in {events} events")
    return size


def warm(client: Any, calls: int) -> dict[str, float]:
    client.chat(PROMPT, "chat")  # connected, if it stays so
    calls = max(1, calls // client.calls_part)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        client.chat(PROMPT, "chat")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"CPU ms": 1e3 * cpu / calls, "wall ms": 1e3 * wall / calls}


def mixed(client: Any, calls: int) -> dict[str, float]:
    """Chats and streams in turn."""
    for _ in range(calls // 2):
        client.chat(PROMPT, "chat")
        read_all(client, "stream/50/50/0")
    return {}


def stream(client: Any, events: int, per_write: int) -> dict[str, float]:
    client.chat(PROMPT, "chat")
    events = max(BLOCK, events // client.events_part)
    cpu = time.process_time()
    read_all(client, f"stream/{events}/{per_write}/0")
    return {"CPU us/event": 1e6 * (time.process_time() - cpu) / events}


def first_token(client: Any, calls: int) -> dict[str, float]:
    """From the call to the first text, when the second comes 5 ms later; in turn with the floor."""
    both = (client, client.floor)
    for each in both:
        read_all(each, "stream/10/1/0")
    calls = max(1, calls // client.calls_part)
    walls = [[time_to_first(each) for each in both] for _ in range(calls)]
    found = {"wall ms": statistics.median(ours for ours, _ in walls)}
    found["added ms"] = statistics.median(ours - theirs for ours, theirs in walls)
    return found


def time_to_first(client: Any) -> float:
    start = time.perf_counter()
    texts = client.texts("stream/10/1/5")
    next(texts)
    seconds = time.perf_counter() - start
    sum(map(len, texts))  # to its end, so that the connection can be kept
    return 1e3 * seconds


def threads(client: Any, calls: int, number: int) -> dict[str, float]:
    errors: list[str] = []
    start = threading.Barrier(number + 1)

    def run() -> None:
        start.wait()
        for _ in range(calls):
            try:
                client.chat(PROMPT, "chat")
            except Exception as error:
                errors.append(repr(error))

    workers = [threading.Thread(target=run) for _ in range(number)]
    for worker in workers:
        worker.start()
    cpu = time.process_time()
    start.wait()
    for worker in workers:
        worker.join()
    cpu = time.process_time() - cpu
    return {"errors": len(errors), "CPU ms/call": 1e3 * cpu / calls / number}


def memory(name: str) -> int:
    """VmRSS, or VmHWM: its peak; bytes of this process."""
    with open("/proc/self/status") as file:
        found = re.search(name + r":\s+(\d+) kB", file.read())
    return int(found[1]) * 1024 if found else 0


def growth(work: Callable[[], int]) -> dict[str, float]:
    """How far memory rises while `work` is done, as a multiple of the size that it returns."""
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    size = work()
    return {"x its size": (memory("VmHWM") - before) / size}


def stream_memory(client: Any, events: int) -> dict[str, float]:
    read_all(client, f"stream/{CYCLE}/{BLOCK}/0")
    return growth(lambda: read_all(client, f"stream/{events}/{BLOCK}/0"))


def answer_memory(client: Any, size: int) -> dict[str, float]:
    client.chat(PROMPT, "chat")
    return growth(lambda: len(client.chat(PROMPT, f"text/{size}")))


def request_memory(client: Any, size: int) -> dict[str, float]:
    client.chat(PROMPT, "chat")
    prompt = "x" * size
    return growth(lambda: len(prompt) if client.chat(prompt, "chat") else 0)


def work(column: str, url: str) -> None:
    """Do the operations that standard input names, a line each."""
    client = CLIENTS[column](url)
    client.floor = HttpClient(url)
    for line in sys.stdin:
        operation, *arguments = json.loads(line)
        print(json.dumps(globals()[operation](client, *arguments)), flush=True)


# ---- scripts that are run as they are: imports and cold starts -----------------------------------

IMPORT = """
import time
start = time.process_time()
import {}
print(1e3 * (time.process_time() - start))
"""
IMPORTS = {"lowrouter": "lowrouter", "urllib": "urllib.request, json"}
IMPORTS.update({"openai": "openai", "httpx": "httpx"})
ASK = f"messages=[{{'role': 'user', 'content': {PROMPT!r}}}], model='stream/50/1/0', stream=True"
LOOP = """
    for line in response:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            print(choices[0]["delta"].get("content", "") if choices else "", end="", flush=True)
"""
COLD = {
    "lowrouter": f"""
import lowrouter
with lowrouter.stream({PROMPT!r}, model="stream/50/1/0") as stream:
    for chunk in stream:
        print(chunk.text, end="", flush=True)
""",
    "urllib": f"""
import json, os, urllib.request
url = os.environ["LOWROUTER_BASE_URL"] + "/chat/completions"
headers = {{"Authorization": "Bearer " + os.environ["LOWROUTER_API_KEY"]}}
headers["Content-Type"] = "application/json"
request = urllib.request.Request(url, json.dumps(dict({ASK})).encode(), headers)
with urllib.request.urlopen(request) as response:{LOOP}
""",
    "openai": f"""
import openai
with openai.OpenAI().chat.completions.create({ASK}) as stream:
    for chunk in stream:
        print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
""",
    "httpx": f"""
import httpx, json, os
url = os.environ["LOWROUTER_BASE_URL"] + "/chat/completions"
headers = {{"Authorization": "Bearer " + os.environ["LOWROUTER_API_KEY"]}}
with httpx.stream("POST", url, headers=headers, json=dict({ASK})) as stream:
    response = (line.encode() for line in stream.iter_lines()){LOOP}
""",
}
STATUS = "\nprint(open('/proc/self/status').read())"

# ---- the bench: the server, and the processes whose cost is measured -----------------------------


def make_certificate(folder: pathlib.Path) -> pathlib.Path:
    """A key and a certificate for 127.0.0.1 that also passes the strict checks of Python 3.13."""
    file = folder / "server.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    command += " -addext keyUsage=critical,digitalSignature,keyCertSign"
    command += f" -keyout {file} -out {folder / 'certificate.pem'}"
    subprocess.run(command.split(), check=True, stderr=subprocess.DEVNULL)
    with open(file, "a") as both:
        both.write((folder / "certificate.pem").read_text())
    return file


def make_bundle(folder: pathlib.Path) -> pathlib.Path:
    """The CAs of this machine and ours, since loading them all is a part of every cold start."""
    paths, bundle = ssl.get_default_verify_paths(), folder / "bundle.pem"
    known = pathlib.Path(paths.cafile or paths.openssl_cafile)
    certificates = known.read_bytes() if known.is_file() else b""
    bundle.write_bytes(certificates + b"\n" + (folder / "certificate.pem").read_bytes())
    return bundle


def clean_environment() -> dict[str, str]:
    """That of this process without proxies, CAs, keys and what changes Python."""
    ours = re.compile(r".*_proxy$|.*ca_bundle$|^(ssl|python|lowrouter|openai|httpx)_?", re.I)
    return {name: value for name, value in os.environ.items() if not ours.match(name)}


class Process:
    """This script in another role: lines go in, JSON comes out; it ends when its input does."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.name, pipe = " ".join(arguments), subprocess.PIPE
        command = [sys.executable, __file__, *arguments]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench.py {self.name} failed")
        return json.loads(line)

    def ask(self, *operation: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(operation).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.communicate()


class Bench:
    def __init__(self, folder: pathlib.Path, short: bool) -> None:
        self.folder, self.short = folder, short
        self.make_copies()
        self.environment = clean_environment()
        certificate = make_certificate(folder)
        self.bundle = str(make_bundle(folder))
        self.server = Process(self.environment, "--serve", str(certificate))
        self.ports = self.server.answer()
        self.control = http.client.HTTPConnection("127.0.0.1", self.ports["http"])
        self.workers: dict[tuple[str, str], Process] = {}
        self.environment.update({"SSL_CERT_FILE": self.bundle, "LOWROUTER_API_KEY": KEY})
        self.environment.update({"OPENAI_API_KEY": KEY, "PYTHONDONTWRITEBYTECODE": "1"})
        self.environment["PYTHONPATH"] = str(folder / "compiled")

    def make_copies(self) -> None:
        """The library with byte code and without; and it may be edited while we run."""
        for name in ("compiled", "plain"):
            (self.folder / name).mkdir()
            shutil.copy(LIBRARY, self.folder / name)
        py_compile.compile(str(self.folder / "compiled" / "lowrouter.py"), doraise=True)

    def close(self) -> None:
        for process in [*self.workers.values(), self.server]:
            process.close()
        self.control.close()

    def url(self, scheme: str) -> str:
        return f"{scheme}://127.0.0.1:{self.ports[scheme]}/api/v1"

    def scaled(self, amount: int) -> int:
        return max(1, amount // SHORT) if self.short else amount

    def counters(self) -> dict[str, int]:
        self.control.request("GET", "/counters")
        found: dict[str, int] = json.loads(self.control.getresponse().read())
        return found

    def worker(self, column: str, scheme: str) -> Process:
        """The process of a column, started when it is first needed."""
        if (column, scheme) not in self.workers:
            self.workers[column, scheme] = self.fresh(column, scheme)
        return self.workers[column, scheme]

    def fresh(self, column: str, scheme: str) -> Process:
        return Process(self.environment, "--worker", column, self.url(scheme))

    def run(self, command: list[str], **variables: str) -> tuple[bytes, dict[str, float]]:
        """Run a command; its output, and what it took."""
        environment = {**self.environment, **variables}
        start, cpu = time.perf_counter(), children_cpu()
        options: dict[str, Any] = {
            "env": environment,
            "cwd": self.folder,
        }  # for `python -c` looks here
        with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
            assert process.stdout
            output = process.stdout.read(1)
            first = time.perf_counter() - start
            output += process.stdout.read()
        end = time.perf_counter() - start
        if process.returncode or not output:
            raise SystemExit(f"{command} failed")
        seconds = {"first token ms": first, "exit ms": end, "CPU ms": children_cpu() - cpu}
        return output, {name: 1e3 * value for name, value in seconds.items()}

    def curl(self, scheme: str, model: str) -> list[str]:
        command = ["curl", "-sNf", "--noproxy", "*", "--cacert", self.bundle]
        for name, value in HEADERS.items():
            command += ["-H", f"{name}: {value}"]
        url = self.url(scheme) + "/chat/completions"
        return [*command, "-d", request_body(PROMPT, model).decode(), url]


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- the measurements: each `run(bench, column)` returns the numbers of one round ----------------

Run = Callable[[Bench, str], "dict[str, float]"]


def importing(folder: str) -> Run:
    def run(bench: Bench, column: str) -> dict[str, float]:
        script = IMPORT.format(IMPORTS[column])
        path = str(bench.folder / folder)
        output, _ = bench.run([sys.executable, "-c", script], PYTHONPATH=path)
        return {"CPU ms": float(output)}

    return run


def cold(scheme: str) -> Run:
    def run(bench: Bench, column: str) -> dict[str, float]:
        command = [sys.executable, "-c", COLD.get(column, "")]
        if column == "curl":
            command = bench.curl(scheme, "stream/50/1/0")
        url = bench.url(scheme)
        return bench.run(command, LOWROUTER_BASE_URL=url, OPENAI_BASE_URL=url)[1]

    return run


def resident(scheme: str) -> Run:
    def run(bench: Bench, column: str) -> dict[str, float]:
        command, url = [sys.executable, "-c", COLD[column] + STATUS], bench.url(scheme)
        output, _ = bench.run(command, LOWROUTER_BASE_URL=url, OPENAI_BASE_URL=url)
        found = re.search(rb"VmRSS:\s+(\d+) kB", output)
        return {"MB": int(found[1]) / 1024} if found else {}

    return run


def warmly(scheme: str, operation: str, amount: int, *more: int) -> Run:
    """An operation of the process that a column keeps; --short does a part of the amount."""

    def run(bench: Bench, column: str) -> dict[str, float]:
        found: dict[str, float]
        found = bench.worker(column, scheme).ask(operation, bench.scaled(amount), *more)
        return found

    return run


def streaming(scheme: str, events: int, per_write: int) -> Run:
    def run(bench: Bench, column: str) -> dict[str, float]:
        if column != "curl":
            return warmly(scheme, "stream", events, per_write)(bench, column)
        total = bench.scaled(events)
        command = bench.curl(scheme, f"stream/{total}/{per_write}/0")
        return {"CPU us/event": 1e3 * bench.run(command)[1]["CPU ms"] / total}

    return run


def connecting(scheme: str, calls: int) -> Run:
    def run(bench: Bench, column: str) -> dict[str, float]:
        before, worker = bench.counters(), bench.fresh(column, scheme)
        worker.ask("mixed", calls)
        after = bench.counters()
        worker.close()
        return {name: after[name] - before[name] for name in after}

    return run


def remembering(operation: str, amount: int) -> Run:
    """An operation that measures memory, each time in a new process."""

    def run(bench: Bench, column: str) -> dict[str, float]:
        if not os.path.exists("/proc/self/clear_refs"):
            return {}
        worker = bench.fresh(column, "http")
        found: dict[str, float] = worker.ask(operation, bench.scaled(amount))
        worker.close()
        return found

    return run


def size_on_disk(bench: Bench, column: str) -> dict[str, float]:
    return {"KB": LIBRARY.stat().st_size / 1024}


ITSELF = ""  # the value itself has a budget, not its ratio to a column


class Measurement(NamedTuple):
    title: str
    run: Run
    rounds: int
    columns: str  # separated by a bar
    base: str  # the column that ratios are taken to
    budgets: dict[str, dict[str, float]]  # of a value: at most so much of a column


def measurements() -> Iterator[Measurement]:
    """Each line of the table comes from one of these; the budgets are those of design.md."""
    scripts = "lowrouter|urllib|openai|httpx"
    clients = "lowrouter|http.client|urllib|openai|httpx"
    floor = "json.loads"
    streams = "lowrouter|only iterated|urllib|json.loads|curl|openai|httpx"

    budget: dict[str, dict[str, float]] = {"CPU ms": {"urllib": 1.05}}
    yield Measurement("import, byte code", importing("compiled"), 21, scripts, "urllib", budget)
    yield Measurement("import, no byte code", importing("plain"), 9, scripts, "urllib", {})
    for scheme in ("http", "https"):
        name, columns = "cold start, " + scheme, scripts + "|curl"
        budget = {"first token ms": {"urllib": 1.1, "openai": 1 / 6}} if scheme == "https" else {}
        yield Measurement(name, cold(scheme), 15, columns, "urllib", budget)
    yield Measurement(
        "RSS after a TLS call", resident("https"), 3, scripts, "urllib", {"MB": {"urllib": 1.1}}
    )
    for scheme in ("http", "https"):
        name, run = "warm call, " + scheme, warmly(scheme, "warm", 200)
        limits = {"http.client": 1.5, "openai": 1 / 4}
        budget = {"CPU ms": limits, "wall ms": limits} if scheme == "https" else {}
        yield Measurement(name, run, 11, clients, "http.client", budget)
    for scheme in ("http", "https"):
        name, run = "first token, warm, " + scheme, warmly(scheme, "first_token", 40)
        yield Measurement(name, run, 7, clients, "", {})
    budget = {"connections": {ITSELF: 1}, "handshakes": {ITSELF: 1}}
    yield Measurement("10 calls, https", connecting("https", 10), 1, clients, "", budget)
    for scheme in ("http", "https"):
        name, run = "stream in blocks, " + scheme, streaming(scheme, 100_000, BLOCK)
        budget = {"CPU us/event": {floor: 1.5, "openai": 1 / 20}}
        yield Measurement(name, run, 3, streams, floor, budget)
    for scheme in ("http", "https"):
        name, run = "stream, a write each, " + scheme, streaming(scheme, 100_000, 1)
        budget = {"CPU us/event": {floor: 3.2, "openai": 1 / 20}} if scheme == "https" else {}
        yield Measurement(name, run, 3, streams, floor, budget)
    kept, of_size = "lowrouter|http.client|openai|httpx", "x its size"
    run, budget = remembering("stream_memory", 1_000_000), {of_size: {ITSELF: 1.0}}
    yield Measurement("memory, 1M events", run, 1, "lowrouter", "", budget)
    recent = sys.version_info >= (3, 11)
    run, budget = remembering("answer_memory", 50_000_000), {of_size: {ITSELF: 2.1}}
    yield Measurement("memory, 50 MB answer", run, 3, kept, "", budget if recent else {})
    run = remembering("request_memory", 20_000_000)
    yield Measurement("memory, 20 MB request", run, 3, kept, "http.client", {})
    for number in (64, 256):
        name, run = f"{number} threads, http", warmly("http", "threads", 8, number)
        budget = {"errors": {ITSELF: 0}, "CPU ms/call": {"http.client": 1.5}}
        yield Measurement(name, run, 3, clients, "http.client", budget)
    yield Measurement("size on disk", size_on_disk, 1, "lowrouter", "", {"KB": {ITSELF: 60}})


Rounds = List[Dict[str, Dict[str, float]]]  # of each: column -> value's name -> value


def interleave(bench: Bench, measurement: Measurement, columns: Iterable[str]) -> Rounds:
    """Measure A B C, A B C, ..."""
    rounds: Rounds = []
    ours = [column for column in measurement.columns.split("|") if column in columns]
    for number in range(max(1, measurement.rounds // (10 if bench.short else 1))):
        due = [column for column in ours if column not in PEERS or number % PEER_ROUNDS == 0]
        rounds.append({column: measurement.run(bench, column) for column in due})
    return rounds


class Row(NamedTuple):
    name: str
    medians: dict[str, float]
    ratios: list[dict[str, Any]]  # each: to, ratio, at_most (None without a budget)


def median_ratio(rounds: Rounds, value: str, to: str) -> float | None:
    """The median of the ratios within each round; None when there is nothing to compare with."""
    pairs = [(each["lowrouter"][value], each[to][value]) for each in rounds if to in each]
    ratios = [ours / theirs for ours, theirs in pairs if theirs > 0]
    return statistics.median(ratios) if ratios else None


def rows_of(measurement: Measurement, rounds: Rounds) -> Iterator[Row]:
    columns = list(rounds[0])
    for value in rounds[0]["lowrouter"]:
        medians = {
            column: statistics.median(each[column][value] for each in rounds if column in each)
            for column in columns
        }
        limits = measurement.budgets.get(value, {})
        ratios = []
        for to in dict.fromkeys([measurement.base, *limits]):
            ratio = medians["lowrouter"] if to == ITSELF else median_ratio(rounds, value, to)
            if ratio is not None and (to != ITSELF or to in limits):
                ratios.append({"to": to, "ratio": ratio, "at_most": limits.get(to)})
        yield Row(f"{measurement.title}: {value}", medians, ratios)


# ---- the table -----------------------------------------------------------------------------------


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:#.3g}"


def verdict(ratio: dict[str, Any]) -> str:
    text = f"{ratio['ratio']:.2f} x {ratio['to']}" if ratio["to"] else shown(ratio["ratio"])
    if ratio["at_most"] is None:
        return text
    met = "ok" if ratio["ratio"] <= ratio["at_most"] else "OVER"
    return f"{text}, at most {shown(ratio['at_most'])}: {met}"


def cells(row: Row, columns: list[str]) -> list[str]:
    medians = [shown(row.medians.get(column)) for column in columns]
    return [row.name, *medians, "; ".join(map(verdict, row.ratios))]


def print_table(lines: list[list[str]]) -> None:
    """As Markdown that can be read as it is."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for first, *middle, last in lines:
        padded = [each.rjust(width) for each, width in zip(middle, widths[1:-1])]
        print("| " + " | ".join([first.ljust(widths[0]), *padded, last.ljust(widths[-1])]) + " |")


def about(arguments: list[str]) -> str:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    command = " ".join(["python3 .ci/bench.py", *arguments])
    return f"{time.strftime('%Y-%m-%d')}, {python}, {ssl.OPENSSL_VERSION}, {machine}: {command}"


def measure(bench: Bench, columns: list[str]) -> list[Row]:
    rows: list[Row] = []
    for measurement in measurements():
        print(measurement.title, end=" ... ", file=sys.stderr, flush=True)
        start = time.perf_counter()
        rows += rows_of(measurement, interleave(bench, measurement, columns))
        print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure lowrouter.py beside its alternatives.")
    parser.add_argument("--short", action="store_true", help="a little of all: see that it works")
    parser.add_argument("--peers", action="store_true", help="openai and httpx too, if installed")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE as well")
    options = parser.parse_args(arguments)
    columns = [column for column in OURS if column != "curl" or shutil.which("curl")]
    columns += [name for name in PEERS if options.peers and importlib.util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(Bench(pathlib.Path(folder), options.short)) as bench:
            rows = measure(bench, columns)
    title = about(arguments)
    print(title, end="\n\n")
    print_table([["", *columns, "ratio"], *(cells(row, columns) for row in rows)])
    if options.json:
        found = {"title": title, "rows": [row._asdict() for row in rows]}
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


ROLES: dict[str, Callable[..., None]] = {"--serve": serve, "--worker": work}

if __name__ == "__main__":
    role, *names = sys.argv[1:] or [""]
    if role in ROLES:
        ROLES[role](*names)
    else:
        main(sys.argv[1:])
