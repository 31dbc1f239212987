# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The lowrouter authors
"""A stub of the LowRouter gateway for your own tests, followed by the tests of lowrouter.py.

Copy this file under another name (pytest and unittest collect test_*.py, and would run the tests of
lowrouter.py together with yours), and start a stub in a test; it is a real server on 127.0.0.1:

    cp test_lowrouter.py gateway_stub.py

    import lowrouter
    from gateway_stub import KEY, StubGateway, answer, reply

    with StubGateway() as stub, lowrouter.Client(KEY, base_url=stub.url) as client:
        stub.play(answer("Hi", region="us-east"))
        assert client.chat("Greet me").text == "Hi"
        assert stub.requests[0].json["messages"][0]["content"] == "Greet me"
        stub.play(reply({"error": {"message": "slow down"}}, "429 Too Many Requests"), times=3)

`stub.env` has the settings for code that reads the environment. If scripted responses are unused
when the `with` block ends, as here, an AssertionError is raised; StubGateway(check_unused=False)
does not raise it. stub.play(*steps, times=1) scripts one response, or several. The steps are:

    bytes                     sent as they are; reply(), sse(), delta() and chunked() build them
    dict                      sent as JSON with status 200; answer() builds one
    CUT                       closes the connection
    RESET                     resets the connection
    STALL                     sends nothing until stub.hold is set or the stub is closed
    Wait(event)               waits for a threading.Event, ten seconds at most
    Drip(data, every, times)  sends the data every so many seconds, so many times (None: forever)
    function                  called with the socket

Other requests are answered as the gateway's documentation says: POST /chat/completions, GET
/models, /providers, /credits and /generation/ID. The first rule that applies gives the text:

    the last message is a tool's result    The tool says: ...
    "weather" in the prompt, with tools    a tool call; "in Paris" in the prompt fills in strings
    "vector database" in the prompt        a sentence about vector databases
    "count to N" in the prompt             the numbers from 1 to N, one per line
    "say hello"                            Hello!
    "hello" or "hi"                        Hello! How can I help you today?
    anything else                          You wrote: ... (the prompt)

tool_choice, response_format and max_tokens work. `python3 test_lowrouter.py --help` shows how to
run the tests, to try a command of lowrouter against a stub, and to keep a stub running.
"""

from __future__ import annotations

import ast
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import copy
import difflib
import email.utils
import faulthandler
import gc
import glob
import gzip
import http
import http.client
import inspect
import io
import itertools
import json
import os
import pathlib
import pickle
import py_compile
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import traceback
import tracemalloc
import unittest
import urllib.parse
import urllib.request
import zipfile
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from unittest import mock

import lowrouter

# ---- scripted steps -----------------------------------------------------------------------------

KEY = "lr-sk-stub-" + "0123456789abcdef" * 2 + "Zz9"  # the key that a stub accepts by default
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
CUT = "CUT"
RESET = "RESET"
STALL = "STALL"
Wait = collections.namedtuple("Wait", "event")
Drip = collections.namedtuple("Drip", "data every times", defaults=(None,))

_CREATED = 1767225600  # fixed, so that the same request always gets the same answer
_COMPLETION_HEAD = {"id": "chatcmpl-1", "created": _CREATED, "model": "openai/gpt-4o-mini"}
_CHUNK_FIELDS = ("id", "object", "created", "model", "choices", "usage", "lowrouter", "error")


def reply(
    body: object = b"", status: str = "200 OK", content_type: str = "application/json", **headers
) -> bytes:
    """Build a complete HTTP response; x_request_id="7" is a header, objects are dumped as JSON."""
    if not isinstance(body, (bytes, str)):
        body = json.dumps(body, ensure_ascii=False)
    if isinstance(body, str):
        body = body.encode("utf-8")
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    for name, value in headers.items():
        if "-" not in name:
            name = name.replace("_", "-").title()
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def answer(
    text: str | None = None,
    *,
    finish_reason: str | None = None,
    tool_calls: list | None = None,
    region: str = "eu-west",
    provider: str = "openai",
    **fields: object,
) -> dict:
    """Build a complete chat completion; `fields` (model, usage, ...) replace those it has."""
    message = {"role": "assistant", "content": text}
    if tool_calls:
        message["tool_calls"] = tool_calls
    if finish_reason is None:
        finish_reason = "tool_calls" if tool_calls else "stop"
    count = _count_tokens(text or "")
    completion = {**_COMPLETION_HEAD, "object": "chat.completion"}
    completion["choices"] = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
    completion["usage"] = usage
    completion["lowrouter"] = {"generation_id": "gen_1", "provider": provider, "region": region}
    completion.update(fields)
    return completion


def _count_tokens(text):
    return (len(text) + 3) // 4  # a token has about four characters


def sse(*events: object, done: bool = True) -> bytes:
    """Build the body of a stream: strings are sent as they are, objects are dumped as JSON."""
    blocks = []
    for event in events:
        if not isinstance(event, str):
            event = json.dumps(event, ensure_ascii=False)
        blocks.append(f"data: {event}\n\n")
    if done:
        blocks.append("data: [DONE]\n\n")
    return "".join(blocks).encode("utf-8")


def delta(
    text: str | None = None, finish: str | None = None, index: int = 0, **more: object
) -> dict:
    """Build a chunk of a stream; `more` are fields of the chunk (usage, ...) or of its delta."""
    content = {name: value for name, value in more.items() if name not in _CHUNK_FIELDS}
    if text is not None:
        content["content"] = text
    chunk = {**_COMPLETION_HEAD, "object": "chat.completion.chunk"}
    chunk["choices"] = [{"index": index, "delta": content, "finish_reason": finish}]
    chunk.update({name: value for name, value in more.items() if name in _CHUNK_FIELDS})
    return chunk


def chunked(*blocks: bytes, end: bool = True) -> bytes:
    """Frame the blocks for Transfer-Encoding: chunked; empty blocks are left out."""
    framed = [b"%x\r\n%s\r\n" % (len(block), block) for block in blocks if block]
    if end:
        framed.append(b"0\r\n\r\n")
    return b"".join(framed)


# ---- the models, and the text of a completion ---------------------------------------------------

_GRID = {  # g CO2e per kWh; regions of different providers differ, being different data centres
    "openai": {"eu-west": 271, "us-east": 384, "us-west": 240},
    "anthropic": {"us-east": 384, "us-west": 240},
    "mistral": {"eu-west": 56},
    "scaleway": {"eu-west": 44},
    "deepinfra": {"us-east": 350, "us-west": 190},
    "aws-bedrock": {"eu-west": 290, "us-east": 384},
}
_PROVIDERS = [{"id": name, "regions": list(regions)} for name, regions in _GRID.items()]
_CATALOGUE = (  # prices in credits per 1K tokens, energy in Wh per 1K tokens (None: unknown)
    # id, name, context, prompt, completion, energy, accuracy, capabilities, other providers
    ("openai/gpt-4o-mini", "GPT-4o mini", 128000, 0.015, 0.06, 0.048, "gross", "tsv", ""),
    ("openai/gpt-4o", "GPT-4o", 128000, 0.25, 1.0, 0.41, "gross", "tsv", ""),
    ("anthropic/claude-haiku-4.5", "Claude Haiku 4.5", 200000, 0.1, 0.5, 0.12, "gross", "tv",
     "aws-bedrock"),
    ("mistral/mistral-small-3.2", "Mistral Small 3.2", 128000, 0.01, 0.03, 0.018, "accurate",
     "tsv", "scaleway deepinfra"),
    ("mistral/codestral-2508", "Codestral", 256000, 0.03, 0.09, 0.04, "medium", "ts", ""),
    ("scaleway/llama-3.1-8b", "Llama 3.1 8B", 131072, 0.02, 0.02, 0.014, "accurate", "", ""),
    ("deepinfra/llama-3.1-8b", "Llama 3.1 8B", 131072, 0.006, 0.006, 0.016, "accurate", "", ""),
    ("deepinfra/preview-1", "Preview 1", 32768, 0.008, 0.008, None, None, "", ""),
)  # fmt: skip
_CAPABILITIES = {"t": "tool_use", "s": "structured_output", "v": "vision"}

# A model at a provider in a region: credits and g CO2e (None: unknown) per 1K tokens.
_Offer = collections.namedtuple("_Offer", "model provider region price carbon")


def _build_catalogue():
    """Return the models as GET /models lists them, and all offers."""
    models = []
    offers = []
    for row in _CATALOGUE:
        name, title, context, prompt, completion, energy, accuracy, letters, others = row
        owner = name.split("/")[0]
        providers = [owner, *others.split()]
        model = {"id": name, "object": "model", "created": _CREATED, "name": title}
        model.update(owned_by=owner, context_length=context, eco=None)
        model["regions"] = sorted({region for each in providers for region in _GRID[each]})
        model["capabilities"] = ["streaming", *(_CAPABILITIES[letter] for letter in letters)]
        unit = "credits per 1K tokens"
        model["pricing"] = {"prompt": prompt, "completion": completion, "unit": unit}
        if energy is not None:
            model["eco"] = {"energy_wh_per_1k_tokens": energy, "accuracy": accuracy}
        models.append(model)
        price = (3 * prompt + completion) / 4  # a prompt is usually longer than its answer
        for provider in providers:
            for region, grid in _GRID[provider].items():
                carbon = None if energy is None else round(energy * grid / 1000, 8)
                offers.append(_Offer(model, provider, region, price, carbon))
    return models, offers


def _sample_value(schema, text):
    """Return a value that fits a simple JSON schema; every string in it is `text`."""
    if "enum" in schema:
        return schema["enum"][0]
    if "properties" in schema:
        return {name: _sample_value(each, text) for name, each in schema["properties"].items()}
    samples = {"object": {}, "array": [], "integer": 1, "number": 1.5, "boolean": True}
    return samples.get(schema.get("type"), text)


def _plain_text(message):
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""


def _choose_function(body, prompt):
    """Return the function to call, with its arguments, or None if the answer is a text."""
    functions = [tool["function"] for tool in body.get("tools") or [] if "function" in tool]
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict):
        functions = [each for each in functions if each["name"] == choice["function"]["name"]]
    if not functions or choice == "none" or body["messages"][-1]["role"] == "tool":
        return None
    if choice == "auto" and "weather" not in prompt.lower():
        return None
    place = re.search(r"\bin ([A-Z]\w+)", prompt)
    schema = functions[0].get("parameters") or {"type": "object"}
    arguments = _sample_value(schema, place[1] if place else "")
    return {"name": functions[0]["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}


def _answer_text(body, prompt):
    words = prompt.lower().strip(" .!?")
    count = re.search(r"\bcount to (\d+)", words)
    if body["messages"][-1]["role"] == "tool":
        return "The tool says: " + _plain_text(body["messages"][-1])
    if "vector database" in words:
        return "A vector database stores embeddings and finds those closest in meaning to a query."
    if count:
        highest = min(int(count[1]), 10000)
        return "\n".join(str(number) for number in range(1, highest + 1))
    if words in ("hello", "hi"):
        return "Hello! How can I help you today?"
    if words == "say hello":
        return "Hello!"
    return f"You wrote: {prompt.strip()[:2000]}"


def _write_answer(body, prompt):
    """Return the arguments of answer(): a tool call, or a text in the requested format."""
    function = _choose_function(body, prompt)
    if function:
        name = f"call_{len(body['messages'])}"  # unique in its conversation
        return {"tool_calls": [{"id": name, "type": "function", "function": function}]}
    text = _answer_text(body, prompt)
    response_format = body.get("response_format") or {}
    if response_format.get("type") == "json_object":
        text = json.dumps({"answer": text}, ensure_ascii=False)
    if response_format.get("type") == "json_schema":
        schema = response_format["json_schema"].get("schema", {})
        text = json.dumps(_sample_value(schema, text), ensure_ascii=False)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if limit and _count_tokens(text) > limit:
        return {"text": text[: 4 * limit], "finish_reason": "length"}
    return {"text": text}


def _stream_chunks(completion, with_usage):
    """Split a completion into chunks, one per word; the last one has the `lowrouter` block."""
    head = {name: completion[name] for name in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk"
    if with_usage:
        head["usage"] = None
    choice = completion["choices"][0]
    message = choice["message"]
    deltas = [{"role": "assistant", "content": "" if message["content"] else None}]
    for call in message.get("tool_calls", ()):
        start = {"name": call["function"]["name"], "arguments": ""}
        deltas.append({"tool_calls": [{"index": 0, **call, "function": start}]})
        for part in re.findall(r"\s*\S+\s*", call["function"]["arguments"]):
            deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
    for word in re.findall(r"\s*\S+\s*", message["content"] or ""):
        deltas.append({"content": word})
    for each in deltas:
        yield {**head, "choices": [{"index": 0, "delta": each, "finish_reason": None}]}
    last = {**head, "lowrouter": completion["lowrouter"]}
    last["choices"] = [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]
    if with_usage:
        yield {**head, "choices": last["choices"]}
        last.update(choices=[], usage=completion["usage"])
    yield last  # without usage, every chunk has a choice: the documented loop reads choices[0]


# ---- the gateway, without sockets ---------------------------------------------------------------


class _Error(Exception):
    def __init__(self, status, code, message, param=None):
        self.status = f"{status} {http.HTTPStatus(status).phrase}"
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _parse_body(raw):
    """Return the body of a completion, after checking the fields that are not deep in it."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=int)  # int("NaN") is a ValueError
    except (ValueError, RecursionError):
        raise _Error(400, "invalid_json", "The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise _Error(400, "invalid_body", "The body must be a JSON object.")
    body.setdefault("model", "lowrouter/auto")
    types = {"messages": list, "model": str, "stream": bool, "route": dict, "tools": list}
    for name, kind in types.items():
        if not isinstance(body.get(name), (kind, type(None))):
            raise _Error(400, "invalid_type", f"{name} has the wrong type.", name)
    messages = body.get("messages") or [None]
    if not all(isinstance(each, dict) and each.get("role") for each in messages):
        raise _Error(400, "invalid_messages", "Every message needs a role.", "messages")
    return body


def _pick_offer(body, offers):
    """Return the best offer, and the routing trace, which says why it is the best."""
    aim = "price and carbon"
    if (body.get("route") or {}).get("prefer_low_carbon"):
        aim = "low carbon"
    if body["model"] == "lowrouter/auto-cheap":
        aim = "price"
    carbon_weight = {"price": 0.0, "price and carbon": 0.5, "low carbon": 0.8}[aim]

    def score(offer):
        carbon = 1.0 if offer.carbon is None else offer.carbon  # so that unknown never wins
        # A gram of CO2e counts as much as ten credits.
        return round((1 - carbon_weight) * offer.price + carbon_weight * 10 * carbon, 5)

    ranked = sorted(offers, key=score)
    trace = []
    for offer in ranked[:3]:
        reason = f"score {score(offer) / score(ranked[0]):.2f} times the best"
        if not trace:
            reason = f"picked for {aim}"
        trace.append(f"{offer.model['id']}, {offer.provider}, {offer.region}: {reason}")
    return ranked[0], trace


def _build_completion(body, offer, record):
    """Return the completion that the offer gives; its numbers go into the record."""
    prompt = ""
    read = 0
    for message in body["messages"]:
        read += _count_tokens(_plain_text(message))
        if message["role"] == "user":
            prompt = _plain_text(message)
    fields = _write_answer(body, prompt)
    text = fields.get("text") or fields["tool_calls"][0]["function"]["arguments"]
    written = _count_tokens(text)
    total = read + written
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": total}
    pricing = offer.model["pricing"]
    cost = read * pricing["prompt"] + written * pricing["completion"]
    record.update(usage, cost_credits=round(cost / 1000, 8), resolved_model=offer.model["id"])
    record.update(provider=offer.provider, region=offer.region)
    block = {name: record[name] for name in ("generation_id", "provider", "region")}
    model_eco = offer.model["eco"]
    if model_eco:
        energy = model_eco["energy_wh_per_1k_tokens"] * total / 1000
        eco = {"energy_wh": round(energy, 8), "carbon_g": round(offer.carbon * total / 1000, 10)}
        eco.update(carbon_per_1k_tokens_g=offer.carbon, accuracy=model_eco["accuracy"])
        eco["methodology_version"] = "v0.4-2026-01"
        block["eco"] = eco
        record["eco"] = eco
    fields.update(id="chatcmpl-" + record["generation_id"][4:], model=offer.model["id"])
    usage["cost"] = record["cost_credits"]
    return answer(**fields, usage=usage, lowrouter=block)


class _Gateway:
    """Answers requests, and keeps a record of each completion and the balance of the account."""

    def __init__(self, key):
        self.key = key
        self.lock = threading.Lock()
        self.models, self.offers = _build_catalogue()
        self.records = {}
        self.balance = 1000.0
        self.count = 0

    def look_up(self, method, path):
        """Return the answer to everything except a completion."""
        pages = {
            "/api/v1/models": {"object": "list", "data": self.models},
            "/api/v1/providers": {"object": "list", "data": _PROVIDERS},
            "/api/v1/credits": {"object": "credits", "balance": self.balance, "unit": "credits"},
        }
        page, _, name = path.partition("/generation/")
        record = self.records.get(urllib.parse.unquote(name))
        if method in ("GET", "HEAD") and path in pages:
            return pages[path]
        if method in ("GET", "HEAD") and page == "/api/v1" and record:
            return record
        if page == "/api/v1" and name:
            raise _Error(404, "generation_not_found", "There is no generation with this id.", "id")
        message = "There is nothing at this path. It has one /v1, as in GET /api/v1/models."
        raise _Error(404, "not_found", message)

    def new_record(self):
        with self.lock:
            self.count += 1
            name = f"gen_01J9STUB{self.count:08d}"
        record = {"generation_id": name, "created_at": _now(), "completed_at": None}
        record.update(key_id="key_" + self.key[-4:], requested_model=None, resolved_model=None)
        record.update(provider=None, region=None, prompt_tokens=0, completion_tokens=0)
        record.update(total_tokens=0, latency_ms=1, cost_credits=0, eco=None, status="ok")
        record["routing_trace"] = []
        return record

    def keep(self, record, status="ok"):
        record.update(status=status, completed_at=_now())
        self.records[record["generation_id"]] = record

    def complete(self, raw, headers, record):
        """Fill in the record; return the body of the request, and the completion."""
        body = _parse_body(raw)
        record["requested_model"] = body["model"]
        if self.balance <= 0:
            raise _Error(402, "insufficient_credits", "There are no credits left.")
        try:
            offers = self.find_offers(body, headers.get("X-LowRouter-Region"))
            offer, record["routing_trace"] = _pick_offer(body, offers)
            completion = _build_completion(body, offer, record)
        except (AttributeError, KeyError, TypeError) as error:  # from a field deep in the body
            raise _Error(400, "invalid_body", f"The body cannot be read: {error!r}") from None
        with self.lock:
            self.balance = round(self.balance - record["cost_credits"], 8)
        return body, completion

    def find_offers(self, body, header_region):
        """Return the offers that the request allows."""
        name = body["model"]
        offers = [offer for offer in self.offers if offer.model["id"] == name]
        if name in ("lowrouter/auto", "lowrouter/auto-cheap"):
            wanted = {"tool_use": body.get("tools")}
            wanted["structured_output"] = body.get("response_format")
            needed = {capability for capability, value in wanted.items() if value}
            offers = [offer for offer in self.offers if needed <= set(offer.model["capabilities"])]
        if not offers:
            raise _Error(404, "model_not_found", f'The model "{name}" does not exist.', "model")
        route = {"region": header_region, **(body.get("route") or {})}
        pins = []
        for field in ("region", "provider"):
            wanted = route.get(field)
            if wanted is not None:
                pins.append(f'{field} "{wanted}"')
                offers = [offer for offer in offers if getattr(offer, field) == wanted]
        if not offers:
            message = f'No provider serves "{name}" with {" and ".join(pins)}.'
            raise _Error(503, "service_unavailable", message)
        return offers


# ---- the server ---------------------------------------------------------------------------------

#: A request as it arrived; `connection` is the number of the TCP connection, from 1.
Received = collections.namedtuple("Received", "method path headers body json connection")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def handle_any(self):
        self.stub = self.server.stub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the body was not read, and is not the next request
        parsed = None
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(body.decode("utf-8"))
        self.stub.requests.append(
            Received(self.command, self.path, self.headers, body, parsed, self.client_address)
        )
        try:
            steps = self.stub.script.popleft()
        except IndexError:
            self.respond(body)
            return
        for step in steps:
            self.play(step)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any

    def play(self, step):
        hold = self.stub.hold
        if isinstance(step, bytes):
            self.wfile.write(step)
        elif isinstance(step, dict):
            self.wfile.write(reply(step))
        elif step == STALL:
            hold.wait()
        elif isinstance(step, Drip):
            sent = 0
            while sent != step.times and not hold.is_set():
                self.wfile.write(step.data)
                sent += 1
                hold.wait(step.every)
        elif isinstance(step, Wait):
            for _ in range(500):  # ten seconds, whatever a test does to the clock
                if step.event.wait(0.02) or hold.is_set():
                    break
        elif step in (CUT, RESET):
            if step == RESET:
                linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            self.rfile.close()  # an open file would keep the socket open
            self.connection.close()
        else:
            step(self.connection)

    def respond(self, raw):
        gateway = self.stub.gateway
        path = urllib.parse.urlsplit(self.path).path
        record = None
        try:
            if self.headers.get("Authorization") != "Bearer " + gateway.key:
                raise _Error(401, "invalid_api_key", "Invalid API key: is it complete?")
            if (self.command, path) == ("POST", "/api/v1/chat/completions"):
                record = gateway.new_record()
                body, completion = gateway.complete(raw, self.headers, record)
                if body.get("stream"):
                    self.send_stream(body, completion, record)
                else:
                    gateway.keep(record)
                    self.send(completion, record=record)
            else:
                self.send(gateway.look_up(self.command, path))
        except _Error as error:
            if record:
                status = "upstream_error" if error.status.startswith("5") else "client_error"
                gateway.keep(record, status)
            self.send(error.body, error.status, record)

    def gateway_headers(self, record):
        headers = {"X-Credit-Balance": self.stub.gateway.balance}
        if record:
            headers["X-LowRouter-Generation-ID"] = record["generation_id"]
            if record["provider"]:
                headers["X-LowRouter-Provider"] = record["provider"]
                headers["X-LowRouter-Region"] = record["region"]
        return headers

    def send(self, body, status="200 OK", record=None):
        response = reply(body, status, **self.gateway_headers(record))
        if self.command == "HEAD":
            response = response[: response.index(b"\r\n\r\n") + 4]
        self.wfile.write(response)

    def send_stream(self, body, completion, record):
        with_usage = (body.get("stream_options") or {}).get("include_usage")
        headers = self.gateway_headers(record).items()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        try:
            self.wfile.write(STREAM_HEAD[:-2] + lines.encode("ascii") + b"\r\n")
            for chunk in _stream_chunks(completion, with_usage):
                if "lowrouter" in chunk:
                    self.stub.gateway.keep(record)  # a client may ask for it after this chunk
                self.wfile.write(chunked(sse(chunk, done=False), end=False))
                self.stub.hold.wait(self.stub.pace)
            self.wfile.write(chunked(sse()))
        except OSError:  # the client hung up
            self.stub.gateway.keep(record, "client_error")
            raise


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = os.name == "posix"  # elsewhere it would share a port that is in use
    request_queue_size = 512  # for tests in which many clients connect at once

    def __init__(self, stub, port):
        self.stub = stub
        self.open = {}  # the socket of each thread
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request, client_address):
        self.stub.connections += 1
        arguments = (request, self.stub.connections)
        thread = threading.Thread(target=self.serve, args=arguments, daemon=True)
        self.open[thread] = request
        thread.start()

    def serve(self, request, number):
        try:
            # A client may vanish at any time, refuse our certificate or never send anything.
            with contextlib.suppress(OSError, ValueError):
                if self.stub.context:
                    options = {"server_side": True, "do_handshake_on_connect": False}
                    request = self.stub.context.wrap_socket(request, **options)
                    self.open[threading.current_thread()] = request  # for server_close()
                    request.do_handshake()
                    self.stub.handshakes += 1
                _Handler(request, number, self)  # the number takes the place of the address
        finally:
            self.shutdown_request(request)
            self.open.pop(threading.current_thread(), None)

    def server_close(self):
        super().server_close()
        for thread, request in list(self.open.items()):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads or writes
            thread.join(10)


class StubGateway:
    """A gateway on 127.0.0.1: `with StubGateway() as stub: Client(KEY, base_url=stub.url)`.

    `context` makes it an HTTPS server; `pace` is the pause after a chunk of a stream, in seconds.
    `requests` has what was received; `connections` and `handshakes` are counts; `env` is for
    os.environ.update() or the environment of a subprocess; setting `hold` ends all waits.
    """

    def __init__(
        self,
        key: str = KEY,
        context: ssl.SSLContext | None = None,
        pace: float = 0.0,
        port: int = 0,
        check_unused: bool = True,
    ) -> None:
        self.context = context
        self.pace = pace
        self.check_unused = check_unused
        self.gateway = _Gateway(key)
        self.requests = []
        self.connections = 0
        self.handshakes = 0
        self.hold = threading.Event()
        self.script = collections.deque()
        self.server = _Server(self, port)
        self.host, self.port = self.server.server_address
        self.url = f"http://{self.host}:{self.port}/api/v1"
        if context:
            self.url = f"https://localhost:{self.port}/api/v1"
        self.env = {"LOWROUTER_API_KEY": key, "LOWROUTER_BASE_URL": self.url}
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def play(self, *steps: object, times: int = 1) -> None:
        """Script the response to the next request; the steps are listed at the top of this file."""
        for step in steps:
            if isinstance(step, str) and step not in (CUT, RESET, STALL):
                raise TypeError(f"a step is not a string: {step!r}")
        self.script.extend([steps] * times)

    def close(self) -> None:
        """Stop at once: close every socket, and wait until every thread has ended."""
        self.hold.set()
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def __enter__(self) -> StubGateway:
        return self

    def __exit__(self, error_type: object, error: object, traceback: object) -> None:
        self.close()
        if self.script and self.check_unused and error_type is None:
            first = repr(self.script[0])[:200]
            raise AssertionError(f"unused scripted responses: {len(self.script)}; first: {first}")


class Clean(unittest.TestCase):
    """A test that has a stub, and an environment without keys, proxies and CA files."""

    VARIABLES = r"(?i)(lowrouter_.*|(https?|all|no)_proxy|ssl_cert_\w+|.*_ca_bundle|request_method)"

    def setUp(self):
        clean = {k: v for k, v in os.environ.items() if not re.fullmatch(self.VARIABLES, k)}
        environment = mock.patch.dict(os.environ, clean, clear=True)
        environment.start()
        self.addCleanup(environment.stop)
        self.stub = StubGateway(check_unused=False)
        self.addCleanup(self.stub.close)

    def client(self, **settings: object) -> lowrouter.Client:
        """Make a client of the stub, which is closed when the test ends."""
        client = lowrouter.Client(**{"api_key": KEY, "base_url": self.stub.url, **settings})
        self.addCleanup(client.close)
        return client


# ---- what the tests of several sections share ---------------------------------------------------

NEVER_SHOWN = "never-shown-0123456789"  # part of values that no message may repeat
ERRORS = [getattr(lowrouter, name) for name in lowrouter.__all__ if name.endswith("Error")]


def head(*lines):
    """The head of an HTTP/1.1 response: a status without its version, and then headers."""
    return ("HTTP/1.1 " + "\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def stream_head(**headers):
    """The head of a stream with more response headers."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return STREAM_HEAD[:-2] + "".join(lines).encode() + b"\r\n"


def event_stream(*events, done=True, end=True):
    """A complete response that streams these events; without `end`, its framing stays open."""
    return STREAM_HEAD + chunked(sse(*events, done=done), end=end)


def reset(sock):
    """Close with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_request(sock, rest=b""):
    """Return the head of the next request and its body, None at the end of the connection."""
    while b"\r\n\r\n" not in rest:
        data = sock.recv(1 << 16)
        if not data:
            return None
        rest += data
    first, _, body = rest.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", first)
    while length and len(body) < int(length[1]):
        body += sock.recv(1 << 16)
    return first, body


class Peer:
    """A TCP server on loopback that calls `serve(peer, sock)` for each connection."""

    def __init__(self, serve):
        self.serve = serve
        self.stop = threading.Event()
        self.heads = []
        self.sockets = []
        self.threads = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start(self.accept)

    def start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self):
        while True:
            sock = self.listener.accept()[0]
            self.sockets.append(sock)
            if self.stop.is_set():
                return
            self.start(self.run, sock)

    def run(self, sock):
        with contextlib.suppress(OSError):  # the other side may leave at any time
            self.serve(self, sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop.set()
        socket.create_connection(("127.0.0.1", self.port)).close()  # wakes accept()
        self.threads[0].join()
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for sock in [*self.sockets, self.listener]:
            sock.close()


def never_answers(peer, sock):
    peer.stop.wait()


def drips(start, data, every=0.02):
    """A `serve` that reads a request, sends `start`, and then `data` again and again."""

    def serve(peer, sock):
        read_request(sock)
        sock.sendall(start)
        while not peer.stop.wait(every):
            sock.sendall(data)

    return serve


def echo(peer, sock):
    """Answer each question with itself, and "fail..." with a 500; note (connection, question)."""
    number = len(peer.sockets)
    while True:
        request = read_request(sock)
        if request is None:
            return
        question = json.loads(request[1])["messages"][-1]["content"]
        peer.heads.append((number, question))
        status = "500 Oops" if question.startswith("fail") else "200 OK"
        sock.sendall(reply(answer(question), status))


def tunnels(port, response=b"HTTP/1.1 200 Connection established\r\n\r\n"):
    """A `serve` that is a CONNECT proxy to `port` on loopback, whatever host is requested.

    `heads` holds all that the proxy could read. Without a port it responds and hangs up.
    """

    def serve(peer, sock):
        first, rest = read_request(sock)
        peer.heads.append(first)
        sock.sendall(response)
        if not port:
            return
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            upstream.sendall(rest)
            other = {sock: upstream, upstream: sock}
            while True:
                for ready in select.select([sock, upstream], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if ready is sock:
                        peer.heads.append(data)
                    other[ready].sendall(data)

    return serve


def only_loopback(*names):
    """Patch the name resolver: `names` are loopback, and no other name is known."""
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        if host in names:
            host = "127.0.0.1"
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *args, **kwargs)

    return mock.patch("socket.getaddrinfo", resolve)


def count_descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def run_script(test, script, *args):
    """Start a Python program that is the client, so that the stub stays in this process."""
    code = "import os, sys\nsys.path.insert(0, sys.argv[1])\nimport lowrouter\n"
    command = [sys.executable, "-W", "error", "-c", code + textwrap.dedent(script)]
    folder = os.path.dirname(os.path.abspath(lowrouter.__file__))
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([*command, folder, *args], universal_newlines=True, **pipes)
    test.addCleanup(process.communicate)
    test.addCleanup(process.kill)
    return process


def all_that_shows(error):
    """What a log, a pickle, or a tool that walks through an error and its causes could show."""
    texts = []
    todo = [error]
    seen = []
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(error, protocol)
        copied = pickle.loads(data)
        texts.append(repr((data, str(copied), vars(copied))))
    while todo:
        each = todo.pop()
        if each is None or each in seen:
            continue
        seen.append(each)
        todo += [each.__cause__, each.__context__]
        trace = traceback.format_exception(type(each), each, each.__traceback__)
        texts += [str(each), repr(each), repr(each.args), repr(vars(each)), "".join(trace)]
        texts += [repr(getattr(each, name, None)) for name in ("doc", "object", "line", "partial")]
        for frame, _ in traceback.walk_tb(each.__traceback__):  # as error reporters show them
            if frame.f_code.co_filename == lowrouter.__file__:
                texts.append(repr(frame.f_locals))
        headers = getattr(each, "headers", None) or {}
        texts.append(repr(headers.items()))
    return "\n".join(texts)


class Case(Clean):
    """A test with a stub. Waits between retries take no time: their seconds are in `waits`."""

    #: A part of the key that is too long to be shown: messages may be cut in the middle of it.
    KEY_PART = re.compile("|".join(re.escape(KEY[i : i + 16]) for i in range(len(KEY) - 15)))

    def setUp(self):
        super().setUp()
        self.waits = []
        ignored = []  # what a destructor raised, such as a ResourceWarning, which is only printed
        hook = mock.patch("sys.unraisablehook", lambda what: ignored.append(repr(what)))
        self.addCleanup(lambda: self.assertEqual(ignored, []))
        for patch in (mock.patch("time.sleep", self.waits.append), hook):
            patch.start()
            self.addCleanup(patch.stop)

    def chat(self, *steps, **settings):
        """What chat() returns when the stub plays these steps."""
        self.stub.play(*steps)
        return self.client(**settings).chat("Hi")

    def stream(self, *blocks, end=True, **settings):
        """A stream of these blocks, each in a chunk of its own; without `end` it is then cut."""
        cut = [] if end else [CUT]
        self.stub.play(STREAM_HEAD + chunked(*blocks, end=end), *cut)
        return self.client(**settings).stream("Hi")

    def error(self, kind, call, *args, **options):
        """The error that a call raises. It must be one printable line, and it must pickle."""
        with self.assertRaises(kind) as caught:
            call(*args, **options)
        error = caught.exception
        self.assertTrue(str(error).isprintable(), error)
        copied = pickle.loads(pickle.dumps(error))
        self.assertEqual((type(copied), copied.args), (type(error), error.args))
        return error

    @contextlib.contextmanager
    def takes(self, promised):
        """Not much less than `promised` seconds, and at most a second more on a busy machine."""
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self.assertLess(took, promised + 1)
        self.assertGreater(took, promised * 0.8)

    def assert_key_is_hidden(self, text):
        found = self.KEY_PART.search(text)
        if found:  # assertNotRegex would print all of the text
            self.fail("key in: ..." + text[max(0, found.start() - 300) : found.end() + 40])


OPENSSL_CONFIGURATION = """
[req]
distinguished_name = name
[name]
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
authorityKeyIdentifier = keyid
subjectAltName = DNS:localhost, DNS:gateway.test, IP:127.0.0.1
[other]
authorityKeyIdentifier = keyid
subjectAltName = DNS:other.test
"""


@unittest.skipUnless(shutil.which("openssl"), "no openssl command, which makes the certificates")
class WithCertificates(Case):
    """Tests with TLS. The certificates of a private CA are made once, for all classes."""

    folder = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if WithCertificates.folder is None:
            WithCertificates.folder = tempfile.mkdtemp()
            atexit.register(shutil.rmtree, cls.folder)
            cls.make_certificates()

    @classmethod
    def make_certificates(cls):
        for name, text in (("openssl.cnf", OPENSSL_CONFIGURATION), ("garbage.pem", "?")):
            pathlib.Path(cls.path(name)).write_text(text, encoding="ascii")
        new = "req -config openssl.cnf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        for name in ("ca", "stranger"):
            root = f"-subj /CN={name} -extensions root -days 2"
            cls.openssl(f"{new} -x509 -keyout {name}.key -out {name}.pem {root}")
        own = "-subj /CN=localhost -days 2 -addext subjectAltName=DNS:localhost"
        cls.openssl(f"{new} -x509 -keyout selfsigned.key -out selfsigned.pem {own}")
        sign = "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -sha256"
        sign += " -extfile openssl.cnf"
        for name, days in (("good", 2), ("expired", -1), ("wronghost", 2)):
            section = "other" if name == "wronghost" else "leaf"
            cls.openssl(f"{new} -keyout {name}.key -out request.pem -subj /CN={name}")
            cls.openssl(f"{sign} -out {name}.pem -days {days} -extensions {section}")
        os.mkdir(cls.path("hashed"))
        digest = cls.openssl("x509 -hash -noout -in ca.pem").strip()
        shutil.copy(cls.path("ca.pem"), cls.path(os.path.join("hashed", digest + ".0")))

    @classmethod
    def path(cls, name):
        return os.path.join(cls.folder, name)

    @classmethod
    def openssl(cls, command):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        words = ["openssl", *command.split()]
        done = subprocess.run(words, cwd=cls.folder, universal_newlines=True, **pipes)
        if done.returncode:
            raise unittest.SkipTest("openssl cannot do this: " + done.stderr.strip()[-200:])
        return done.stdout

    def gateway(self, certificate="good"):
        """A stub that speaks TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path(certificate + ".pem"), self.path(certificate + ".key"))
        stub = StubGateway(context=context, check_unused=False)
        self.addCleanup(stub.close)
        return stub


# ---- promises: what a reviewer of lowrouter.py can rely on --------------------------------------

BANNER = "\n# ---- command line"  # the library ends here
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)

#: Runs in a child process, and prints what an import opens and which modules it adds.
IMPORT_CHECK = """
import os, sys, urllib.request, json  # what these open and read is not ours to answer for

def watch(event, args):
    is_code = str(args[0]).endswith((".py", ".pyc", ".so", ".zip")) if args else False
    effects = ("open", "socket.", "subprocess.", "os.", "tempfile.", "shutil.")
    if event.startswith(effects) and not is_code and event != "os.listdir":
        opened.append((event, *args))

opened = []
before = set(sys.modules)
os.environ = None  # so that reading a variable fails
sys.addaudithook(watch)
import lowrouter
print(json.dumps([opened, sorted(set(sys.modules) - before)]))
"""


def count_tokens(source):
    """Count the tokens of each line. Comments, docstrings and layout are free."""
    counts = collections.Counter()
    fstrings = {"FSTRING_START": 1, "FSTRING_END": -1}  # of several tokens from Python 3.12 on
    depth = 0
    is_docstring = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        depth += fstrings.get(name, 0)
        if name in ("NEWLINE", "INDENT", "DEDENT"):
            is_docstring = True
        elif name not in ("COMMENT", "NL", "ENDMARKER"):
            is_docstring = is_docstring and name == "STRING"
            counts[token.start[0]] += not depth and not is_docstring
    return +counts  # without the lines that have none


def names_used_too_early(source):
    """Return (user, used) for each module-level name that is used above its definition."""
    lines = {}
    for node in reversed(ast.parse(source).body):  # the first definition of a name counts
        if isinstance(node, DEFINITIONS):
            lines[node.name] = node.lineno
        else:
            names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            lines.update((n.id, node.lineno) for n in names if isinstance(n.ctx, ast.Store))
    pairs = []
    tables = symtable.symtable(source, "lowrouter.py", "exec").get_children()
    for table in tables:
        tables += table.get_children()  # methods, and functions within functions
        names = [each.get_name() for each in table.get_symbols() if each.is_global()]
        pairs += [(table.get_name(), n) for n in names if lines.get(n, 0) > table.get_lineno()]
    return sorted(pairs)


class TestPromises(Clean):
    LIBRARY_TOKENS = 12_200
    COMMAND_LINE_TOKENS = 4_600
    TOKENS_PER_LINE = 9.0
    FUNCTION_LINES = 40
    NESTING = 3

    def setUp(self):
        super().setUp()
        self.path = os.path.abspath(lowrouter.__file__)
        self.source = pathlib.Path(self.path).read_text(encoding="utf-8")
        self.library = self.source.partition(BANNER)[0]
        nodes = ast.walk(ast.parse(self.source))
        self.functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def run_python(self, code, *arguments, path=None):
        """Return what a new Python prints that imports from `path` and has few variables."""
        keep = ("SYSTEMROOT", "LD_LIBRARY_PATH", "COVERAGE_PROCESS_START")
        environment = {name: os.environ[name] for name in keep if name in os.environ}
        environment["PYTHONPATH"] = path or os.path.dirname(self.path)
        environment.update(self.stub.env, PYTHONDONTWRITEBYTECODE="1", HOME="/nonexistent")
        command = [sys.executable, "-W", "error", *arguments, "-c", textwrap.dedent(code)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "universal_newlines": True}
        done = subprocess.run(command, env=environment, cwd=self.folder, timeout=60, **pipes)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout.strip()

    def test_it_can_be_audited_in_one_sitting(self):
        counts = count_tokens(self.source)
        end = self.library.count("\n") + 1
        library = sum(count for line, count in counts.items() if line <= end)
        total = sum(counts.values())
        self.assertLessEqual(library, self.LIBRARY_TOKENS)
        self.assertLessEqual(total - library, self.COMMAND_LINE_TOKENS)
        self.assertLessEqual(total / len(counts), self.TOKENS_PER_LINE)
        for function in self.functions:
            lines = [n for n in counts if function.lineno <= n <= function.end_lineno]
            self.assertLessEqual(len(lines), self.FUNCTION_LINES, function.name)
            blocks = [node for node in ast.walk(function) if isinstance(node, BLOCKS)]
            deepest = max((block.col_offset for block in blocks), default=0)
            self.assertLessEqual(deepest - function.col_offset, 4 * self.NESTING, function.name)

    def test_no_name_is_used_above_its_definition(self):
        self.assertEqual(names_used_too_early(self.source), [])
        sample = "def a(c):\n    c()\n    b()\ndef b(): ...\ndef c(): ...\n"
        sample += "class D:\n    def e(self): return F, G\nclass F: ...\nG = 1\n"
        self.assertEqual(names_used_too_early(sample), [("a", "b"), ("e", "F"), ("e", "G")])

    @unittest.skipIf(sys.version_info < (3, 10), "this Python has no list of its own modules")
    def test_it_imports_the_standard_library_only(self):
        names = re.findall(r"(?m)^ *(?:from|import) (\w+)", self.source)
        self.assertIn("json", names)
        self.assertEqual(set(names) - set(sys.stdlib_module_names), set())

    def test_importing_opens_nothing_reads_no_variable_and_adds_few_modules(self):
        opened, modules = json.loads(self.run_python(IMPORT_CHECK))
        self.assertEqual(opened, [])
        heavy = "argparse logging asyncio dataclasses typing inspect threading concurrent.futures "
        heavy += "subprocess http.server unittest ipaddress shlex difflib enum"
        self.assertEqual(set(modules) & set(heavy.split()), set())
        self.assertLess(len(modules), 12, modules)

    def test_what_has_no_underscore_is_public_documented_and_annotated(self):
        values = vars(lowrouter).items()
        names = [n for n, value in values if not inspect.ismodule(value) and not n.isupper()]
        public = {name for name in names if not name.startswith("_")} - {"annotations"}
        self.assertEqual(public, {*lowrouter.__all__, "main"})
        expected = "chat stream models generation request curl Client Completion Chunk Stream"
        self.assertLessEqual(set(expected.split()), public)
        for thing in (lowrouter, *map(vars(lowrouter).get, public)):
            self.assertTrue(thing.__doc__, thing)
            members = inspect.getmembers(thing) if inspect.isclass(thing) else [("", thing)]
            members = [value for name, value in members if not name.startswith("_")]
            functions = [getattr(value, "fget", value) for value in members]
            for function in filter(inspect.isfunction, functions):
                if function.__module__ == lowrouter.__name__ and function.__name__ != "request":
                    self.assertTrue(inspect.getdoc(function), function)
                    self.assertNotIn(function.__annotations__["return"], ("Any", "object"))

    def test_it_runs_from_a_zip_without_a_home_as_byte_code_optimised_vendored_and_cut(self):
        source = os.path.dirname(self.path)
        archive = os.path.join(self.folder, "code.zip")
        with zipfile.ZipFile(archive, "w") as file:
            file.write(self.path, "lowrouter.py")
        compiled = os.path.join(self.folder, "compiled")
        py_compile.compile(self.path, os.path.join(compiled, "lowrouter.pyc"), doraise=True)
        os.makedirs(os.path.join(self.folder, "pkg", "_vendor"))
        shutil.copy(self.path, os.path.join(self.folder, "pkg", "_vendor"))
        self.assertTrue(BANNER in self.source)
        cut = os.path.join(self.folder, "cut")
        os.mkdir(cut)  # for a copy without the command line
        pathlib.Path(cut, "lowrouter.py").write_text(self.library, encoding="utf-8")
        code = """
            import pickle, {0} as module
            from {0} import *
            try:
                Client("other-key").chat(chat("Say hello").text + stream("Hi").result().text)
            except LowRouterError as error:
                copied = pickle.loads(pickle.dumps(error))
                print(module.__file__, type(copied).__module__, type(copied).__name__)
        """
        for path, module, *arguments in (
            *((folder, "lowrouter") for folder in (archive, compiled, cut)),
            (source, "lowrouter", "-OO"),
            (self.folder, "pkg._vendor.lowrouter"),
        ):
            with self.subTest(path, module=module, arguments=arguments):
                found = self.run_python(code.format(module), *arguments, path=path).split()
                self.assertTrue(found[0].startswith(path), found)
                self.assertEqual(found[1:], [module, "AuthenticationError"])

    def test_a_copy_carries_its_licence_and_its_version(self):
        for line in ("SPDX-License-Identifier: MIT", r"Copyright \(c\) \d{4} \w", "Permission is "):
            self.assertTrue(re.search(rf"(?m)^# {line}", self.source), line)
        self.assertRegex(lowrouter.__version__, r"\A\d+\.\d+\.\d+\Z")
        self.assertEqual(self.source.count(lowrouter.__version__), 1)
        project = pathlib.Path(self.path).with_name("pyproject.toml")
        if project.exists():
            self.assertNotIn(lowrouter.__version__, project.read_text(encoding="utf-8"))

    def test_the_library_never_prints_and_swallows_no_bugs(self):
        tokens = tokenize.generate_tokens(io.StringIO(self.library).readline)
        words = [each.string for each in tokens if each.type in (tokenize.NAME, tokenize.OP)]
        code = " ".join(words)  # without comments and docstrings
        self.assertNotRegex(code, r"\b(print|input) \(|\bexcept (Exception\b|:)")
        self.assertNotIn(" assert ", code)  # which does nothing under -O
        self.assertNotRegex(self.source, r"\b(TODO|FIXME|XXX)\b")


# ---- answers ------------------------------------------------------------------------------------


class TestAnswers(Case):
    def test_odd_data_never_raises_and_what_is_missing_is_none(self):
        parts = [{"type": "text", "text": "a"}, {"type": "image"}, "x", {"text": 5}, {"text": "b"}]
        first = {"index": 0, "message": {"content": "a"}}
        second = {"index": 1, "message": {"content": "b"}}
        table = [
            *(({"usage": value, "lowrouter": value}, "") for value in (None, 5, [])),
            ({}, ""),
            *(({"choices": value}, "") for value in ([], None, {"0": 1}, [None], ["text"])),
            *(({"choices": [value]}, "") for value in ({"index": 0}, {"message": None}, second)),
            *(({"choices": [{"message": {"content": value}}]}, "") for value in (None, 5, [])),
            ({"choices": [{"message": {"content": parts}}]}, "ab"),
            ({"choices": [{"message": {"content": "a"}}]}, "a"),
            ({"choices": [second, first]}, "a"),
        ]
        absent = "finish_reason usage model generation_id provider region eco".split()
        for data, text in table:
            for kind in (lowrouter.Completion, lowrouter.Chunk):
                with self.subTest(kind.__name__, data=data):
                    result = kind(data)
                    found = (result.text, result.reasoning, result.tool_calls)
                    self.assertEqual(found, (text, "", []))
                    self.assertEqual({getattr(result, name) for name in absent}, {None})

    def test_properties_show_parts_of_the_json_that_arrived(self):
        calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        data = answer("Hello", something_new={"kept": True})
        data["lowrouter"]["eco"] = {"energy_wh": 0.1, "carbon_g": 0.0, "accuracy": "gross"}
        message = data["choices"][0]["message"]
        message.update({"tool_calls": calls, "reasoning": "Let me see"})
        result = self.chat(data)
        self.assertEqual(result, data)
        expected = {"message": message, "text": "Hello", "reasoning": "Let me see"}
        expected.update(tool_calls=calls, finish_reason="stop", **data["lowrouter"])
        expected.update(model=data["model"], usage=data["usage"])
        self.assertEqual({name: getattr(result, name) for name in expected}, expected)
        with self.assertRaises(AttributeError):
            result.text = "other"
        other = {"choices": [{"delta": {"content": "a", "reasoning_content": "b"}}]}
        self.assertEqual(lowrouter.Chunk(other).reasoning, "b")

    def test_headers_name_the_route_where_the_block_does_not(self):
        names = ("generation_id", "provider", "region")
        headers = {f"x_lowrouter_{name}": "my " + name for name in names}
        response = reply(answer("Hello", lowrouter=None), x_credit_balance="12.5", **headers)
        result = self.chat(response)
        self.assertEqual([getattr(result, name) for name in names], ["my " + n for n in names])
        self.assertEqual(result.headers["x-credit-BALANCE"], "12.5")
        result = self.chat(reply(answer(region="us-east"), **headers))
        self.assertEqual((result.region, result.generation_id), ("us-east", "gen_1"))

    def test_an_answer_is_a_dict_that_can_be_pickled_and_copied(self):
        data = answer("Hello", lowrouter=None)
        result = self.chat(reply(data, x_lowrouter_region="eu-west"))
        self.assertEqual(json.loads(json.dumps(result)), data)
        self.stub.play(stream_head(x_lowrouter_region="eu-west") + chunked(sse(delta("Hello"))))
        for each in (result, next(self.client().stream("Hi"))):
            protocols = range(pickle.HIGHEST_PROTOCOL + 1)
            copies = [pickle.loads(pickle.dumps(each, protocol)) for protocol in protocols]
            for copied in (copy.copy(each), copy.deepcopy(each), *copies):
                self.assertEqual((copied, type(copied)), (each, type(each)))
                self.assertEqual((copied.text, copied.region), ("Hello", "eu-west"))


# ---- errors -------------------------------------------------------------------------------------

STATUS_ERRORS = {
    401: lowrouter.AuthenticationError,
    402: lowrouter.InsufficientCreditsError,
    403: lowrouter.PermissionDeniedError,
    404: lowrouter.NotFoundError,
    429: lowrouter.RateLimitError,
    503: lowrouter.NoProviderError,
}
# Python 3.14 can parse all of them, and no version can pickle the deepest.
DEEP = ["[" * depth + "]" * depth for depth in (50, 300, 500, 700, 900, 60_000)]
DEEP_BODIES = ("%s", '{"error": {"message": %s}}', '{"error": {"message": "text", "code": %s}}')
#: Bodies of errors: who sends one like it, the body, and the message and the code that users see.
ERROR_BODIES = [
    ("OpenAI", {"error": {"message": "text", "code": "c", "type": "t"}}, "text", "c"),
    ("OpenAI", {"error": {"message": "text", "code": None, "type": "t"}}, "text", "t"),
    ("OpenRouter", {"error": {"message": "text", "code": 418}}, "text", 418),
    ("Ollama", {"error": "text"}, "text", None),
    ("Mistral", {"object": "error", "message": "text", "code": "c"}, "text", "c"),
    ("AWS", {"Message": "text"}, "text", None),
    ("problem document", {"title": "a", "detail": "text", "status": 418}, "text", None),
    ("problem document", {"type": "about:blank", "title": "text"}, "text", mock.ANY),
    ("FastAPI", {"detail": [{"loc": ["body"], "msg": "text"}]}, "text", None),
    ("Google", [{"error": {"code": 400, "message": "text", "status": "s"}}], "text", 400),
    ("Cloudflare", {"success": False, "errors": [{"code": 7, "message": "text"}]}, "text", 7),
    ("JSON:API", {"errors": ["text"]}, "text", None),
    ("OAuth", {"error": "invalid_token", "error_description": "text"}, "text", None),
    ("Spring", {"error": "Bad Request", "message": "text", "status": 400}, "text", None),
    ("JSON in a string", {"error": {"message": '{"error": {"message": "text"}}'}}, "text", None),
    ("JSON in a string", '"{\\"error\\": \\"text\\"}"', "text", None),
    ("a byte order mark", "\ufeff" + '{"error": "text"}', "text", None),
    ("captive portal", "\r\n<html>\r\n<head><title>\n Sign in </title>", "Sign in", None),
    ("page without a title", "<!doctype html><body>Bad\ngateway</body>", "", None),
    ("page that is slow to search", "<html><title>" + " " * 60_000, "", None),
    ("Envoy", "upstream connect error. reset: text", "upstream connect error. reset: text", None),
    ("quoted text", '"text"', "text", None),
    ("control characters", {"error": {"message": "text\r\n\tc \x1b[31m"}}, mock.ANY, None),
    ("no known field", {"reason": {"a": "text"}}, mock.ANY, None),
    *(("odd JSON", body, mock.ANY, None) for body in ("", "null", "5", "[1]", "{}")),
    *(("odd JSON", {"error": each}, mock.ANY, None) for each in (None, {}, ["text"])),
    ("odd JSON", {"error": {"message": {"deep": "text"}}}, mock.ANY, None),
    ("odd JSON", '{"choices": null}', mock.ANY, None),
    *(("deep", body % x, mock.ANY, mock.ANY) for body in DEEP_BODIES for x in DEEP),
    ("garbage", '{"choices": [], "a": "\xff"}'.encode("latin-1"), mock.ANY, None),
    ("a stream", "data: text", "data: text", None),
    *(("garbage", body, mock.ANY, None) for body in ("[" * 50_000, b"\xff\xfe\x00", "9" * 5000)),
]


class TestErrors(Case):
    def test_the_class_says_whose_fault_it_is(self):
        for error, base in (
            *((each, lowrouter.LowRouterError) for each in ERRORS),
            *((each, lowrouter.APIStatusError) for each in STATUS_ERRORS.values()),
            (lowrouter.ConfigError, ValueError),
            (lowrouter.APIConnectionError, ConnectionError),
            (lowrouter.APITimeoutError, TimeoutError),
            (lowrouter.APITimeoutError, lowrouter.APIConnectionError),
            (lowrouter.StreamError, lowrouter.BadResponseError),
        ):
            self.assertTrue(issubclass(error, base), error)

    def test_every_error_pickles_with_everything_that_it_carries(self):
        partial = self.chat(reply(answer("Hello"), x_request_id="7"))
        details = {"completion": partial, "code": "c", "status": 418, "phase": "idle"}
        for kind in ERRORS:
            self.assertIsNone(kind("it failed").completion)
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with self.subTest(kind.__name__, protocol=protocol):
                    original = kind("it failed", headers=partial.headers, **details)
                    error = pickle.loads(pickle.dumps(original, protocol))
                    self.assertEqual((type(error), str(error)), (kind, "it failed"))
                    self.assertEqual({name: getattr(error, name) for name in details}, details)
                    self.assertEqual(error.completion.region, "eu-west")
                    self.assertEqual(error.headers["x-request-id"], "7")

    def test_each_status_has_a_class_and_the_reason_of_the_gateway(self):
        body = {"error": {"message": "no, because", "code": "because"}}
        headers = {"x_request_id": "req_1", "x_lowrouter_generation_id": "gen_1"}
        expected = {"code": "because", "message": "no, because", "body": body, "retry_after": 7}
        expected.update(request_id="req_1", generation_id="gen_1", completion=None)
        client = self.client(max_retries=0)
        others = (400, 408, 409, 413, 422, 451, 500, 501, 502, 504, 505, 520, 524, 529, 599)
        for status in (*STATUS_ERRORS, *others):
            with self.subTest(status):
                self.stub.play(reply(body, f"{status} No", retry_after="7", **headers))
                error = self.error(lowrouter.LowRouterError, client.chat, "Hi")
                kind = STATUS_ERRORS.get(status, lowrouter.APIStatusError)
                self.assertIs(type(error), kind)
                self.assertEqual({name: getattr(error, name) for name in expected}, expected)
                self.assertEqual((error.status, error.headers["x-request-id"]), (status, "req_1"))
                for part in (f"127.0.0.1:{self.stub.port}", str(status), "no, because"):
                    self.assertIn(part, str(error))
                self.assertEqual("billed" in str(error), status in (504, 520, 524))
                if status not in STATUS_ERRORS:
                    self.assertEqual("later" in str(error), error.retryable)

    def test_the_reason_is_found_in_error_bodies_of_any_shape(self):
        client = self.client()
        for sender, body, message, code in ERROR_BODIES:
            with self.subTest(sender, body=repr(body)[:60]):
                self.stub.play(reply(body, "418 Teapot"))
                error = self.error(lowrouter.APIStatusError, client.chat, "Hi")
                found = (error.status, error.message, error.code)
                self.assertEqual(found, (418, message or "Teapot", code))
                self.assertLess(len(str(error)), 700)
                self.assertIn("text" if "text" in str(body) else "", str(error))
                is_page = isinstance(body, str) and body.lstrip().startswith("<")
                self.assertEqual("proxy" in str(error), is_page)
                if message is not mock.ANY:
                    self.assertIn(error.message, str(error))
                self.stub.play(reply(body))  # the same with status 200
                error = self.error(lowrouter.BadResponseError, client.chat, "Hi")
                self.assertIn("127.0.0.1", str(error))
                self.assertEqual("proxy" in str(error), is_page)
                if message is not mock.ANY:
                    self.assertEqual((error.message, error.code), (message, code))
                    self.assertIn(message, str(error))

    def test_a_404_has_different_advice_for_a_model_a_generation_and_a_path(self):
        client = self.client()
        wrong = self.client(base_url=self.stub.url + "/v1")
        for call, options, advice in (
            (client.chat, {"messages": "Hi", "model": "no/model"}, "models()"),
            (client.generation, {"generation_id": "gen_none"}, " id"),
            (wrong.chat, {"messages": "Hi"}, "/v1 "),
        ):
            with self.subTest(advice):
                error = self.error(lowrouter.NotFoundError, call, **options)
                self.assertIn(advice, str(error).replace(error.message, ""))

    def test_a_dropped_error_leaves_no_objects_behind(self):
        def count():
            return sum(type(each).__module__ == "lowrouter" for each in gc.get_objects())

        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        start = STREAM_HEAD + chunked(sse(delta("a"), done=False), end=False)
        refusal = reply({"error": "no"}, "400 Bad")
        table = [("stream", start), ("stream", start + chunked(sse({"error": "no"})))]
        table += [("chat", each) for each in (reply("not JSON"), reply(answer("Hello")), CUT)]
        table += [("chat", refusal), ("stream", refusal)]
        for name, response in table:
            with self.subTest(name, response=response):
                self.stub.play(response, CUT)
                before = count()
                client = lowrouter.Client(KEY, base_url=self.stub.url, route={"region": "x"})
                with contextlib.suppress(lowrouter.LowRouterError), client:
                    list(getattr(client, name)("Hi"))  # reads a stream to its end
                del client
                self.assertEqual(count(), before)

    def test_an_error_after_the_response_headers_has_their_generation_id(self):
        client = self.client(max_retries=0)
        headers = {"X_LowRouter_Generation_ID": "gen_7"}
        bodies = ("<html>", {"error": "no"}, answer("a", lowrouter=None, finish_reason="error"))
        steps = [[reply(body, **headers)] for body in bodies]
        steps += [[reply("", "500 Oh", **headers)], [steps[-1][0][:-5], CUT]]
        for step in steps:
            for call in (client.chat, client.stream):
                with self.subTest(step, call=call.__name__):
                    self.stub.play(*step)
                    error = self.error(lowrouter.LowRouterError, call, "Hi")
                    self.assertEqual(error.generation_id, "gen_7")
        self.stub.play(stream_head(**headers), STALL)
        stream = client.stream("Hi")
        stream.close()
        self.assertEqual(self.error(lowrouter.StreamError, stream.result).generation_id, "gen_7")


# ---- request: what is sent ----------------------------------------------------------------------


class TestRequest(Case):
    def sent(self, *args, settings=None, **options):
        """Return the JSON body that chat() sends."""
        self.stub.play(answer("Hello"))
        self.client(**(settings or {})).chat(*args, **options)
        return self.stub.requests[-1].json

    def assert_refused(self, words, *args, **options):
        """Every chat call raises a ConfigError with these words, and nothing is sent."""
        client = self.client()
        for call in (client.chat, client.stream, client.curl):
            with self.subTest(words, call=call.__name__):
                error = self.error(lowrouter.ConfigError, call, *args, **options)
                self.assertIn(words, str(error))
        self.assertEqual(self.stub.connections, 0)

    def test_a_prompt_is_sent_as_a_user_message_to_the_default_model(self):
        prompt = "Hi \u2028 \U0001f600"
        body = {"model": "lowrouter/auto", "messages": [{"role": "user", "content": prompt}]}
        self.assertEqual(self.sent(prompt), body)
        request = self.stub.requests[-1]
        self.assertEqual((request.method, request.path), ("POST", "/api/v1/chat/completions"))
        for name, value in {
            "Authorization": "Bearer " + KEY,
            "Content-Type": "application/json",
            "Content-Length": str(len(request.body)),
            "Accept-Encoding": "identity",
            "Host": f"127.0.0.1:{self.stub.port}",
        }.items():
            self.assertEqual(request.headers.get_all(name), [value])
        self.assertIn(lowrouter.__version__, request.headers["User-Agent"])

    def test_messages_model_and_route_are_sent_exactly_as_they_are(self):
        messages = [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": []},
        ]
        before = copy.deepcopy(messages)
        mine = {"model": "a/b", "route": {"provider": "openai", "fallback": False}}
        full = {"region": "eu-west", "provider": None, "prefer_low_carbon": True, "new": [1]}
        none = {"model": None, "route": None}
        for options in ({}, none, {"model": "c/d", "route": full}, {"route": {}}):
            given = {name: value for name, value in options.items() if value is not None}
            sent = {"messages": before, **mine, **given}
            self.assertEqual(self.sent(messages, settings=mine, **options), sent)
        self.assertEqual(messages, before)

    def test_other_keywords_are_fields_of_the_body_and_none_is_left_out(self):
        names = ("self", "body", "method", "path", "options", "call", "name", "key", "parse")
        fields = {"temperature": 0, "stop": [], "logprobs": False, "stream": False}
        fields.update(dict.fromkeys(names, "x"), brand_new={"a": [1, None]})
        self.client().chat("Hi", top_p=None, timeout=5, deadline=5, **fields)
        body = self.stub.requests[-1].json
        self.assertEqual(set(body), {"model", "messages", *fields})
        self.assertEqual({name: body[name] for name in fields}, fields)

    def test_a_stream_requests_usage_unless_the_caller_decides_otherwise(self):
        client = self.client()
        expected = {"stream": True, "stream_options": {"include_usage": True}, "self": 1}
        for options in ({}, *({"stream_options": x} for x in ({"include_usage": False}, {}, None))):
            with self.subTest(options):
                client.stream("Hi", **options, self=1).close()
                body = self.stub.requests[-1].json
                found = {name: body.get(name) for name in expected}
                self.assertEqual(found, {**expected, **options})

    def test_a_misspelled_field_of_a_route_is_refused_with_the_right_name(self):
        for meant, *names in (
            ("region", "Region", "regoin", " region"),
            ("provider", "PROVIDER"),
            ("fallback", "fall_back", "Fallback"),
            ("prefer_low_carbon", "prefer_lowcarbon"),
        ):
            for name in names:
                self.assert_refused(repr(meant), "Hi", route={name: "eu-west"})
                error = self.error(lowrouter.ConfigError, self.client, route={name: "eu-west"})
                self.assertIn(repr(meant), str(error))

    def test_what_cannot_be_sent_is_refused(self):
        message = {"role": "user", "content": "Hi"}
        for bad in (None, 5, b"Hi", message, (message,), iter([]), ["Hi"], [message, None]):
            self.assert_refused("messages", bad)
        for bad in ("eu-west", ["eu-west"], 5):
            self.assert_refused("route", "Hi", route=bad)
            self.error(lowrouter.ConfigError, self.client, route=bad)
        circular = {}
        circular["self"] = circular
        deep = []
        for _ in range(100_000):
            deep = [deep]
        numbers = [float("nan"), float("-inf")]
        for bad in (*numbers, {1}, b"a", object(), {(1, 2): 3}, circular, deep, "\ud800"):
            self.assert_refused("JSON", "Hi", x=bad)
            self.error(lowrouter.ConfigError, self.client().request, "POST", "/x", [bad])
        self.assert_refused("JSON", "\ud800")

    def test_options_of_the_client_and_of_the_openai_sdk_are_refused_in_a_call(self):
        names = set(inspect.signature(lowrouter.Client).parameters)
        names -= {"model", "route", "timeout", "deadline"}
        names |= {"cache_dir", "extra_body", "extra_headers", "extra_query"}
        client = self.client()
        functions = (lowrouter.chat, lowrouter.stream, lowrouter.curl)  # even without a key
        for call in (client.chat, client.stream, client.curl, *functions):
            for name in names:
                with self.subTest(name, call=call):
                    error = self.error(TypeError, call, "Hi", **{name: NEVER_SHOWN})
                    self.assertRegex(str(error), rf"{name}.*Client\(")
                    self.assertNotIn(NEVER_SHOWN, str(error))
        self.error(TypeError, self.client, cache_dir="x")
        self.assertIn("stream()", str(self.error(TypeError, client.chat, "Hi", stream=True)))
        self.error(TypeError, client.stream, "Hi", stream=False)
        self.assertEqual(self.stub.connections, 0)

    def test_headers_of_the_client_are_sent_with_every_request(self):
        headers = {"X-LowRouter-Region": "eu-west", "X-Title": "a b"}
        for name in ("User-Agent", "user-agent"):
            client = self.client(headers={**headers, name: "mine/1"})
            client.chat("Hi")
            client.request("GET", "/models")
        for request in self.stub.requests:
            for name, value in {**headers, "User-Agent": "mine/1"}.items():
                self.assertEqual(request.headers.get_all(name), [value])
            self.assertEqual(request.headers["Authorization"], "Bearer " + KEY)

    def test_reserved_and_invalid_headers_are_refused(self):
        names = "Authorization authorization Proxy-Authorization Host Content-Type Content-Length "
        names += "Transfer-Encoding Connection Accept-Encoding Expect Upgrade"
        names = [*names.split(), "", "a b", "a:b", "Host: a", "a\nb", "\xe4", 5]
        values = ["a\nb", "a\r\n b", "\0", "\x7f", "\xe4", "\u2028", b"a", 5, None]
        table = [*({name: "x"} for name in names), *({"X-A": value} for value in values)]
        for headers in (*table, "abc", b"abc", 5, [("X-A", "x")]):
            with self.subTest(repr(headers)):
                self.error(lowrouter.ConfigError, self.client, headers=headers)


# ---- settings -----------------------------------------------------------------------------------


class TestSettings(Case):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.key_file = os.path.join(folder.name, "key")

    def write_key(self, key):
        """Replace the key file, as a mounted secret is replaced."""
        pathlib.Path(self.key_file + ".new").write_bytes(key.encode("latin-1"))
        os.replace(self.key_file + ".new", self.key_file)

    def key_sent(self, client):
        self.stub.play(answer("Hello"))
        client.chat("Hi")
        return self.stub.requests[-1].headers["Authorization"].partition(" ")[2]

    def clients(self, key):
        """Yield each source of a key, with a function that makes a client with this key."""
        yield "api_key", lambda: self.client(api_key=key)
        self.write_key(key.encode("latin-1", "replace").decode("latin-1"))
        for name, value in ("LOWROUTER_API_KEY", key), ("LOWROUTER_API_KEY_FILE", self.key_file):
            with mock.patch.dict(os.environ, {name: value}):
                yield name, lambda: self.client(api_key=None)

    def refusal(self, call, *args):
        """Return the message of the ConfigError. The error and its traceback show no secret."""
        try:  # assertRaises would clear the local variables of the traceback
            call(*args)
        except lowrouter.ConfigError as error:
            self.assertNotIn(NEVER_SHOWN, all_that_shows(error))
            return str(error)
        return self.fail("there was no error")

    def test_the_key_is_an_argument_or_a_variable_or_a_file_without_white_space_around_it(self):
        for key in (KEY + "\n", KEY + "\r\n", " \t" + KEY + " \n\n"):
            for name, make in self.clients(key):
                with self.subTest(name, key=key):
                    self.assertEqual(self.key_sent(make()), KEY)
        self.write_key("key-of-file")
        os.environ["LOWROUTER_API_KEY_FILE"] = self.key_file
        table = [("", "", "key-of-file"), (" \n", None, "key-of-file")]
        table += [("key-of-variable", None, "key-of-variable"), ("key-of-variable", KEY, KEY)]
        for variable, argument, sent in table:
            os.environ["LOWROUTER_API_KEY"] = variable
            self.assertEqual(self.key_sent(self.client(api_key=argument)), sent)

    def test_a_key_that_cannot_be_sent_is_refused_with_its_source_and_never_shown(self):
        inside = ["\n", "\r\n", "\n ", "\n\t", "\xe4", "\u2013", "\x1b", "\x7f", " "]
        keys = [(NEVER_SHOWN + bad + NEVER_SHOWN, "") for bad in inside]
        keys += [(quote + NEVER_SHOWN + quote, "quotes") for quote in "'\""]
        for key, hint in keys:
            for name, make in self.clients(key):
                if "\u2013" not in key or not name.endswith("FILE"):
                    with self.subTest(name, key=key):
                        self.assertRegex(self.refusal(make), rf"{name}\b.*{hint}")
        for key in (NEVER_SHOWN + "\0", NEVER_SHOWN + "\ud800", 5, b"key"):
            self.assertIn("api_key", self.refusal(lowrouter.Client, key))

    def test_without_a_key_the_error_names_the_variables(self):
        names = ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "ANTHROPIC_API_KEY", "API_KEY")
        with mock.patch.dict(os.environ, dict.fromkeys(names, NEVER_SHOWN)):
            for key in ("", " \n"):
                for name, make in self.clients(key):
                    with self.subTest(name, key=key):
                        self.assertIn("LOWROUTER_API_KEY", self.refusal(make))
            for path in (self.key_file + "x", os.path.dirname(self.key_file), NEVER_SHOWN):
                os.environ["LOWROUTER_API_KEY_FILE"] = path
                self.assertIn("LOWROUTER_API_KEY_FILE", self.refusal(lowrouter.Client))

    def test_a_key_file_is_read_again_for_each_call(self):
        self.write_key("\xef\xbb\xbffirst-key\r\n")  # with the BOM that editors on Windows write
        os.environ["LOWROUTER_API_KEY_FILE"] = self.key_file
        client = self.client(api_key=None)
        self.assertEqual(self.key_sent(client), "first-key")
        self.write_key("other-key\n")
        self.assertEqual(self.key_sent(client), "other-key")
        pathlib.Path(self.key_file).write_bytes(b"third-key\n")  # in place, with the same size
        os.utime(self.key_file, (1, 1))
        self.assertEqual(self.key_sent(client), "third-key")
        for empty in ("", "\f\n"):  # while it is being replaced, the last key is used
            self.write_key(empty)
            self.assertEqual(self.key_sent(client), "third-key")
        os.remove(self.key_file)
        self.assertEqual(self.key_sent(client), "third-key")
        self.write_key(NEVER_SHOWN + "\n" + NEVER_SHOWN)
        self.assertIn("LOWROUTER_API_KEY_FILE", self.refusal(client.chat, "Hi"))

    def test_every_key_has_a_list_of_models_of_its_own(self):
        os.environ["LOWROUTER_API_KEY_FILE"] = self.key_file
        self.write_key("one")
        client = self.client(api_key=None)
        for key, requests in (("one", 1), ("two", 2), ("one", 2)):
            self.write_key(key)
            self.stub.script.clear()
            self.stub.play({"data": [{"id": key}]})
            self.assertEqual(client.models(), [{"id": key}])
            self.assertEqual(len(self.stub.requests), requests)

    def test_a_base_url_that_cannot_be_used_is_refused(self):
        hosts = "a:abc a:99999 a:-1 a:0 :443 [::1 a..b b\xfccher.example a.example\\b".split()
        hosts += ["", "ho st", "ho\nst.example", "ho\0st", "h\x7fst", "h\ud800st", "a" * 64]
        urls = [f"https://{host}/v1" for host in hosts]
        urls += ["lowrouter.ai/api/v1", "//lowrouter.ai/api/v1", "ftp://lowrouter.ai/"]
        urls += ["file:///etc/hostname", "data:text/plain,x", 5, b"https://lowrouter.ai/"]
        urls += ["https://lowrouter.ai/" + end for end in ("a b", "?key=1", "#part", "\ud800")]
        urls += [f"https://{user}@lowrouter.ai/" for user in (NEVER_SHOWN, "a:" + NEVER_SHOWN)]
        for url in urls:
            with self.subTest(repr(url)):
                error = self.error(lowrouter.ConfigError, self.client, base_url=url)
                self.assertNotIn(NEVER_SHOWN, str(error))
        for end in ("/", "//", " \n"):
            self.client(base_url=" " + self.stub.url + end).models()
            self.assertEqual(self.stub.requests[-1].path, "/api/v1/models")

    def test_plain_http_is_for_this_machine_unless_it_is_allowed(self):
        far = "lowrouter.ai 10.0.0.1 localhost.example 127.0.0.1.example [fd00::1] notlocalhost "
        far += "0.0.0.0 128.0.0.1 a.localhost evil.localhost 127.0.0.999 [::ffff:127.0.0.1]"
        for host in far.split():
            self.client(base_url=f"http://{host}/v1", allow_http=True)
        for host in (*far.split(), "127.0.0.1@lowrouter.ai", "[::1%25lo]", "[::1%lo]"):
            with self.subTest(host):
                self.error(lowrouter.ConfigError, self.client, base_url=f"http://{host}/v1")
        for host in "localhost:1 LOCALHOST 127.9.9.9:1 [::1]:1 [0:0:0:0:0:0:0:1]".split():
            self.client(base_url=f"http://{host}/v1")

    def test_numbers_that_make_no_sense_are_refused(self):
        table = [("timeout", value) for value in (-0.0, None, [5])]
        table += [("deadline", value) for value in ([5], float("-inf"))]
        table += [("max_retries", value) for value in (-1, 1.5, "5", True, None, float("nan"))]
        for name, value in table:
            with self.subTest(name, value=value):
                error = self.error(lowrouter.ConfigError, self.client, **{name: value})
                self.assertIn(name, str(error))
        for seconds in (1 + 1e-9, 10**12, 10**400):
            self.assertTrue(self.client(timeout=seconds, deadline=seconds).chat("Hi").text)

    def test_a_client_shows_little_of_its_key_and_cannot_be_pickled(self):
        client = self.client()
        self.assertRegex(repr(client), f"{KEY[-4:]}.*{self.stub.url}")
        self.assertNotRegex(repr(client), f"{KEY[-5:]}|{KEY[:8]}")
        self.assertNotIn("tiny", repr(self.client(api_key="tiny")))
        for call in (pickle.dumps, copy.copy):
            with self.assertRaisesRegex(TypeError, "Client"):
                call(client)

    def test_a_client_reads_the_environment_when_it_is_made(self):
        with mock.patch.dict(os.environ, self.stub.env):
            client = self.client(api_key=None, base_url=None)
        os.environ["LOWROUTER_BASE_URL"] = "http://127.0.0.1:1"
        for each in (client, self.client()):
            self.assertTrue(each.chat("Hi").text)
        os.environ["LOWROUTER_BASE_URL"] = ""
        self.assertIn("https://lowrouter.ai/api/v1", repr(self.client(base_url="")))

    def test_the_functions_share_one_client_until_a_variable_changes(self):
        os.environ.update(self.stub.env)
        lowrouter.stream("Count to 5").result()
        self.assertTrue(lowrouter.generation(lowrouter.chat("Hi").generation_id))
        self.assertTrue(lowrouter.models())
        self.assertIn(self.stub.url, lowrouter.curl("Hi"))
        self.assertEqual(self.stub.connections, 1)
        stream = lowrouter.stream("Count to 5")
        names = re.findall(r"\b[A-Z]+_[A-Z_]+\b", lowrouter.__doc__)
        values = {"LOWROUTER_API_KEY": KEY + "\n", "LOWROUTER_BASE_URL": self.stub.url + "/"}
        for name in [*names, "https_proxy", "no_proxy"]:
            with self.subTest(name):
                lowrouter.request("GET", "/providers")
                before = self.stub.connections
                lowrouter.request("GET", "/providers")
                self.assertEqual(self.stub.connections, before)
                with mock.patch.dict(os.environ, {name: values.get(name, "http://127.0.0.1:1")}):
                    lowrouter.request("GET", "/providers")
                self.assertEqual(self.stub.connections, before + 1)
        self.assertIn("5", stream.result().text)  # a stream goes on with its client
        os.environ["LOWROUTER_API_KEY"] = "another-key"
        self.error(lowrouter.AuthenticationError, lowrouter.chat, "Hi")


# ---- models -------------------------------------------------------------------------------------


class TestModels(Case):
    def test_the_list_is_requested_once_an_hour_and_every_caller_gets_a_copy(self):
        start = time.time()
        client = self.client()
        first = copy.deepcopy(client.models())
        self.assertGreater(len(first), 5)
        for seconds, refresh, requests in (
            *((1, False, 1), (3599, False, 1), (3700, False, 2), (3700, False, 2)),
            *((3700, True, 3), (0, False, 4)),  # at the end, the clock was set back
        ):
            with mock.patch("time.time", return_value=start + seconds):
                listed = client.models(refresh=refresh)
            self.assertEqual((listed, len(self.stub.requests)), (first, requests))
            listed[0]["pricing"].clear()  # which changes no other copy of the list
            del listed[1:]

    def test_an_old_list_is_used_with_a_warning_when_the_gateway_cannot_be_reached(self):
        client = self.client(max_retries=0)
        first = client.models()
        for status in ("401 No", "503 No"):  # it can be reached
            self.stub.play(reply("", status))
            self.error(lowrouter.APIStatusError, client.models, refresh=True)
        self.stub.close()
        for refresh in (False, True):
            with mock.patch("time.time", return_value=time.time() + 7200):
                with self.assertWarns(UserWarning) as caught:
                    self.assertEqual(client.models(refresh=refresh), first)
            self.assertEqual(caught.filename, __file__)
            self.assertNotIn(KEY, str(caught.warning))
        self.error(lowrouter.APIConnectionError, self.client(max_retries=0).models)

    def test_a_list_can_be_bare_and_anything_else_is_refused(self):
        for data in ([{"id": "a"}], {"data": [{"id": "a"}]}, {"object": "list", "data": []}):
            self.stub.play(reply(data))
            expected = data if isinstance(data, list) else data["data"]
            self.assertEqual(self.client().models(), expected)
        for data in ({}, {"data": None}, {"data": {}}, {"data": [5]}, "5", "null", "", "<html>"):
            with self.subTest(data):
                self.stub.play(reply(data))
                self.error(lowrouter.BadResponseError, self.client().models)
        for depth in range(900, 1000):  # some can be parsed, but not be copied
            self.stub.play(reply('[{"id": "m", "deep": %s}]' % ("[" * depth + "]" * depth)))
            with contextlib.suppress(lowrouter.BadResponseError):
                self.assertEqual(self.client().models()[0]["id"], "m")


# ---- generations --------------------------------------------------------------------------------


class TestGeneration(Case):
    def test_an_id_is_one_segment_of_the_path_whatever_is_in_it(self):
        ids = ["../models", "a/b?c#d", "a\nb", "a\r\nX: y", "\xfc", "%2e%2e", " ", "\0", "..."]
        for each in (*ids, "\U0001f600", "a;b", "gen_01J9~-_.", "a\ud800b"):
            with self.subTest(repr(each)):
                self.stub.play({"generation_id": "x"})
                self.assertEqual(self.client().generation(each), {"generation_id": "x"})
                prefix, _, segment = self.stub.requests[-1].path.rpartition("/")
                self.assertEqual(prefix, "/api/v1/generation")
                self.assertRegex(segment, r"\A[A-Za-z0-9_.~%-]+\Z")
                self.assertEqual(urllib.parse.unquote(segment, errors="surrogatepass"), each)

    def test_a_record_is_any_object_bare_or_in_an_envelope(self):
        record = {"generation_id": "gen_1", "eco": {"energy_wh": 0.1}, "routing_trace": "any"}
        failed = {"generation_id": "gen_1", "status": "upstream_error", "error": {"message": "x"}}
        for data in (record, {"data": record}, {**record, "data": {"x": 1}}, failed):
            self.stub.play(data)
            expected = record if set(data) == {"data"} else data
            self.assertEqual(self.client().generation("gen_1"), expected)
        for data in ("[]", "null", "5", "{}", "<html>", ""):
            with self.subTest(data):
                self.stub.play(reply(data))
                self.error(lowrouter.BadResponseError, self.client().generation, "gen_1")

    def test_wait_polls_a_record_until_it_is_there_or_another_error_or_the_end(self):
        self.stub.play(reply({"error": {"message": "not yet"}}, "404 Not Found"), times=3)
        self.stub.play({"generation_id": "gen_1"})
        self.assertEqual(self.client().generation("gen_1", wait=60), {"generation_id": "gen_1"})
        self.assertEqual((len(self.stub.requests), len(self.waits)), (4, 3))
        self.assertTrue(all(0 < seconds <= 5 for seconds in self.waits))
        self.stub.play(reply("", "401 No"))
        self.error(lowrouter.AuthenticationError, self.client().generation, "gen_1", wait=60)
        client = self.client(deadline=0.4)
        self.error(lowrouter.NotFoundError, client.generation, "gen_none", wait=60)
        self.assertEqual((len(self.stub.requests), len(self.waits)), (6, 3))
        real = time.monotonic
        for wait, least in ((5, 2), (0.3, 0.2), (0, 0)):
            self.waits.clear()
            before = len(self.stub.requests)
            with mock.patch("time.monotonic", lambda: real() + sum(self.waits)):
                self.error(lowrouter.NotFoundError, self.client().generation, "gen_x", wait=wait)
            self.assertTrue(least <= sum(self.waits) <= wait, self.waits)  # tried at the end too
            self.assertEqual(len(self.stub.requests) - before, len(self.waits) + 1)


# ---- request() ----------------------------------------------------------------------------------


class TestRequestMethod(Case):
    def sent(self, *args):
        """Return the method, the path below the base URL and the body that are sent."""
        self.stub.play({"ok": True})
        self.assertEqual(self.client().request(*args), {"ok": True})
        request = self.stub.requests[-1]
        self.assertEqual(request.headers["Host"], f"127.0.0.1:{self.stub.port}")
        self.assertTrue(request.path.startswith("/api/v1/"))
        return request.method, request.path[len("/api/v1") :], request.json

    def test_any_method_and_body_is_sent_to_any_path_with_what_a_url_cannot_have_encoded(self):
        for args, sent in (
            (("get", "providers"), ("GET", "/providers", None)),
            (("GET", "/a/b?c=d&e=%20"), ("GET", "/a/b?c=d&e=%20", None)),
            (("GET", "/a", {"b": 1}), ("GET", "/a", {"b": 1})),
            (("DELETE", "/a"), ("DELETE", "/a", None)),
            (("PUT", "/a", [1]), ("PUT", "/a", [1])),
            *((("POST", "/a", body), ("POST", "/a", body)) for body in ({"b": "c"}, "", 0)),
            (("GET", "/a b"), ("GET", "/a%20b", None)),
            (("GET", "/a\r\nHost: x"), ("GET", "/a%0D%0AHost:%20x", None)),
            (("GET", "/\xfc\ud800b"), ("GET", "/%C3%BC%ED%A0%80b", None)),
            (("GET", "/a#b\\c\x7f"), ("GET", "/a%23b%5Cc%7F", None)),
            (("GET", "//host/a"), ("GET", "/host/a", None)),
            (("GET", "https://x.example/"), ("GET", "/https://x.example/", None)),
            (("GET", "/a?b=c d&e=https://f/"), ("GET", "/a?b=c%20d&e=https://f/", None)),
        ):
            with self.subTest(repr(args)):
                self.assertEqual(self.sent(*args), sent)
        self.sent("POST", "/a")  # without a length some servers would wait for a body
        self.assertEqual(self.stub.requests[-1].headers["Content-Length"], "0")

    def test_any_json_is_returned_and_an_empty_response_is_none(self):
        client = self.client(timeout=5)
        table = [("GET", reply(body), json.loads(body)) for body in ("[1]", "5", '"a"', "{}")]
        empty = STREAM_HEAD.replace(b"event-stream", b"plain") + chunked()
        for method in ("GET", "POST", "DELETE"):
            for response in (reply("null"), reply(""), head("204 No Content"), empty):
                table.append((method, response, None))
        table.append(("GET", reply("\ufeff[1]"), [1]))
        table += [("HEAD", head("200 OK", "Content-Length: 5"), None)] * 2
        for method, response, value in table:
            with self.subTest(method, response=response):
                self.stub.play(response)
                self.assertEqual(client.request(method, "/x"), value)
        self.assertEqual((len(self.stub.requests), self.stub.connections), (len(table), 1))

    def test_invalid_arguments_of_request_and_generation_are_refused(self):
        table = [("request", "GET", path) for path in (None, 5, b"/x")]
        table += [("request", method, "/x") for method in ("", "GET /", "G\nX", None, 5, "\xdc")]
        table += [("generation", each) for each in ("", ".", "..", None, 5, b"gen_1", ["gen_1"])]
        table += [("generation", "x", wait) for wait in (float("nan"), float("inf"), "5", None)]
        for name, *args in table:
            with self.subTest(name, args=args):
                self.error(lowrouter.ConfigError, getattr(self.client(), name), *args)
        self.assertEqual(self.stub.connections, 0)


# ---- event streams: the rules of the WHATWG standard --------------------------------------------

DONE = b"data: [DONE]\n\n"
ONE = b'data: {"choices":[{}],"n":1}\n\n'
TWO = b'data: {"choices":[{}],"n":2}\n\n'

#: Event streams, and the field `n` of each chunk in them.
EVENT_STREAMS = {
    "LF": (ONE + TWO + DONE, [1, 2]),
    "CR": ((ONE + TWO + DONE).replace(b"\n", b"\r"), [1, 2]),
    "CRLF": ((ONE + TWO + DONE).replace(b"\n", b"\r\n"), [1, 2]),
    "mixed line ends": (ONE[:-2] + b"\r\n\r" + TWO[:-2] + b"\n\r\n" + DONE, [1, 2]),
    "mixed in an event": (b'data: {"n":\rdata: 1,"choices"\r\ndata: :[{}]}\n\r' + DONE, [1]),
    "byte order mark": (b"\xef\xbb\xbf" + ONE + DONE, [1]),
    "byte order mark and CR": (b"\xef\xbb\xbf\r" + ONE + DONE, [1]),
    "two byte order marks": (b"\xef\xbb\xbf\xef\xbb\xbf" + ONE + TWO + DONE, [2]),
    "byte order mark on a later line": (ONE + b"\xef\xbb\xbf" + TWO + DONE, [1]),
    "comments": (b": hi\n\n:\n" + ONE + b":data: {}\n\n" + DONE, [1]),
    "no space after the colon": ((ONE + DONE).replace(b": ", b":"), [1]),
    "data lines": (b'data: {"n"\ndata: :\ndata\ndata: 1,"choices":[{}]}\n\n' + DONE, [1]),
    "other fields": (b"id: 7\nretry: 9\nx\ny: z\n" + ONE + b"id: 8\n\n" + DONE, [1]),
    "fields similar to data": (b"database: 1\n data: 2\nDATA: 3\n\n" + ONE + DONE, [1]),
    "events without data": (b"event: error\n\n" + ONE + b"event: ping\nid: 1\n\n" + DONE, [1]),
    "ping with data": (b"event: ping\ndata: now\n\n" + ONE + DONE, [1]),
    "ping with an object": (b'event: ping\ndata: {"n": 2}\n\n' + ONE + DONE, [1]),
    "ping with [DONE]": (b"event: ping\ndata: [DONE]\n\n" + ONE + DONE, [1]),
    "event named message": (b"event: message\n" + ONE + DONE, [1]),
    "empty data": (b"data\n\ndata:\n\ndata: \n\n" + ONE + DONE, [1]),
    "blank lines": (b"\n\n\n" + ONE + b"\n\n" + DONE, [1]),
    "other separators": (ONE.replace(b"1", '"\u2028\x85"'.encode()) + DONE, ["\u2028\x85"]),
    "escapes": (ONE.replace(b"1", b'"a\\nb\\u2028"') + DONE, ["a\nb\u2028"]),
    "UTF-8": (ONE.replace(b"1", '"\xe4\U0001f600"'.encode()) + DONE, ["\xe4\U0001f600"]),
    "invalid UTF-8": (ONE.replace(b"1", b'"a\xffb\xe2\x82"') + DONE, ["a\ufffdb\ufffd"]),
    "no blank line at the end": (ONE + b"data: [DONE]\n", [1]),
    "no line end at the end": (ONE + b"data: [DONE]", [1]),
    "a finish reason": (ONE.replace(b"{}", b'{"finish_reason":"stop"}')[:-2], [1]),
    "CR at the end": (ONE + b"data: [DONE]\r", [1]),
    "an event after the end": (ONE + DONE + TWO, [1]),
    "text after the end": (ONE + DONE + b"data: oops\n\n", [1]),
}


class TestEventStreams(Case):
    def test_the_chunks_are_the_same_if_a_stream_is_cut_at_any_byte_or_at_every_byte(self):
        client = self.client()
        for name, (body, expected) in EVENT_STREAMS.items():
            ways = [[body[:at], body[at:]] for at in range(len(body))]
            ways.append([body[at : at + 1] for at in range(len(body))])
            wrong = []
            for blocks in ways:
                self.stub.play(STREAM_HEAD + chunked(*blocks))
                numbers = [chunk["n"] for chunk in client.stream("Hi")]
                if numbers != expected:
                    wrong.append((blocks, numbers))
            with self.subTest(name):
                self.assertEqual(wrong, [])

    def test_an_event_can_be_longer_than_a_block(self):
        text = "\xe4" * 200_000
        self.assertEqual(self.stream(sse(delta(text), delta("b"))).result().text, text + "b")


# ---- streams: chunks, and the completion to which they add up -----------------------------------

REASON = {"message": "overloaded", "code": "c1"}
FAILED_CHOICE = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
AB_STOP = sse(delta("a"), delta("b", "stop"), done=False)
FIRST_OF_AZURE = {"choices": [], "id": "", "model": "", "prompt_filter_results": [{}]}
HTML = b"<!DOCTYPE html>\n<html><head>\n<title>overloaded</title></head>\n\n</html>\n\n"


def whole(text, finish=None, added=None):
    """A chunk that has the text so far in `message`; `added` is the text of a delta beside it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    if added is not None:
        choice["delta"] = {"content": added}
    return {"choices": [choice]}


#: Complete answers with the text "ab", among them habits of hosted APIs, gateways and servers.
COMPLETE = (
    ("[DONE] without a finish reason", sse(delta("a"), delta("b"))),
    ("[DONE] with a space after it", sse(delta("ab"), done=False) + b"data: [DONE] \n\n"),
    ("a finish reason without [DONE]", AB_STOP),
    ("a finish reason, then null", sse(delta("ab", "stop"), delta(None, "null"), done=False)),
    ("a finish reason, then none", AB_STOP + sse({"choices": [{"index": 0}]})),
    ("a finish reason, then JSON", AB_STOP + b'{"status": 502}\n\n'),
    ("a finish reason, then half an event", AB_STOP + b'data: {"usage": {"tot'),
    ("a finish reason, then HTML", AB_STOP + HTML),
    ("two finish reasons", sse(delta("ab", "stop"), delta("c", "length", index=1), done=False)),
    ("a foreign event", b'event: status\ndata: {"message": "working"}\n\n' + AB_STOP),
    ("API Azure OpenAI: the first chunk has no choice", sse(FIRST_OF_AZURE, done=False) + AB_STOP),
    ("API Perplexity: text so far beside deltas", sse(whole("a", None, "a"), whole("ab", "", "b"))),
    ("API Perplexity: all of the text at the end", AB_STOP + sse(whole("ab", "stop"))),
    ("API Perplexity: text so far, no deltas", sse(whole("a"), whole("ab"), whole("ab", "stop"))),
    ("a message that differs from the deltas", sse(delta("ab"), whole("other", "stop"))),
    ("gateways with a cache: one chunk with a message", sse(whole("ab", "stop"), done=False)),
    ("gateway OpenRouter: comments while it waits", b": OPENROUTER PROCESSING\n\n" + AB_STOP),
    ("gateway LiteLLM: last chunk has no choice", AB_STOP + sse({"choices": [], "usage": {}})),
    ("server llama.cpp: empty comments, no last line end", b":\n\n" + AB_STOP + DONE[:-2]),
    ("server Ollama: the finish reason is always empty", sse(delta("a", ""), delta("b", ""))),
    ("server SGLang: null in unused fields", sse(delta("a", "", tool_calls=None), delta("b", ""))),
    ("server vLLM: usage in every chunk", sse(*(delta(text, usage={"n": 1}) for text in "ab"))),
    ("server KoboldCpp: the word null", sse(delta("a", "null"), delta("b", "null")) + DONE),
)
#: Streams that end too early, and the text that they had until then; None before any chunk.
INCOMPLETE = (
    ("no finish reason", "ab", sse(delta("a"), delta("b"), done=False)),
    ("choice 0 is not finished", "ab", sse(delta("ab"), delta("c", "stop", index=1), done=False)),
    ("choice 1 is not finished", "ab", sse(delta("ab", "stop"), delta("c", index=1), done=False)),
    ("an empty finish reason", "ab", sse(delta("ab", ""), done=False)),
    ("a finish reason of None", "ab", sse(delta("ab", "None"), done=False)),
    ("server KoboldCpp: the word null", "a", sse(delta("a", "null"), done=False)),
    ("half an event", "a", sse(delta("a"), done=False) + b'data: {"choices": [{"del'),
    ("an event that is not JSON", "a", sse(delta("a"), "oops", done=False)),
    ("nothing", None, b""),
    ("comments and empty data", None, b": ping\n\n: ping\n\ndata: \n\n"),
    ("only [DONE]", None, sse()),
    ("[DONE] after chunks without a choice", "", sse({"choices": [], "id": "c"})),
    ("[DONE] after objects without choices", "", sse({"id": "c"}, {"usage": {"n": 1}})),
)


class TestStreams(Case):
    def test_interim_responses_are_passed_over(self):
        for status in ("100 Continue", "102 Processing", "103 Early Hints"):
            interim = f"HTTP/1.1 {status}\r\nLink: </a>\r\n\r\n".encode()
            self.stub.play(interim * 2 + STREAM_HEAD + chunked(AB_STOP))
            self.assertEqual(self.client().stream("Hi").result().text, "ab")

    def test_a_connection_whose_framing_broke_is_not_used_again(self):
        client = self.client()
        self.stub.play(STREAM_HEAD + chunked(AB_STOP, end=False) + b"zz\r\n")
        with client.stream("Hi") as stream:
            self.assertEqual(stream.result().text, "ab")
        connections = self.stub.connections
        self.assertEqual(client.chat("Say hello").text, "Hello!")
        self.assertEqual(self.stub.connections, connections + 1)

    def test_what_has_arrived_is_handed_out_before_the_rest_is_sent(self):
        start = threading.Event()
        go_on = threading.Event()
        head = stream_head(X_LowRouter_Generation_ID="gen_7")
        first = chunked(sse(delta("a"), done=False), end=False)
        rest = chunked(sse(delta("b", "stop")))
        self.stub.play(head, Wait(start), first, Wait(go_on), rest)
        with self.client(timeout=5).stream("Hi") as stream:
            self.assertEqual((stream.generation_id, stream.completion.text), ("gen_7", ""))
            start.set()
            self.assertEqual((next(stream).text, stream.completion.text), ("a", "a"))
            go_on.set()
            self.assertEqual(next(stream).text, "b")
            answer = stream.result()
            self.assertEqual((answer.text, answer.generation_id), ("ab", "gen_7"))

    def test_a_stream_ends_with_the_completion_that_chat_returns(self):
        client = self.client()
        complete = client.chat("Count to 5 slowly")
        with client.stream("Count to 5 slowly") as stream:
            text = "".join(chunk.text for chunk in stream)
        answer = stream.completion
        self.assertEqual((text, answer["object"]), (answer.text, "chat.completion"))
        self.assertIs(type(answer), lowrouter.Completion)
        for name in "text message finish_reason usage model region provider eco".split():
            self.assertEqual(getattr(answer, name), getattr(complete, name), name)
        self.assertEqual(answer.headers["Content-Type"], "text/event-stream")

    def test_a_complete_answer_gives_its_text_once_even_if_it_is_cut_after_its_end(self):
        for name, body in COMPLETE:
            for end in (True, False):
                with self.subTest(name, end=end):
                    stream = self.stream(body, end=end)
                    self.assertEqual("".join(chunk.text for chunk in stream), "ab")
                    self.assertEqual(stream.result().text, "ab")
                    self.assertEqual(stream.result().message["role"], "assistant")

    def test_a_stream_that_ends_early_is_an_error_with_the_partial_text(self):
        for name, text, body in INCOMPLETE:
            for end in (True, False):
                with self.subTest(name, end=end):
                    stream = self.stream(body, end=end, max_retries=2)
                    error = self.error(lowrouter.StreamError, stream.result)
                    self.assertEqual(getattr(error.completion, "text", None), text)
                    self.assertIn(f"{self.stub.host}:{self.stub.port} ", str(error))
        self.assertEqual((len(self.stub.requests), self.waits), (2 * len(INCOMPLETE), []))

    def test_each_choice_that_was_requested_must_be_finished(self):
        first = delta("a", "stop")
        second = delta("b", "stop", index=1)
        for body in (sse(first, second, done=False), sse(first, delta("b", index=1)), sse(first)):
            self.stub.play(STREAM_HEAD + chunked(body))
            self.assertEqual(self.client().stream("Hi", n=2).result().text, "a")
        for choice in (first, second):
            self.stub.play(event_stream(choice, done=False))
            self.error(lowrouter.StreamError, self.client().stream("Hi", n=2).result)

    def test_a_lost_connection_is_an_error_with_the_partial_text(self):
        head = stream_head(X_LowRouter_Generation_ID="gen_7")
        first = chunked(sse(delta("a"), done=False), end=False)
        for ending, timeout, kind, phase in (
            (RESET, 5, lowrouter.StreamError, None),
            (STALL, 0.2, lowrouter.APITimeoutError, "idle"),
        ):
            seen = threading.Event()
            self.stub.play(head + first, Wait(seen), ending)
            stream = self.client(timeout=timeout).stream("Hi")
            self.assertEqual(next(stream).text, "a")
            seen.set()
            error = self.error(kind, next, stream)
            error = pickle.loads(pickle.dumps(error))
            self.assertEqual((error.completion.text, error.generation_id), ("a", "gen_7"))
            self.assertEqual(error.phase, phase)
        self.assertEqual(len(self.stub.requests), 2)

    def test_silence_after_a_complete_answer_is_its_end(self):
        self.stub.play(STREAM_HEAD + chunked(AB_STOP, end=False), STALL)
        self.assertEqual(self.client(timeout=0.2).stream("Hi").result().text, "ab")
        self.stub.play(STREAM_HEAD + chunked(AB_STOP + DONE, end=False), STALL)
        with self.takes(0):  # nothing is awaited after [DONE]
            self.assertEqual(self.client().stream("Hi").result().text, "ab")

    def test_result_reads_the_rest_and_can_be_called_again(self):
        stream = self.stream(sse(delta("a"), delta("b"), delta("c", "stop")))
        self.assertEqual(next(stream).text, "a")
        first = stream.result()
        self.assertEqual((first.text, stream.result()), ("abc", first))
        self.assertRaises(StopIteration, next, stream)
        stream.close()
        self.assertEqual(stream.result(), first)

    def test_a_completion_belongs_to_the_caller(self):
        """It does not change when more arrives, and changing it does not change the stream."""
        block = {"generation_id": "gen_1", "eco": {"energy_wh": 1}}
        last = {**delta("b", "stop", tags=["y"]), "usage": {"n": 1}, "lowrouter": block}
        document = {**last, "choices": [{"message": {"content": "ab", "tags": ["x", "y"]}}]}
        for response in (event_stream(delta("a", tags=["x"]), last), reply(document)):
            self.stub.play(response)
            stream = self.client().stream("Hi")
            chunks = [next(stream)]
            before = stream.completion
            unchanged = json.dumps(before)
            chunks += stream
            self.assertEqual(json.dumps(before), unchanged)
            complete = json.dumps(stream.completion)
            for chunk in chunks:
                chunk.clear()
            for changed in (stream.completion, stream.result()):
                changed.usage["n"] += 1
                changed.eco.clear()
                changed.message["tags"].append("z")
                changed.clear()
            self.assertEqual(json.dumps(stream.result()), complete)

    def test_another_thread_can_look_at_the_completion_while_it_grows(self):
        events = [delta("a", **{f"new-{number}": number}) for number in range(2000)]
        stream = self.stream(sse(*events))
        done = threading.Event()
        texts = set()

        def look():
            while not done.is_set():
                texts.add(stream.completion.text)
            texts.add("end")

        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)  # threads take turns in the middle of everything
        reader = threading.Thread(target=look)
        reader.start()
        self.assertEqual(stream.result().text, "a" * len(events))
        done.set()
        reader.join(10)
        self.assertIn("end", texts)  # look() did not fail
        self.assertEqual({text.strip("a") for text in texts}, {"", "end"})


class TestClosingStreams(Case):
    def watched(self):
        """Return a stream that waits after one chunk, and an event: its connection was closed."""
        gone = threading.Event()

        def wait_for_end(sock):
            sock.settimeout(10)
            with contextlib.suppress(ConnectionError):
                sock.recv(1)  # until the client hangs up
            gone.set()

        body = chunked(sse(delta("a"), done=False), end=False)
        self.stub.play(STREAM_HEAD + body, wait_for_end, CUT)
        return self.client().stream("Hi"), gone

    def assert_partial(self, stream, text):
        error = self.error(lowrouter.StreamError, stream.result)
        self.assertEqual(getattr(error.completion, "text", None), text)

    def test_leaving_a_with_block_closes_the_connection(self):
        stream, gone = self.watched()
        with stream:
            self.assertEqual(next(stream).text, "a")
        self.assertTrue(gone.wait(10))
        self.assertEqual(list(stream), [])
        self.assert_partial(stream, "a")
        stream.close()  # closing twice does no harm
        stream, gone = self.watched()
        with self.assertRaisesRegex(KeyError, "a"), stream:
            raise KeyError(next(stream).text)
        self.assertTrue(gone.wait(10))

    def test_dropping_a_stream_closes_the_connection(self):
        for read_first in (True, False):
            stream, gone = self.watched()
            if read_first:
                next(stream)
            del stream
            gc.collect()
            self.assertTrue(gone.wait(10), read_first)

    def test_closing_a_generator_that_yields_from_a_stream_closes_the_connection(self):
        stream, gone = self.watched()

        def forward():
            yield from stream

        chunks = forward()
        next(chunks)
        chunks.close()
        self.assertTrue(gone.wait(10))

    def test_a_stream_can_be_closed_before_its_first_chunk(self):
        for steps in ([event_stream(delta("a", "stop"))], [STREAM_HEAD, STALL]):
            self.stub.play(*steps)
            stream = self.client().stream("Hi")
            stream.close()
            self.assertEqual(list(stream), [])
            self.assert_partial(stream, None)

    def test_closing_from_another_thread_ends_the_iteration_quietly(self):
        stream, gone = self.watched()
        has_chunk = threading.Event()
        texts = []

        def read():
            for chunk in stream:
                texts.append(chunk.text)
                has_chunk.set()
            texts.append("end")

        reader = threading.Thread(target=read)
        reader.start()
        self.assertTrue(has_chunk.wait(10))
        stream.close()
        reader.join(10)
        self.assertEqual((gone.wait(10), texts), (True, ["a", "end"]))
        self.assert_partial(stream, "a")

    def test_closing_the_client_does_not_end_its_streams(self):
        with self.client() as client:
            stream = client.stream("Count to 5 slowly")
        self.assertIn("5", stream.result().text)

    @unittest.skipUnless(hasattr(signal, "setitimer"), "this system has no interval timers")
    def test_an_exception_from_a_signal_handler_closes_the_connection(self):
        self.addCleanup(signal.signal, signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        for kind in (KeyboardInterrupt, SystemExit, ZeroDivisionError):
            stream, gone = self.watched()  # this name keeps the stream alive
            next(stream)
            signal.signal(signal.SIGALRM, mock.Mock(side_effect=kind))
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with self.assertRaises(kind):
                next(stream)
            self.assertTrue(gone.wait(10))
            self.assert_partial(stream, "a")


# ---- streams: errors, and responses that are not streams ----------------------------------------

#: What follows two chunks with the text "ab", and the code of the error, whose words are always
#: "overloaded". Rows with the name of a server have the shape in which it reports errors.
STREAM_ERRORS = (
    ("an error of text", sse({"error": "overloaded"}), None),
    ("an error event", b"event: error\n" + sse({"error": REASON}), "c1"),
    ("an error event of text", b"event: error\n" + sse("overloaded"), None),
    ("text instead of JSON", sse("overloaded"), None),
    ("JSON after a blank line", b'\n{"error": "overloaded"}\n\n', None),
    ("pretty-printed JSON", json.dumps({"error": REASON}, indent=2).encode(), "c1"),
    ("JSON in a string", sse({"error": json.dumps({"error": REASON})}), "c1"),
    ("server vLLM, API Azure OpenAI: an object", sse({"error": REASON}), "c1"),
    ("server vLLM, older: the event is the object", sse({"object": "error", **REASON}), "c1"),
    ("server SGLang: an object in an error", sse({"error": {"object": "error", **REASON}}), "c1"),
    ("server Ollama: a line of JSON", b'{"error":"overloaded"}\n\n' + sse(), None),
    ("server llama.cpp: an error field", b'error: {"message": "overloaded"}\n\n' + sse(), None),
    ("API Gemini: a list as the event", sse([{"error": REASON}]), "c1"),
    ("API Gemini: a list in lines", json.dumps([{"error": REASON}], indent=2).encode(), "c1"),
    ("API Anthropic: an error event without an error", b"event:  error\n" + sse(REASON), "c1"),
    ("API SiliconFlow: no error field", sse({"code": 500, "message": "overloaded"}), 500),
    ("gateway OpenRouter: with choices", sse({"error": REASON, "choices": [FAILED_CHOICE]}), "c1"),
    ("gateway LiteLLM: no [DONE]", sse({"error": {**REASON, "code": "500"}}, done=False), "500"),
    ("proxy Cloudflare: a page of HTML, then events", HTML + sse(delta("c", "stop")), None),
    ("proxy Envoy: plain text at the end", b"upstream connect error: overloaded", None),
)
#: Responses that are not event streams: content type, body, words of the error.
NOT_STREAMS = (
    ("application/json", {"error": REASON}, "overloaded"),
    ("application/json", {"object": "list"}, ""),
    ("application/json", "null", ""),
    ("application/json", "{", ""),
    ("application/json", "", ""),
    ("text/html", "<html>Sign in</html>", "proxy"),
    ("text/plain", "\n <!doctype html><title>Sign in</title>", "Sign in"),
    ("text/plain", "\ufeff\r\n" + json.dumps({"error": REASON}), "overloaded"),
)


class TestStreamErrors(Case):
    def test_an_error_has_the_words_of_the_server_and_the_partial_text(self):
        for name, body, code in STREAM_ERRORS:
            with self.subTest(name):
                stream = self.stream(sse(delta("a"), delta("b"), done=False), body)
                self.assertEqual((next(stream).text, next(stream).text), ("a", "b"))
                error = self.error(lowrouter.StreamError, list, stream)
                self.assertEqual((error.completion.text, error.code), ("ab", code))
                self.assertFalse({"error", "message"}.intersection(error.completion))
                self.assertTrue(error.message.endswith("overloaded"), error.message)
                self.assertIn("overloaded", str(error))
                self.assertIn("overloaded", json.dumps(error.body))
                self.assertEqual("proxy" in str(error), "HTML" in name)
                self.assertEqual(str(error).count(f"{self.stub.host}:{self.stub.port} "), 1)
                again = self.error(type(error), stream.result)
                self.assertIsNot(again, error)  # its traceback would hold all its callers
                self.assertEqual((str(again), vars(again)), (str(error), vars(error)))

    def test_an_error_after_a_finish_reason_is_raised(self):
        for body in (sse({"error": REASON}), b"event: error\n" + sse(REASON)):
            with self.subTest(body):
                error = self.error(lowrouter.StreamError, self.stream(AB_STOP, body).result)
                self.assertEqual((error.completion.text, error.message), ("ab", "overloaded"))

    def test_an_answer_without_a_choice_is_incomplete_even_if_none_was_requested(self):
        self.stub.play(STREAM_HEAD + chunked(DONE))
        self.error(lowrouter.StreamError, self.client().stream("Hi", n=0).result)

    def test_an_error_before_the_first_chunk_has_no_completion(self):
        with_usage = {"error": REASON, "usage": {"total_tokens": 1}}
        document = json.dumps(with_usage).encode()
        documents = [HTML, document, b"\xef\xbb\xbf \r\n" + document]
        for body in (sse(with_usage), b"event: error\n" + sse(REASON), *documents):
            with self.subTest(body):
                error = self.error(lowrouter.BadResponseError, next, self.stream(body))
                self.assertEqual((error.completion, error.message), (None, "overloaded"))

    def test_a_choice_that_failed_is_an_error_in_any_kind_of_response(self):
        client = self.client(max_retries=0)
        failed = {"finish_reason": "error"}
        for choice in ({"error": REASON}, {**failed, "error": REASON}, failed):
            document = reply({"choices": [{"message": {"content": "a"}, **choice}]})
            first = event_stream(delta("a"), {"choices": [{"delta": {}, **choice}]})
            second = event_stream(delta("a"), {"choices": [{"index": 1, **choice}]})
            calls = [(client.stream, response) for response in (document, first, second)]
            for call, response in [(client.chat, document), *calls]:
                with self.subTest(choice, call=call.__name__, response=response[-90:]):
                    self.stub.play(response)
                    with self.assertRaises(lowrouter.BadResponseError) as caught:
                        call("Hi").result()
                    self.assertEqual(caught.exception.completion.text, "a")
                    self.assertEqual("overloaded" in str(caught.exception), "error" in choice)

    def test_the_other_fields_of_a_failed_event_are_kept(self):
        last = {**delta("b"), "error": REASON, "usage": {"total_tokens": 7}}
        last["lowrouter"] = {"generation_id": "gen_e"}
        error = self.error(lowrouter.StreamError, self.stream(sse(delta("a"), last)).result)
        self.assertEqual((error.generation_id, error.completion.text), ("gen_e", "ab"))
        self.assertEqual(error.completion.usage, {"total_tokens": 7})

    def test_a_response_that_is_not_a_stream_is_an_error_of_stream_itself(self):
        client = self.client()
        for content_type, body, words in NOT_STREAMS:
            for headers in ({}, {"connection": "close"}):
                with self.subTest(content_type, body=body, headers=headers):
                    self.stub.play(reply(body, content_type=content_type, **headers))
                    error = self.error(lowrouter.BadResponseError, client.stream, "Hi")
                    self.assertIn(words, str(error))
                    self.assertIsNone(error.completion)

    def test_json_instead_of_a_stream_is_one_chunk(self):
        without_reason = answer("Hello")
        del without_reason["choices"][0]["finish_reason"]
        for content_type in ("application/json; charset=utf-8", "text/plain", "text/event-stream"):
            for body in (answer("Hello"), without_reason):
                with self.subTest(content_type):
                    self.stub.play(reply(body, content_type=content_type))
                    stream = self.client().stream("Hi")
                    (chunk,) = stream
                    self.assertEqual((chunk, chunk.text), (body, "Hello"))
                    self.assertEqual((stream.completion, stream.result()), (body, body))
                    self.assertIs(type(chunk), lowrouter.Chunk)
                    self.assertIs(type(stream.result()), lowrouter.Completion)

    def test_the_content_type_and_leading_white_space_do_not_matter(self):
        client = self.client()
        starts = (b"", b": ping\n\n", b"id: 1\n\n", b"event: ping\n\n", b"retry: 9\n\n")
        bodies = [start + AB_STOP for start in starts] + [json.dumps(answer("ab")).encode()]
        for kind in (b"text/event-stream", b"application/json", b"text/plain"):
            head = STREAM_HEAD.replace(b"text/event-stream", kind)
            for space in (b"\n", b" \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"):
                for body in bodies:
                    for size in range(len(space) + 1):  # of the first block
                        with self.subTest(kind, space=space, body=body, size=size):
                            self.stub.play(head + chunked(space[:size], space[size:] + body))
                            self.assertEqual(client.stream("Hi").result().text, "ab")


# ---- streams: how deltas add up -----------------------------------------------------------------

#: Pieces of tool calls, and the calls that they add up to. The words of a piece are its index, id,
#: name and arguments, those of a call its id, name and arguments; "-" stands for nothing.
TOOL_CALLS = (
    ("by index", "0 a f - | 0 - - { | 0 - - }", "a f {}"),
    ("two calls by index in turns", "0 a f { | 1 b g { | 0 - - } | 1 - - }", "a f {} | b g {}"),
    ("by id alone, in turns", "- a f { | - b g { | - a - } | - b - }", "a f {} | b g {}"),
    ("by id, then the last call", "- a f { | - - - } | - b g { | - - - }", "a f {} | b g {}"),
    ("by index, then by id", "0 a f { | 1 b g { | - a - } | - b - }", "a f {} | b g {}"),
    ("without index and id", '- - f { | - - - "x": | - - - 1}', '- f {"x":1}'),
    ("the name with each piece", "- - f { | - - f }", "- f {}"),
    ("two names without index and id", "- - f {} | - - g { | - - - }", "- f {} | - g {}"),
    ("one name twice with complete arguments", "- - f {} | - - f {}", "- f {} | - f {}"),
    ("API Gemini: complete calls without index", "- a f {} | - b g {}", "a f {} | b g {}"),
    ("server Ollama: all calls have index 0", "0 a f {} | 0 b g {}", "a f {} | b g {}"),
    ("server Ollama: index 0, and one function", "0 a f {} | 0 b f {}", "a f {} | b f {}"),
    ("server vLLM: the id and the name again", "0 a f { | 0 a f }", "a f {}"),
    ("gateway LiteLLM: the first index is 1", "1 a f { | 1 - - }", "a f {}"),
)
#: Deltas, the field of the message to which they add up, and its value.
OTHER_FIELDS = (
    ([{"reasoning": "Let "}, {"reasoning": "me see"}], "reasoning", "Let me see"),
    ([{"reasoning_content": "a"}, {"reasoning_content": "b"}], "reasoning_content", "ab"),
    ([{"role": "assistant", "refusal": "I "}, {"refusal": "cannot"}], "refusal", "I cannot"),
    ([{"annotations": [1]}, {"annotations": [2]}], "annotations", [1, 2]),
    ([{"new": "x"}, {"new": "y"}], "new", "y"),
    ([{"audio": {"data": "Q"}}, {"audio": {"data": "U"}}], "audio", {"data": "QU"}),
)
#: Events of unexpected shapes: each of them is a chunk or an error.
ODD_EVENTS = (
    delta(tool_calls=[{"content": "x", "tool_calls": [{"content": "x", "tool_calls": [{}]}]}]),
    *("null", "5", '"text"', "[]", "{", "[" * 100_000, "9" * 5000, "NaN", "}", "{}"),
    *({"choices": odd} for odd in (5, "x", {"0": 1}, [None], [5], [[]])),
    *({"choices": [{"index": odd}]} for odd in ("0", -1, 1.5, [], {}, True)),
    *({"choices": [{"delta": odd}]} for odd in (5, "x", [1])),
    *({"choices": [{"message": odd}]} for odd in (5, "x", [1], {"content": 5})),
    *(whole("x", None, odd) for odd in (5, [{"text": "x"}])),
    *(delta(**{name: 5}) for name in ("content", "role", "reasoning", "refusal")),
    *(delta(tool_calls=odd) for odd in (5, "x", {"a": 1}, [None], [5], [{"index": []}])),
    *(delta(tool_calls=[{"function": odd}]) for odd in (5, "x", [], None)),
    *({name: odd} for name in ("usage", "lowrouter", "error", "id") for odd in (5, [1], "x")),
    '{"choices": [{"delta": {"deep": %s1%s}}]}' % ('{"a": ' * 900, "}" * 900),
    '{"choices": [{"delta": {"deep": %s1%s}}]}' % ("[" * 900, "]" * 900),
    '{"deep": %s1%s}' % ('{"a": ' * 900, "}" * 900),
)


def tool_call_piece(words, empty):
    """A piece of a row of TOOL_CALLS. What it lacks is `empty`; if that is "-", it is left out."""
    index, call_id, name, arguments = words.split()
    piece = {"id": call_id, "function": {"name": name, "arguments": arguments}}
    if index != "-":
        piece["index"] = int(index)
    for fields in (piece, piece["function"]):
        for field, value in list(fields.items()):
            if value == "-":
                fields[field] = empty
            if fields[field] == "-":
                del fields[field]
    return piece


def text_part(text):
    return [{"type": "text", "text": text}]


class TestAssembly(Case):
    def test_tool_calls_are_assembled_from_their_pieces(self):
        for name, items, expected in TOOL_CALLS:
            items = items.split(" | ")
            for empty in ("-", None, ""):
                pieces = [tool_call_piece(item, empty) for item in items]
                one_by_one = [delta(tool_calls=[piece]) for piece in pieces]
                for events in (one_by_one, [delta(tool_calls=pieces)]):
                    with self.subTest(name, empty=empty, events=len(events)):
                        self.assertEqual(self.calls_of(events), expected)

    def calls_of(self, events):
        """The assembled tool calls in the form that they have in TOOL_CALLS."""
        answer = self.stream(sse(*events, delta(None, "tool_calls"))).result()
        self.assertEqual((answer.text, answer.finish_reason), ("", "tool_calls"))
        calls = []
        for call in answer.tool_calls:
            self.assertNotIn("index", call)  # strict servers refuse it in a message
            function = call["function"]
            calls.append(f"{call.get('id') or '-'} {function['name']} {function['arguments']}")
        return " | ".join(calls)

    def test_odd_pieces_of_a_tool_call_do_not_begin_another_call(self):
        call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
        signature = {"extra_content": {"google": {"thought_signature": "s"}}}  # Gemini's
        for calls in ([None, call, 5], [call, signature]):
            repeated = {"choices": [{"index": 0, "message": {"tool_calls": [call]}}]}
            self.assertEqual(self.calls_of([delta(tool_calls=calls), repeated]), "a f {}")
        ids = [tool_call_piece(item, "-") for item in ("0 a f -", "0 b - {", "0 c - }")]  # Poolside
        self.assertRegex(self.calls_of([delta(tool_calls=ids)]), "^[abc] f {}$")

    def test_arguments_that_are_objects_stay_objects(self):  # Ollama
        pieces = [{"function": {"name": name, "arguments": {"a": 1}}} for name in "fg"]
        for events in ([delta(tool_calls=[piece]) for piece in pieces], [delta(tool_calls=pieces)]):
            self.assertEqual(self.stream(sse(*events)).result().tool_calls, pieces)

    def test_the_input_of_a_custom_tool_grows(self):
        pieces = [{"index": 0, "custom": {"input": text}} for text in ("pri", "nt")]
        events = [delta(tool_calls=[piece]) for piece in pieces]
        answer = self.stream(sse(*events)).result()
        self.assertEqual(answer.tool_calls, [{"custom": {"input": "print"}}])

    def test_other_fields_of_a_delta_are_kept(self):
        for deltas, name, expected in OTHER_FIELDS:
            with self.subTest(name):
                events = [delta(**each) for each in deltas]
                answer = self.stream(sse(*events, delta("a"), delta("b", "stop"))).result()
                self.assertEqual(answer.message[name], expected)
                self.assertEqual((answer.text, answer.message["role"]), ("ab", "assistant"))
                self.assertEqual(answer.reasoning, expected if "reasoning" in name else "")

    def test_texts_and_lists_of_parts_can_be_mixed(self):
        thought = [{"type": "thinking", "thinking": text_part("hm")}]
        image = [{"type": "image_url"}]
        for contents, text, expected in (
            ([text_part("a"), "b"], "ab", text_part("a") + text_part("b")),
            (["a", text_part("b")], "ab", text_part("a") + text_part("b")),
            ([text_part("a"), None, ""], "a", text_part("a")),
            ([thought, "4", "2"], "42", thought + text_part("42")),
            (["a", image, "b"], "ab", text_part("a") + image + text_part("b")),
            ([text_part("a"), 5, "b"], "ab", text_part("a") + text_part("b")),  # 5 is not a text
        ):
            for field, texts in (("content", (text, "")), ("reasoning", ("", text))):
                with self.subTest(contents=contents, field=field):
                    stream = self.stream(sse(*(delta(**{field: each}) for each in contents)))
                    self.assertEqual("".join(chunk.text for chunk in stream), texts[0])
                    self.assertEqual(stream.result().message[field], expected)
                    self.assertEqual((stream.result().text, stream.result().reasoning), texts)

    def test_a_surrogate_pair_can_be_split_between_two_chunks(self):
        """Servers in Java and JavaScript cut texts between UTF-16 units."""
        for field in ("content", "reasoning"):
            texts = (r"a\ud83d", r"\ude00b\ud83d", "", r"\ude00")
            events = ['{"choices": [{"delta": {"%s": "%s"}}]}' % (field, text) for text in texts]
            stream = self.stream(sse(*events))
            texts = [chunk.text for chunk in stream]
            self.assertEqual(stream.completion.message[field], "a\U0001f600b\U0001f600")
            self.assertEqual("".join(texts), stream.completion.text)
            "|".join(texts).encode("utf-8")  # raises if a chunk ends with half a pair

    def test_other_fields_of_a_choice_are_kept(self):
        text = {"delta": {"content": "a"}}
        for choice in ({"index": 0, **text}, text, {"index": 0}):
            with self.subTest(choice):
                logprobs = [{"logprobs": {"content": [token]}} for token in "xyz"]
                events = [{"choices": [{**choice, **each}]} for each in logprobs]
                answer = self.stream(sse(*events, delta("b", "stop"))).result()
                self.assertEqual(answer["choices"][0]["logprobs"], {"content": ["x", "y", "z"]})

    def test_choices_are_kept_apart(self):
        both = {"choices": [{"delta": {"content": text}} for text in "?!"]}  # known by their place
        events = [delta("b", index=1), delta("a"), both, delta("y", "stop", 1), delta("x", "stop")]
        stream = self.stream(sse(*events, done=False))
        self.assertEqual([chunk.text for chunk in stream], ["", "a", "?", "", "x"])
        answer = stream.result()
        choices = [(each["index"], each["message"]["content"]) for each in answer["choices"]]
        self.assertEqual((choices, answer.text), ([(0, "a?x"), (1, "b!y")], "a?x"))
        self.assertEqual([each["finish_reason"] for each in answer["choices"]], ["stop", "stop"])

    def test_usage_and_the_lowrouter_block_can_arrive_anywhere(self):
        usage = {"total_tokens": 3}
        eco = {"energy_wh": 0.1, "accuracy": "medium"}
        early = {**delta("a"), "usage": None, "lowrouter": {"generation_id": "gen_1"}}
        late = {"choices": [], "usage": usage, "lowrouter": {"region": "eu-west", "eco": eco}}
        head = stream_head(X_LowRouter_Region="EU-WEST", X_LowRouter_Provider="openai")
        last = {**delta("b", "stop"), "usage": None}
        for events in ([early, last, late], [early, late, last]):
            self.stub.play(head + chunked(sse(*events, done=False)))
            answer = self.client().stream("Hi").result()
            self.assertEqual((answer.text, answer.usage, answer.eco), ("ab", usage, eco))
            route = {"region": "eu-west", "provider": "openai"}
            self.assertEqual(answer["lowrouter"], {"generation_id": "gen_1", "eco": eco, **route})

    def test_an_empty_value_does_not_erase_an_earlier_one(self):
        fields = {"id": "c1", "model": "m", "usage": {"total_tokens": 3}}
        block = {"region": "eu-west", "provider": "", "eco": {"energy_wh": 1}, "note": None}
        events = (
            {**delta("a", "stop"), **fields, "lowrouter": block},
            {**delta(), **dict.fromkeys(fields, ""), "lowrouter": dict.fromkeys(block)},
            {"choices": [], **dict.fromkeys(fields), "new": None},
            {"choices": [], "usage": {}, "lowrouter": {"eco": {}}},
        )
        self.stub.play(stream_head(X_LowRouter_Provider="openai ") + chunked(sse(*events)))
        answer = self.client().stream("Hi").result()
        self.assertEqual({name: answer[name] for name in fields}, fields)
        self.assertEqual((answer.region, answer.provider), ("eu-west", "openai"))
        self.assertEqual(answer.eco, {"energy_wh": 1})
        self.assertEqual((answer["new"], answer["lowrouter"]["note"]), (None, None))

    def test_a_chunk_is_exactly_what_arrived_even_if_it_adds_no_text(self):
        call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
        silent = [delta(tool_calls=[], tags=[]), delta(tool_calls=[call], tags=["x"]), {}]
        silent += [{"choices": odd} for odd in (None, [], [None], [{"index": 0}])]
        silent += [{"choices": [{"index": 0, "delta": odd}]} for odd in (None, {"content": None})]
        silent += [{"lowrouter": None, "usage": None}, {"lowrouter": "x", "usage": []}]
        silent += [{"lowrouter": {"region": None, "eco": None}}, {"unknown": {"a": 1}}]
        stream = self.stream(sse(delta("a"), *silent, "null", delta("b", "stop")))
        chunks = list(stream)
        self.assertEqual((chunks[1:-1], type(chunks[0])), (silent, lowrouter.Chunk))
        self.assertEqual(chunks[0].headers["Content-Type"], "text/event-stream")
        self.assertEqual((stream.result().text, stream.result()["unknown"]), ("ab", {"a": 1}))

    def test_events_of_any_shape_are_chunks_or_an_error(self):
        client = self.client()
        for data in ODD_EVENTS:
            with self.subTest(repr(data)[:60]):
                self.stub.play(event_stream(delta("a"), data, delta("b", "stop")))
                stream = client.stream("Hi")
                texts = []
                with contextlib.suppress(lowrouter.StreamError):
                    texts.extend(chunk.text for chunk in stream)
                self.assertEqual(stream.completion.text, "".join(texts))
                json.dumps(stream.completion)  # raises if it is not plain data


# ---- routes -------------------------------------------------------------------------------------

EU = {"region": "eu-west"}
EU_HEADER = {"X-LowRouter-Region": "eu-west"}
#: Settings of a client with a pin that the stub's answer() keeps, and "us-east", "mistral" do not.
PINNED = (
    {"route": EU},
    {"route": {"region": "EU-West "}},
    {"route": {"provider": "openai"}},
    {"route": {"region": "eu-west", "provider": "OpenAI"}},
    {"route": {"region": "us-west", "provider": "openai", "fallback": True}},
    {"headers": {"x-lowrouter-region": "eu-west"}},
    {"headers": EU_HEADER, "route": {"region": None}},
    {"headers": {"X-LowRouter-Region": "us-west"}, "route": EU},
)
NOT_PINNED = (
    {},
    {"route": {}},
    {"route": {"region": None, "provider": None, "fallback": False, "prefer_low_carbon": True}},
    {"route": {"region": "eu-west", "fallback": True}},
    {"headers": EU_HEADER, "route": {"fallback": True}},
)
ELSEWHERE = {"region": "us-east", "provider": "mistral"}
ELSEWHERE_HEADERS = {"X_LowRouter_Region": "us-east", "X_LowRouter_Provider": "mistral"}


class TestRoutes(Case):
    def stream_of(self, settings, *events, done=True, end=True, head=STREAM_HEAD):
        """The stream that a client with these settings gets."""
        cut = [] if end else [CUT]
        self.stub.play(head + chunked(sse(*events, done=done), end=end), *cut)
        return self.client(**settings).stream("Hi")

    def json_stream(self, settings, body):
        """The result of a stream() that is answered with JSON."""
        self.stub.play(body)
        return self.client(**settings).stream("Hi").result()

    def mismatch(self, call, *args, **options):
        return self.error(lowrouter.RouteMismatchError, call, *args, **options)

    def test_a_503_is_final_if_the_route_is_pinned(self):
        for settings in (*PINNED, {"route": EU, "verify_route": False}):
            client = self.client(**settings)
            for call in (client.chat, client.stream):
                with self.subTest(settings, call=call.__name__):
                    self.stub.play(reply({"error": REASON}, "503 No", retry_after="1"))
                    error = self.error(lowrouter.NoProviderError, call, "Hi")
                    self.assertEqual((error.status, error.code), (503, "c1"))
                    self.assertEqual((error.pinned, error.completion), (True, None))
        self.assertEqual((len(self.stub.requests), self.waits), (2 * len(PINNED) + 2, []))

    def test_a_503_is_retried_if_the_route_is_not_pinned(self):
        for settings in NOT_PINNED:
            with self.subTest(settings):
                del self.waits[:]
                self.stub.play(reply("", "503 No"), times=3)
                error = self.error(lowrouter.NoProviderError, self.client(**settings).chat, "Hi")
                self.assertEqual((error.pinned, len(self.waits)), (False, 2))

    def assert_accepted(self, settings, block):
        """An answer with this `lowrouter` block, or with its values in the headers, is accepted."""
        headers = {f"X-LowRouter-{name.title()}": value for name, value in block.items()}
        events = [delta("H"), delta("i", "stop")]
        last = {"choices": [], "lowrouter": block}
        self.assertEqual(self.chat(answer("Hi", lowrouter=block), **settings).text, "Hi")
        self.assertEqual(
            self.chat(reply(answer("Hi", lowrouter=None), **headers), **settings).text, "Hi"
        )
        self.assertEqual(self.json_stream(settings, answer("Hi", lowrouter=block)).text, "Hi")
        for stream in (
            self.stream_of(settings, *events, last),
            self.stream_of(settings, *events, last, done=False),
            self.stream_of(settings, *events, head=stream_head(**headers)),
        ):
            self.assertEqual(stream.result().text, "Hi")

    def test_a_pinned_route_can_be_named_in_the_body_or_in_the_headers(self):
        for settings in PINNED:
            with self.subTest(settings):
                self.assert_accepted(settings, {"region": "EU-west", "provider": "openAI"})

    def test_without_a_pin_any_route_is_accepted(self):
        for settings in (*NOT_PINNED, {"route": EU, "verify_route": False}):
            for block in ({}, ELSEWHERE):
                with self.subTest(settings, block=block):
                    self.assert_accepted(settings, block)

    def test_an_answer_from_another_route_is_an_error_that_holds_the_answer(self):
        elsewhere = answer("Hi", **ELSEWHERE)
        for settings in PINNED:
            for headers in ({}, {"x_lowrouter_region": "eu-west"}):
                with self.subTest(settings, headers=headers):
                    error = self.mismatch(self.chat, reply(elsewhere, **headers), **settings)
                    self.assertEqual((error.completion, error.generation_id), (elsewhere, "gen_1"))
                    self.assertRegex(str(error), "us-east|mistral")
                    self.assertRegex(str(error).lower(), "eu-west|openai")
                    error = self.mismatch(self.json_stream, settings, elsewhere)
                    self.assertEqual(error.completion.text, "Hi")
        error = self.mismatch(
            self.chat, reply(answer("Hi", lowrouter=None), **ELSEWHERE_HEADERS), route=EU
        )
        self.assertEqual(error.completion.text, "Hi")
        self.assertEqual(len(self.stub.requests), 4 * len(PINNED) + 1)

    def test_an_answer_that_names_no_route_is_an_error_that_holds_the_answer(self):
        headers = {"X_LowRouter_Region": "", "X_LowRouter_Provider": " "}
        for settings in PINNED:
            for block in (None, {}, {"region": " ", "provider": None}):
                with self.subTest(settings, block=block):
                    body = answer("Hi", lowrouter=block)
                    error = self.mismatch(self.chat, reply(body, **headers), **settings)
                    self.assertEqual(error.completion, body)
                    self.assertIn("verify_route", str(error))
                    events = [delta("H"), {**delta("i", "stop"), "lowrouter": block}]
                    stream = self.stream_of(settings, *events, head=stream_head(**headers))
                    self.assertEqual([next(stream).text, next(stream).text], ["H", "i"])
                    error = self.mismatch(stream.result)
                    self.assertEqual((error.completion.text, error.retryable), ("Hi", False))
                    self.assertEqual(str(self.mismatch(next, stream)), str(error))
                    error = self.mismatch(self.json_stream, settings, body)
                    self.assertEqual(error.completion.text, "Hi")
        self.mismatch(self.chat, {"choices": [{"message": {"content": "Hi"}}]}, route=EU)
        self.assertEqual(self.waits, [])

    def test_each_pinned_field_must_be_named_and_no_other(self):
        region = answer("Hi", lowrouter={"region": "eu-west"})
        both = {"region": "eu-west", "provider": "openai"}
        self.assertEqual(self.chat(region, route=EU).provider, None)
        self.assertIn("provider", str(self.mismatch(self.chat, region, route=both)))
        self.chat(reply(region, x_lowrouter_provider="openai"), route=both)

    def test_a_stream_from_another_route_is_refused_before_any_text(self):
        head = stream_head(**ELSEWHERE_HEADERS)
        for settings in PINNED:
            with self.subTest(settings):
                error = self.mismatch(self.stream_of, settings, delta("a", "stop"), head=head)
                self.assertIsNone(error.completion)
                self.assertEqual(str(error).count(f":{self.stub.port}"), 1)
                block = {**delta("a"), "lowrouter": ELSEWHERE}
                self.mismatch(next, self.stream_of(settings, block, delta("b", "stop")))

    def test_another_route_in_a_late_event_is_an_error_with_the_partial_text(self):
        late = {"choices": [], "lowrouter": {"generation_id": "gen_9", "region": "us-east"}}
        head = stream_head(X_LowRouter_Region="eu-west")
        for finish in ("stop", None):
            with self.subTest(finish):
                events = [delta("a"), delta("b", finish), late]
                stream = self.stream_of({"route": EU}, *events, head=head)
                self.assertEqual(next(stream).text + next(stream).text, "ab")
                error = self.mismatch(stream.result)
                self.assertEqual((error.completion.text, error.generation_id), ("ab", "gen_9"))

    def test_a_stream_is_verified_only_if_its_answer_is_complete(self):
        for end in (True, False):
            stream = self.stream_of({"route": EU}, delta("a"), done=False, end=end)
            self.assertEqual(self.error(lowrouter.StreamError, stream.result).completion.text, "a")
            stream = self.stream_of({"route": EU}, delta("a", "stop"), done=False, end=end)
            self.assertEqual(self.mismatch(stream.result).completion.text, "a")
        stream = self.stream_of({"route": EU}, delta("a"), {"error": REASON})
        self.assertEqual(self.error(lowrouter.StreamError, stream.result).message, "overloaded")
        with self.stream_of({"route": EU}, delta("a"), delta("b", "stop")) as stream:
            self.assertEqual(next(stream).text, "a")
        self.assertEqual(list(stream), [])  # the caller closed it
        self.error(lowrouter.StreamError, stream.result)

    def test_the_route_of_a_call_replaces_that_of_the_client(self):
        client = self.client(route=EU)
        us = {"region": "us-east"}
        self.stub.play(answer("Hi", region="us-east"), times=3)
        self.assertEqual(client.chat("Hi", route=us).region, "us-east")
        self.mismatch(client.chat, "Hi")
        self.assertEqual(client.chat("Hi", route={**EU, "fallback": True}).region, "us-east")

    def test_request_refuses_another_route_but_not_a_missing_name(self):
        elsewhere = answer("Hi", region="us-east")
        nowhere = answer("Hi", lowrouter=None)
        for settings, body in (({}, {"route": EU}), ({"headers": EU_HEADER}, {"messages": []})):
            call = (self.client(**settings).request, "POST", "/completions", body)
            self.stub.play(reply({"error": "no"}, "503 No", retry_after="0"))
            self.assertTrue(self.error(lowrouter.NoProviderError, *call).pinned)
            for refused in (reply(elsewhere), reply(nowhere, x_lowrouter_region="us-east")):
                self.stub.play(refused)
                self.mismatch(*call)
            for accepted in (answer("Hi"), nowhere, {"data": []}):
                self.stub.play(accepted)
                self.assertEqual(call[0](*call[1:]), accepted)
        self.assertEqual((len(self.stub.requests), self.waits), (12, []))
        self.stub.play(elsewhere)
        client = self.client(headers=EU_HEADER, verify_route=False)
        self.assertEqual(client.request("POST", "/completions", {}), elsewhere)

    def test_the_route_of_models_and_generations_is_not_verified(self):
        for settings in ({"route": EU}, {"headers": EU_HEADER}):
            client = self.client(**settings)
            self.stub.play(reply({"data": [{"id": "m"}]}, **ELSEWHERE_HEADERS))
            self.assertEqual(client.models(), [{"id": "m"}])
            record = {"generation_id": "gen_1", **ELSEWHERE}
            self.stub.play(reply(record, **ELSEWHERE_HEADERS))
            self.assertEqual(client.generation("gen_1"), record)


# ---- connections, time, retries, truncation, the key, TLS, proxies, bounds, threads --------------

SMALL = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "whole"}}]}
BEGUN = event_stream(delta("so far"), done=False, end=False)
HUGE = "x" * (16 << 20)  # more than the buffers of both sides hold
CALLS = {
    "chat": lambda client: client.chat("Hello"),
    "stream": lambda client: client.stream("Hello").result(),
    "models": lambda client: client.models(),
    "generation": lambda client: client.generation("gen_1"),
    "request": lambda client: client.request("GET", "/providers"),
}


def enter(test, manager):
    """Enter a context until the test ends, as enterContext does from Python 3.11 on."""
    value = manager.__enter__()
    test.addCleanup(manager.__exit__, None, None, None)
    return value


def read_upload(sock, pause=None):
    """Read a request as large as HUGE; `pause` is called between its first blocks."""
    size = len(HUGE)  # without the head, so that the client waits for the response at the end
    while size > 0:
        if pause and size > 8 << 20:  # the rest is in our buffers
            pause(0.02)
        size -= len(sock.recv(1 << 18))


def raised(test, kind, call, *args, **options):
    """The error of a call with its frames, which assertRaises would clear."""
    try:
        call(*args, **options)
    except kind as error:
        return error
    return test.fail("no error")


def failed_call(test, kind, call, *steps, **settings):
    """The error of a call, one of CALLS, if the stub plays these steps."""
    test.stub.script.clear()
    test.stub.play(*steps)
    return test.error(kind, CALLS[call], test.client(**settings))


class Contract:  # what must be the same over every transport
    def is_reused(self, call, *steps):
        """Whether the call after this one, which gets these steps, uses the same connection."""
        with self.client(max_retries=0, timeout=5) as client:
            self.stub.play(*steps)
            with contextlib.suppress(lowrouter.LowRouterError):
                call(client)
            before = self.stub.connections
            self.stub.play(answer("next"))
            self.assertEqual(client.chat("Hello").text, "next")
            return self.stub.connections == before

    def test_a_cut_answer_is_an_error_and_closes_the_connection(self):
        until_close = head("200 OK") + json.dumps(SMALL).encode()
        cuts = [reply(SMALL)[:-3], until_close[:-3], reply(SMALL)[:30], b"", BEGUN]
        for cut, end in itertools.product(cuts, (CUT, RESET)):
            with self.subTest(cut[-20:], end=end):
                call = "stream" if cut == BEGUN else "chat"
                self.assertFalse(self.is_reused(CALLS[call], cut, end))
                error = failed_call(self, lowrouter.LowRouterError, call, cut, end, max_retries=0)
                if cut == BEGUN and end == CUT:  # a reset may throw away what was sent before it
                    self.assertEqual(error.completion.text, "so far")

    def test_a_hundred_calls_of_every_kind_use_one_connection(self):
        client = self.client()
        for _ in range(96):
            self.assertEqual(client.chat("Say hello").text, "Hello!")
        name = client.stream("Say hello").result().generation_id
        self.assertEqual(client.generation(name)["generation_id"], name)
        self.assertTrue(client.models() and client.request("GET", "/providers"))
        self.assertEqual((len(self.stub.requests), self.stub.connections), (100, 1))
        self.assertEqual(self.stub.handshakes, 1 if self.stub.context else 0)

    def test_only_a_success_that_is_read_to_its_end_keeps_the_connection(self):
        body = json.dumps(SMALL).encode()
        stream = event_stream(delta("whole", "stop"))
        for is_reused, call, *steps in (
            (True, "chat", reply(SMALL)),
            (True, "chat", head("200 OK", "Transfer-Encoding: chunked") + chunked(body)),
            (True, "stream", stream),
            (True, "stream", reply(sse(delta("whole", "stop")), content_type="text/event-stream")),
            (True, "stream", stream[:-5], stream[-5:]),  # its end in a block of its own
            (True, "request", head("204 No Content")),
            # Many servers close behind an error status without announcing it.
            *((False, call, reply("", "429 Too Many Requests")) for call in CALLS),
            (False, "chat", head("200 OK") + body, CUT),
            (False, "chat", head("302 Found", "Location: /x", "Content-Length: 3") + b"abc"),
            (False, "chat", reply(SMALL, connection="close")),
            (False, "chat", b"HTTP/1.0" + reply(SMALL)[8:], CUT),
            (False, "stream", BEGUN + chunked(sse({"error": {"message": "failed"}}))),
            (False, "stream", stream[:-5], STALL),
            (False, "stream", stream[:-5] + chunked(b"data: 1\n\n")),
        ):
            with self.subTest(steps, call=call), self.takes(0):
                self.assertIs(self.is_reused(CALLS[call], *steps), is_reused)
        for call, *steps in (
            (lambda client: client.chat("Hello", timeout=0.1), STALL),
            (lambda client: client.stream("Hello", timeout=0.1).result(), BEGUN, STALL),
            (lambda client: next(client.stream("Hello")), BEGUN, STALL),
            (lambda client: client.stream("Hello").close(), BEGUN, STALL),
        ):
            with self.subTest(call=call), self.takes(0):
                self.assertFalse(self.is_reused(call, *steps))
        if self.stub.context:  # no request went out in clear text over a new connection
            self.assertEqual(self.stub.handshakes, self.stub.connections)


class TestHttp(Contract, Case):
    def test_an_idle_connection_on_which_something_happened_is_not_used(self):
        smuggled = reply(answer("smuggled"))
        for trouble in (RESET, CUT, smuggled, b"H"):
            with self.subTest(trouble), self.client(max_retries=0) as client:
                go = threading.Event()
                done = threading.Event()
                steps = [answer("first"), Wait(go), trouble, lambda sock, done=done: done.set()]
                self.stub.play(*steps)
                self.assertEqual(client.chat("Hello").text, "first")
                before = self.stub.connections
                go.set()
                self.assertTrue(done.wait(10))
                self.assertEqual(client.chat("Say hello").text, "Hello!")
                self.assertEqual(self.stub.connections, before + 1)
        self.stub.play(reply(answer("first")) + smuggled)  # in the same segment
        client = self.client(max_retries=0)
        self.assertEqual(client.chat("Hello").text, "first")
        self.assertEqual(client.chat("Say hello").text, "Hello!")


class TestHttps(TestHttp, WithCertificates):  # with a private CA
    def setUp(self):
        super().setUp()
        self.stub = self.gateway()

    def client(self, **settings):
        return super().client(**{"ca_file": self.path("ca.pem"), **settings})


class TestHttpsThroughProxy(Contract, WithCertificates):  # which alone can resolve the host name
    def setUp(self):
        super().setUp()
        self.stub = self.gateway()
        self.proxy = enter(self, Peer(tunnels(self.stub.port)))
        enter(self, mock.patch.dict(os.environ, HTTPS_PROXY=self.proxy.url))
        enter(self, only_loopback())
        self.addCleanup(self.check_what_was_visible)

    def check_what_was_visible(self):
        """The proxy saw nothing of the requests, and the gateway nothing for the proxy."""
        seen = b"".join(self.proxy.heads)
        self.assertTrue(seen.startswith(b"CONNECT gateway.test:443 HTTP/1."), seen[:60])
        self.assertNotRegex(seen, KEY.encode() + b"|Bearer|/api/v1")
        for request in self.stub.requests:
            self.assertNotIn("Proxy-Authorization", request.headers)
            self.assertEqual(request.headers["Host"], "gateway.test")
            self.assertTrue(request.path.startswith("/api/v1/"), request.path)

    def client(self, **settings):
        defaults = {"base_url": "https://gateway.test/api/v1", "ca_file": self.path("ca.pem")}
        return super().client(**{**defaults, **settings})


class TestConnections(Case):
    def count_open(self, expected):
        """How many connections the stub has, once they are as expected, or after 5 seconds."""
        end = time.monotonic() + 5
        while len(self.stub.server.open) != expected and time.monotonic() < end:
            threading.Event().wait(0.01)
        return len(self.stub.server.open)

    def open_streams(self, client, number):
        """Use so many connections at once, and give all of them back."""
        for stream in [client.stream("Hello") for _ in range(number)]:
            stream.result()
        self.assertEqual(self.count_open(number), number)

    def test_a_connection_sends_keep_alives_if_the_system_can(self):
        options = {}

        def record(sock, level, name, value):
            options[level, name] = value

        with mock.patch("socket.socket.setsockopt", record):
            self.client().chat("Hello")
        self.assertTrue(options[socket.SOL_SOCKET, socket.SO_KEEPALIVE])
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE"):
            if hasattr(socket, name):  # NAT gateways forget a silent connection after 240 s
                seconds = options[socket.IPPROTO_TCP, getattr(socket, name)]
                self.assertIn(seconds, range(1, 121), name)
        with Peer(drips(reply(SMALL), b"")) as peer:
            with mock.patch("socket.socket.setsockopt", side_effect=OSError("unknown")):
                self.assertEqual(self.client(base_url=peer.url).chat("Hello").text, "whole")

    def test_a_connection_that_was_idle_for_long_by_either_clock_is_dropped(self):
        # The monotonic clock stands still while a Lambda function is frozen.
        for clock, real in (("time.time", time.time), ("time.monotonic", time.monotonic)):
            for late, connections in ((10, 1), (55, 2), (-3600, 1)):
                with self.subTest(clock, late=late), StubGateway() as stub:
                    client = self.client(base_url=stub.url)
                    client.chat("Hello")
                    with mock.patch(clock, lambda real=real, late=late: real() + late):
                        client.chat("Hello")
                    self.assertEqual(stub.connections, connections)

    def test_connections_that_stay_unused_after_a_peak_are_closed(self):
        client = self.client()
        real = time.monotonic
        self.open_streams(client, 40)
        last = self.stub.requests[-1].connection
        for late in (20, 40):  # calls that need one connection only
            with mock.patch("time.monotonic", lambda late=late: real() + late):
                client.chat("Hello")
            self.assertEqual(self.stub.requests[-1].connection, last)
        self.assertEqual(self.count_open(1), 1)

    def test_closing_or_dropping_a_client_closes_its_connections(self):
        client = lowrouter.Client(KEY, base_url=self.stub.url)
        self.open_streams(client, 5)
        client = None
        gc.collect()  # a ResourceWarning would be noticed by setUp() of Case
        self.assertEqual(self.count_open(0), 0)
        with self.client() as client:
            client.chat("Hello")
            stream = client.stream("Say hello")
            self.assertEqual(self.count_open(1), 1)
        self.assertEqual(stream.result().text, "Hello!")  # what is open goes on, and is not kept
        self.assertEqual(self.count_open(0), 0)

    def test_a_lost_kept_connection_is_replaced_once_if_nothing_can_be_billed(self):
        client = self.client(max_retries=0)
        client.chat("Hello")
        self.stub.play(CUT)
        self.assertTrue(client.request("GET", "/models"))
        self.stub.play(CUT, times=2)
        self.error(lowrouter.APIConnectionError, client.request, "GET", "/models")
        self.assertEqual((len(self.stub.requests), self.waits), (5, []))
        client.chat("Hello")
        self.stub.play(b"HTTP/1.1 200 OK\r\nA:", CUT)  # the answer has begun
        self.error(lowrouter.APIConnectionError, client.request, "GET", "/models")
        self.assertEqual(len(self.stub.requests), 7)

    def test_an_upload_that_breaks_off_is_sent_again(self):
        def serve(peer, sock):
            if len(peer.sockets) == 1:
                read_request(sock)
                sock.sendall(reply(answer("first")))
            if len(peer.sockets) < 3:
                sock.recv(1000)
                reset(sock)
                return
            read_upload(sock)
            sock.sendall(reply(answer("second")))

        with Peer(serve) as peer:
            client = self.client(base_url=peer.url, max_retries=1)
            self.assertEqual(client.chat("Hello").text, "first")
            self.assertEqual(client.chat(HUGE).text, "second")
            # The kept connection was replaced at once, and the second one after a wait.
            self.assertEqual((len(peer.sockets), len(self.waits)), (3, 1))

    def test_64_threads_get_the_answers_to_their_questions(self):
        def ask(number):
            question = f"{'ask' if number % 10 else 'fail'} {number}"
            try:
                return client.chat(question).text == question
            except lowrouter.APIStatusError as error:
                return question.startswith("fail") and question in repr(error.body)

        with Peer(echo) as peer:
            client = self.client(base_url=peer.url, max_retries=0)
            with concurrent.futures.ThreadPoolExecutor(64) as pool:
                self.assertEqual(set(pool.map(ask, range(1500))), {True})
            self.assertEqual(len({question for _, question in peer.heads}), 1500)
            self.assertLessEqual(len(peer.sockets), 64 + 150)  # an error ends a connection

    @unittest.skipUnless(hasattr(signal, "pthread_kill"), "signals are sent differently here")
    def test_after_a_ctrl_c_the_next_call_has_the_right_answer(self):
        main = threading.main_thread().ident
        for call, start in (("stream", BEGUN), ("chat", b"")):
            with self.subTest(call):
                left = threading.Event()

                def interrupt(sock, left=left):
                    threading.Event().wait(0.05)  # so that the client waits for more
                    signal.pthread_kill(main, signal.SIGINT)
                    if sock.recv(1) == b"":
                        left.set()  # the gateway need not go on for nobody

                client = self.client()
                client.chat("Hello")
                before = self.stub.connections
                self.stub.play(start, interrupt)
                self.assertRaises(KeyboardInterrupt, CALLS[call], client)
                self.assertTrue(left.wait(5))
                for _ in range(3):
                    self.assertEqual(client.chat("Say hello").text, "Hello!")
                self.assertEqual(self.stub.connections, before + 1)


class TestTime(Case):
    def assert_times_out(self, phase, seconds, call, *args, **options):
        """The call must raise a time-out that names its phase and the setting to change."""
        with self.takes(seconds):
            error = self.error(lowrouter.APITimeoutError, call, *args, **options)
        self.assertEqual(error.phase, phase)
        setting = {"connect": "base URL", "deadline": "deadline"}.get(phase, "timeout")
        self.assertIn(setting, str(error))
        return error

    @unittest.skipUnless(sys.platform == "linux", "a full backlog drops connections on Linux")
    def test_the_addresses_of_a_name_are_tried_in_turn_and_share_the_time(self):
        def chat(*addresses, pause=0, **limits):
            """Call a gateway whose name has these addresses, and takes so long to look up."""
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in addresses]
            resolve = mock.Mock(side_effect=lambda *args: threading.Event().wait(pause) or found)
            enter(self, mock.patch("socket.getaddrinfo", resolve))
            settings = {"base_url": "http://x.invalid/api/v1", "allow_http": True, **limits}
            return self.client(max_retries=0, **settings).chat("Say hello").text

        live = self.stub.server.server_address[:2]
        listener = enter(self, socket.create_server(("127.0.0.1", 0), backlog=0))
        dead = listener.getsockname()
        for _ in range(4):  # fill its backlog, so that it accepts no more connections
            sock = enter(self, socket.socket())
            sock.setblocking(False)
            sock.connect_ex(dead)
        for addresses, seconds in (([dead, live], 0.15), ([dead, dead, live], 0.225)):
            with self.subTest(addresses), self.takes(seconds):
                self.assertEqual(chat(*addresses, timeout=0.3), "Hello!")
        with self.takes(0.4):  # the lookup takes no time from the rest
            self.assertEqual(chat(live, dead, dead, pause=0.4, timeout=0.3), "Hello!")
        for addresses in ([dead], [dead] * 4):
            self.assert_times_out("connect", 0.1, chat, *addresses, timeout=0.1)
            self.assert_times_out("deadline", 0.1, chat, *addresses, deadline=0.1)
        self.assertIn("x.invalid", str(self.error(lowrouter.APIConnectionError, chat)))

    def test_a_handshake_or_a_proxy_that_is_silent_or_drips_is_left_in_time(self):
        ok = b"HTTP/1.1 200 OK\r\n"
        table = [(False, never_answers), (False, drips(b"\x16\x03\x03\x3f\x00", b"\x02"))]
        table += [(True, never_answers), (True, drips(ok + b"X: ", b"x"))]
        table += [(True, drips(ok, b"X: 1\r\n")), (True, drips(b"", head("100 Continue")))]
        table += [(True, drips(head("200 OK"), b""))]
        table = [(0.1, *row) for row in table]
        # The proxy takes 0.3 of the 0.5 seconds that TCP, CONNECT and TLS have together.
        for timeout, proxied, serve in [*table, (0.5, True, drips(b"", head("200 OK"), 0.3))]:
            with self.subTest(serve, proxied=proxied), Peer(serve) as peer:
                url = "https://gateway.test" if proxied else f"https://127.0.0.1:{peer.port}"
                with mock.patch.dict(os.environ, HTTPS_PROXY=peer.url):
                    client = self.client(base_url=url, timeout=timeout, max_retries=0)
                error = self.assert_times_out("connect", timeout, client.chat, "Hello")
                self.assertIn(f"127.0.0.1:{peer.port}", str(error))

    def test_connecting_and_error_bodies_have_limits_of_their_own(self):
        refusal = head("401 Unauthorized", "Transfer-Encoding: chunked")
        drip = Drip(chunked(b"x", end=False), 0.02)
        kind = lowrouter.AuthenticationError
        for end in (STALL, drip):
            with self.subTest(end), self.takes(0.1):
                failed_call(self, kind, "stream", refusal, end, deadline=0.1)
        real = time.monotonic  # 50 times as fast for the client, but not for Event.wait
        now = real()
        enter(self, mock.patch("time.monotonic", lambda: now + 50 * (real() - now)))
        with Peer(drips(b"HTTP/1.1 200 OK\r\nX: ", b"x")) as peer:
            with mock.patch.dict(os.environ, HTTPS_PROXY=peer.url):
                client = self.client(base_url="https://gateway.test", max_retries=0)
            start = time.monotonic()
            error = self.error(lowrouter.APITimeoutError, client.chat, "Hello")
            self.assertEqual(error.phase, "connect")
            self.assertTrue(8 < time.monotonic() - start < 60)
        start = time.monotonic()
        failed_call(self, kind, "chat", refusal, drip)
        self.assertLess(time.monotonic() - start, 60)
        self.stub.play(lambda sock: self.stub.hold.wait(0.5), reply(SMALL))  # after 25 seconds
        self.assertEqual(self.client().chat("Hello").text, "whole")

    def test_an_upload_may_take_longer_than_the_timeout_while_it_makes_progress(self):
        def serve(peer, sock):
            read_upload(sock, pause=peer.stop.wait)
            sock.sendall(reply(SMALL))

        with Peer(serve) as peer:
            client = self.client(base_url=peer.url, timeout=0.4, max_retries=0)
            self.assertEqual(client.chat(HUGE).text, "whole")
        for name, limits in (("response", {"timeout": 0.1}), ("deadline", {"deadline": 0.1})):
            # This server answers the first request, and does not read the second one.
            with self.subTest(name), Peer(drips(reply(SMALL), b"")) as peer:
                client = self.client(base_url=peer.url, max_retries=0)
                self.assertEqual(client.chat("Hello").text, "whole")
                self.assert_times_out(name, 0.1, client.chat, HUGE, **limits)
                self.assertEqual(len(peer.sockets), 1)

    def test_a_refusal_before_the_end_of_the_upload_is_seen(self):
        def drain(sock):  # as nginx does, because closing at once would reset the connection
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass

        def serve(peer, sock):
            sock.recv(1000)
            sock.sendall(reply({"error": {"message": "too long"}}, "413 Too Large"))
            if end:
                end(sock)

        # Elsewhere than on Linux, just closing may reset the connection too.
        for end, is_seen in ((drain, True), (None, sys.platform == "linux"), (reset, False)):
            with self.subTest(end), Peer(serve) as peer, self.takes(0):
                client = self.client(base_url=peer.url, max_retries=0)
                error = self.error(lowrouter.LowRouterError, client.chat, HUGE)
                if is_seen:
                    self.assertEqual((error.status, error.message), (413, "too long"))
                self.assertEqual(len(peer.sockets), 1)

    def test_silence_and_noise_end_at_the_limits(self):
        """Any byte of a JSON body ends a silence, but in a stream only an event with data does."""
        ok = b"HTTP/1.1 200 OK\r\n"
        body = reply(SMALL)[:-5]
        noises = [chunked(each, end=False) for each in (b": ping\n\n", b"event: x\n\n", b"data: ")]
        for phase, call, partial, *steps in (
            ("response", "chat", "", STALL),
            ("deadline", "chat", "", STALL),
            ("response", "chat", "", ok, Drip(b"X: 1\r\n", 0.02)),
            ("response", "chat", "", ok, b"X: ", Drip(b"x", 0.02)),
            ("response", "chat", "", Drip(head("100 Continue"), 0.02)),
            ("deadline", "chat", "", head("200 OK"), Drip(b" ", 0.02)),
            ("idle", "chat", "whole", body, STALL),
            ("idle", "stream", "so far", BEGUN, STALL),
            ("deadline", "stream", "so far", BEGUN, STALL),
            *(("idle", "stream", "so far", BEGUN, Drip(each, 0.02)) for each in (*noises, b"5")),
        ):
            limit = "deadline" if phase == "deadline" else "timeout"
            with self.subTest(steps, limit=limit):
                self.stub.play(*steps)
                client = self.client(max_retries=0, **{limit: 0.1})
                error = self.assert_times_out(phase, 0.1, CALLS[call], client)
                found = error.completion.text if call == "stream" else error.body
                self.assertIn(partial, found or "")
        with self.takes(0):  # newer versions of Python give up before the timeout
            drip = Drip(head("100 Continue") * 1000, 0)
            failed_call(self, lowrouter.LowRouterError, "chat", drip, max_retries=0, timeout=0.2)

    def test_a_slow_answer_may_take_longer_than_the_timeout(self):
        text = json.dumps(SMALL).encode()
        start = head("200 OK", f"Content-Length: {len(text) + 6}")
        self.stub.play(head("100 Continue") * 2 + start, Drip(b" ", 0.05, 6), text)
        self.assertEqual(self.client(timeout=0.25, max_retries=0).chat("Hello").text, "whole")
        for event, text in ((delta("x"), "xxxxxx!"), ({}, "!")):
            with self.subTest(event):
                block = chunked(sse(event, done=False), end=False)
                self.stub.play(STREAM_HEAD, Drip(block, 0.05, 6), chunked(sse(delta("!", "stop"))))
                self.assertEqual(self.client(timeout=0.25).stream("Hello").result().text, text)

    def test_only_the_deadline_runs_while_the_caller_holds_a_chunk(self):
        held = threading.Event()
        self.stub.play(BEGUN, Wait(held), chunked(sse(delta("!", "stop"))), times=2)
        streams = [self.client(**{each: 0.2}).stream("Hello") for each in ("timeout", "deadline")]
        for stream in streams:
            next(stream)
        threading.Event().wait(0.3)  # the caller is busy
        self.assert_times_out("deadline", 0, streams[1].result)
        held.set()
        self.assertEqual(streams[0].result().text, "so far!")

    def test_a_deadline_that_has_passed_is_a_timeout_before_anything_is_looked_up(self):
        enter(self, mock.patch("socket.getaddrinfo", side_effect=AssertionError))
        for deadline, name in itertools.product((0, -0.5, -1e9), CALLS):
            with self.subTest(name, deadline=deadline):
                self.assert_times_out("deadline", 0, CALLS[name], self.client(deadline=deadline))
        self.assert_times_out("deadline", 0, self.client().stream, "Hello", deadline=0)

    def test_the_deadline_bounds_all_attempts_and_waits_together(self):
        self.stub.play(Drip(head("100 Continue"), 0.05, 2), reply("", "500 Oops", retry_after="0"))
        self.stub.play(STALL)
        client = self.client(timeout=60, deadline=0.3)
        self.assert_times_out("deadline", 0.3, client.chat, "Hello")
        self.assertEqual(len(self.stub.requests), 2)

    def test_invalid_timeouts_and_deadlines_are_refused(self):
        table = list(itertools.product(("timeout", "deadline"), ("5", True, float("nan"))))
        for name, value in (*table, ("timeout", 0), ("timeout", -1), ("deadline", float("inf"))):
            for call, *args in ((self.client,), (self.client().chat, "Hello")):
                error = self.error(lowrouter.ConfigError, call, *args, **{name: value})
                self.assertIn(name, str(error))


class TestRetries(Case):
    def attempts(self, *steps, call="chat", kept=False, **settings):
        """How often a call is sent if each attempt gets these steps, and its error."""
        client = self.client(**settings)
        self.waits.clear()
        self.stub.script.clear()
        if kept:
            client.chat("Hello")
        before = len(self.stub.requests)
        self.stub.play(*steps, times=8)
        error = self.error(lowrouter.LowRouterError, CALLS[call], client)
        return len(self.stub.requests) - before, error

    def test_which_statuses_are_retried(self):
        expected = dict.fromkeys((408, 409, 429, 500, 502, 503, 521, 522, 529, 599), (3, 3))
        expected.update(dict.fromkeys((400, 401, 402, 403, 404, 413, 422, 451, 501, 505), (1, 1)))
        expected.update(dict.fromkeys((504, 520, 524), (1, 3)))  # a POST may have been billed
        for status, call in itertools.product(expected, ("chat", "stream", "models")):
            post, get = expected[status]
            sent = get if call == "models" else post
            with self.subTest(status, call=call):
                attempts, error = self.attempts(reply({"error": "no"}, f"{status} No"), call=call)
                self.assertEqual((attempts, error.status), (sent, status))
                self.assertEqual((len(self.waits), error.retryable), (sent - 1, sent == 3))
                self.assertEqual("billed" in str(error), sent != get)
        for status in ("429 Slow", "500 Oops"):  # a pin makes only a 503 final
            self.assertEqual(self.attempts(reply("", status), route={"region": "eu-west"})[0], 3)
        first, *others = (request.body for request in self.stub.requests[-3:])
        self.assertEqual(others, [first, first])

    def test_a_request_that_was_not_sent_is_retried(self):
        with only_loopback(), Peer(lambda peer, sock: sock.recv(1000)) as peer:
            hangs_up = f"https://127.0.0.1:{peer.port}"  # in the handshake
            for url in ("http://127.0.0.1:1", "https://gateway.test", hangs_up):
                with self.subTest(url):
                    self.waits.clear()
                    client = self.client(base_url=url)
                    error = self.error(lowrouter.APIConnectionError, client.chat, "Hello")
                    self.assertEqual((len(self.waits), error.retryable), (2, True))
                    self.assertIn(url.split("//")[1], str(error))
                    self.assertNotIn("billed", str(error))
            self.assertEqual(len(peer.sockets), 3)

    def test_a_request_that_was_sent_and_lost_is_retried_only_if_it_is_a_get(self):
        lost = [[CUT], [RESET], [STALL], [b"HTTP/1.1 2", CUT], [b"HTTP/1.1 200 OK\r\nX", CUT]]
        ends = [*lost, [reply(SMALL)[:-4], CUT]]
        calls = {"chat": 1, "stream": 1, "models": 3}
        for steps, call, kept in itertools.product(ends, calls, (False, True)):
            with self.subTest(steps, call=call, kept=kept):
                timeout = 0.05 if STALL in steps else 10
                attempts, error = self.attempts(*steps, call=call, kept=kept, timeout=timeout)
                self.assertEqual(error.retryable, calls[call] == 3)
                self.assertEqual(len(self.waits), calls[call] - 1)
                if not kept or calls[call] == 1:  # a kept one may be replaced at once
                    self.assertEqual(attempts, calls[call])
                if steps in lost or call != "stream":
                    self.assertEqual("billed" in str(error), calls[call] == 1)

    def test_the_waits_double_and_are_shortened_at_random(self):
        longest = [0.5, 1, 2, 4, 8, 8]
        for retries in (0, 1, 6):
            attempts = self.attempts(reply("", "500 No"), max_retries=retries)[0]
            self.assertEqual(attempts, retries + 1)
        for wait, most in zip(self.waits, longest):
            self.assertTrue(most * 0.75 <= wait <= most, self.waits)
        self.assertNotEqual(self.waits, longest)

    def test_retry_after_is_the_wait_up_to_a_minute_and_else_left_to_the_caller(self):
        waits = {"0": 0, " 3 ": 3, "60": 60, "1.5": 1.5, "Fri, 01 Jan 1971 00:00:00 GMT": 0}
        waits.update({" 61 ": 61, "9" * 5000: 1e6, "Fri, 31 Dec 9999 23:59:59 GMT": 1e6})
        for seconds in (30, 7200):
            waits[email.utils.formatdate(time.time() + seconds, usegmt=True)] = seconds
        for value, seconds in waits.items():
            with self.subTest(value[:40]):
                response = reply("", "429 No", retry_after=value)
                attempts, error = self.attempts(response, max_retries=1)
                self.assertAlmostEqual(min(error.retry_after, 1e6), seconds, delta=5)
                self.assertEqual((attempts == 2, error.retryable), (seconds <= 60,) * 2)
                for wait in self.waits:
                    self.assertAlmostEqual(wait, seconds, delta=5 if "GMT" in value else 0)
        invalid = ["", "nan", "inf", "-5", "1e9", "1_0", "soon", "\u0663", "Fri, 99 Foo"]
        for value in [*invalid, "Fri, 31 Dec 99999 23:59:59 GMT"]:
            with self.subTest(value):
                response = reply("", "429 No", retry_after="@").replace(b"@", value.encode())
                attempts, error = self.attempts(response, max_retries=1)
                self.assertEqual((attempts, error.retry_after), (2, None))
                self.assertTrue(0.375 <= self.waits[0] <= 0.5)

    def test_on_retry_is_called_before_each_wait_and_is_a_part_of_it(self):
        calls = []

        def on_retry(error, seconds):
            calls.append((error.status, round(seconds), len(self.waits)))
            threading.Event().wait(0.1)

        for call in ("chat", "stream", "models"):
            with self.subTest(call):
                calls.clear()
                self.waits.clear()
                self.stub.play(reply("", "500 Oops", retry_after="0.05"))
                self.stub.play(reply("", "429 Slow", retry_after="3"))
                CALLS[call](self.client(on_retry=on_retry))
                self.assertEqual(calls, [(500, 0, 0), (429, 3, 1)])
                self.assertEqual(self.waits[0], 0)
                self.assertTrue(2 < self.waits[1] < 2.95, self.waits)

    def test_an_error_after_which_nothing_is_retried_is_raised_at_once(self):
        on_retry = mock.Mock()
        # A wait would end after the deadline.
        for settings in ({"max_retries": 0}, {"route": {"region": "eu-west"}}, {"deadline": 0.3}):
            for headers in ({}, {"retry_after": "5"}):
                with self.subTest(headers, **settings), self.takes(0):
                    refusal = reply("", "503 No", **headers)
                    attempts, error = self.attempts(refusal, on_retry=on_retry, **settings)
                    self.assertEqual((attempts, error.status, self.waits), (1, 503, []))
        on_retry.assert_not_called()

    def test_what_on_retry_raises_ends_the_call_and_reaches_the_caller(self):
        errors = (KeyError("mine"), OSError("mine"), lowrouter.ConfigError("mine"))
        for error, call in itertools.product(errors, CALLS):
            with self.subTest(error, call=call), self.assertRaises(type(error)) as caught:
                self.stub.play(reply("", "500 Oops"))
                CALLS[call](self.client(on_retry=mock.Mock(side_effect=error)))
            self.assertIs(caught.exception, error)
        self.assertEqual((len(self.stub.requests), self.waits), (15, []))


class TestTruncation(Case):
    def cuts(self, content_type, *blocks):
        """Play a response cut after each of its bytes; yield its name, its size and the cut."""
        body = b"".join(blocks)
        kind = "Content-Type: " + content_type
        for name, response in {
            "content-length": head("200 OK", kind, f"Content-Length: {len(body)}") + body,
            "chunked": head("200 OK", kind, "Transfer-Encoding: chunked") + chunked(*blocks),
            "until close": head("200 OK", kind) + body,
        }.items():
            for end in range(len(response) + 1):
                is_framed = name != "until close" and end == len(response)
                self.stub.play(response[:end], *([] if is_framed else [CUT]))
                yield name, len(response), end

    def test_an_answer_cut_after_any_byte_is_complete_or_an_error_with_the_text_so_far(self):
        text = "Hello \u00fc!"
        document = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        choices = [{"delta": {"content": piece}} for piece in ("He", "llo \u00fc!")]
        choices.append({"delta": {}, "finish_reason": "stop"})
        events = [sse({"choices": [choice]}, done=False) for choice in choices]
        events.append(sse({"choices": [], "usage": {"total_tokens": 1}}))
        client = self.client(max_retries=0)
        for kind, read, blocks, cuts in (
            ("application/json", lambda: [client.chat("Hello")], [document[:40], document[40:]], 0),
            ("text/event-stream", lambda: client.stream("Hello"), events, 1),
        ):
            complete = {}
            for name, size, end in self.cuts(kind, *blocks):
                texts = []
                try:
                    texts.extend(item.text for item in read())
                    self.assertEqual("".join(texts), text, (name, end))
                    complete.setdefault(name, []).append(end)
                    self.assertGreater(end, size / 2)
                except lowrouter.LowRouterError as error:
                    partial = error.completion.text if error.completion else ""
                    self.assertEqual(partial, "".join(texts), (name, end))
                    self.assertNotIn("stop", repr(error.completion), (name, end))
            self.assertEqual(len(complete), 3)
            self.assertGreater(min(map(len, complete.values())), cuts)  # after the finish reason

    def test_framing_that_cannot_be_trusted_is_an_error_at_once(self):
        body = json.dumps(SMALL).encode()
        long = "x" * 100000
        length = f"Content-Length: {len(body)}"
        sizes = [b"zz", b"", b"-5", b"f" * 16, b"f" * 100, b"1" * 100000, b"5"]
        ends = [size + b"\r\n" + body + b"\r\n0\r\n\r\n" for size in sizes]
        sized = b"%x\r\n" % len(body) + body + b"\r\n"
        ends += [sized + b"-1\r\n\r\n", sized + b"0000", b"0000", b""]
        in_chunks = head("200 OK", "Transfer-Encoding: chunked")
        responses = [in_chunks + end for end in ends]
        for coding in ("chunked ", "gzip, chunked"):
            responses.append(head("200 OK", "Transfer-Encoding: " + coding) + chunked(body))
        for lines in (["10"], ["999"], ["5", str(len(body))], [f"5\r\nX: {long}"]):
            responses.append(head("200 OK", *("Content-Length: " + each for each in lines)) + body)
        for size in ("-1", "abc", "", "+5"):
            responses.append(head("200 OK", "Content-Length: " + size) + body[:-1])
        odd = ("two", "99 No", "101 No", "2000 OK", "200 " + long, "200 OK" + "\r\nX: 1" * 10000)
        responses += [head(status) + body for status in odd]
        responses += [head("200 OK"), b"\r\n" + head("200 OK"), body, b"", b"SSH-2.0-x\r\n"]
        settings = {"max_retries": 0, "timeout": 5}
        for response, call in itertools.product(responses, ("chat", "stream", "models")):
            with self.subTest(response[:99], call=call), self.takes(0):
                error = failed_call(self, lowrouter.LowRouterError, call, response, CUT, **settings)
                self.assertIsNone(error.completion)
        for end in [*ends, b"5\r\nab"]:
            with self.subTest(end[:99]), self.takes(0):
                error = failed_call(self, lowrouter.StreamError, "stream", BEGUN + end, CUT)
                self.assertEqual(error.completion.text, "so far")
        hidden = [head("200 OK", each, length) for each in ("N\xc3\xa4: x", "no colon", "Name : x")]
        for response in [in_chunks + b"-5\r\n", *hidden]:
            with self.subTest(response), self.takes(0):
                failed_call(self, lowrouter.BadResponseError, "chat", response + body, STALL)

    def test_odd_framing_that_is_clear_is_accepted(self):
        body = json.dumps(SMALL).encode()
        length = f"Content-Length: {len(body)}"
        sized = b"%08x\r\n" % len(body) + body + b"\r\n00000000\r\n\r\n"
        for each in ("no colon", "N\xc3\xa4me: x"):
            self.assertEqual(self.chat(head("200 OK", length, each) + body, CUT), SMALL)
        in_chunks = head("200 OK", "Transfer-Encoding: chunked")
        self.assertEqual(self.chat(in_chunks + sized, CUT), SMALL)


class TestKey(Case):
    def check(self, call, *steps, **settings):
        """Return the error of a call. Neither it nor what on_retry gets may show the key."""
        errors = []
        options = {"max_retries": 1, "on_retry": lambda error, seconds: errors.append(error)}
        client = self.client(**{**options, **settings})
        self.stub.script.clear()
        self.stub.play(*steps, times=3)
        errors.append(raised(self, lowrouter.LowRouterError, CALLS[call], client))
        for error in errors:
            self.assert_key_is_hidden(all_that_shows(error))
        return errors[-1]

    def test_no_error_shows_a_key_that_the_gateway_echoes(self):
        echoed = f"Authorization: Bearer {KEY}"
        quoted = json.dumps({"error": {"message": echoed}})
        escaped = quoted.replace("lr-sk", "\\u006cr-sk")
        event = {"error": {"message": echoed, "code": KEY, "metadata": {KEY: [{"a": KEY}]}}}
        bodies = [event, echoed, quoted, quoted[:-1], quoted + echoed, escaped, {"error": KEY}]
        bodies += [b"\xff" + echoed.encode(), f"<p>{echoed}"]
        responses = [reply(body, status) for body in bodies for status in ("400 Bad", "200 OK")]
        responses += [reply(body, "404 No") for body in (json.dumps(echoed), {"detail": echoed})]
        headers = {"x_request_id": KEY, "x_lowrouter_generation_id": KEY, "retry_after": KEY}
        responses.append(reply("", "400 " + echoed, x=echoed, X=echoed, **headers))
        responses += [reply(event, "429 Slow", retry_after="0"), reply(event, "503 " + KEY)]
        responses.append(head(f"302 {KEY}", f"Location: https://{KEY}/{KEY}", "Content-Length: 0"))
        responses.append(head("302 Found", f"Location: https://{KEY}@x/{KEY}"))
        responses += [head("400 Bad", echoed.replace(":", "")), reply(quoted)[:-2]]
        responses.append(reply(echoed, content_encoding=KEY + " gzip"))
        coding = "Transfer-Encoding: "
        for header in (coding, "Content-Length: ", coding + "chunked\r\n\r\n"):
            responses.append(head("200 OK", header + KEY) + echoed.encode())
        responses += [f"{start}{KEY} OK\r\n\r\n".encode() for start in ("HTTP/1.1 ", "")]
        for response, call in itertools.product([*responses, b""], CALLS):
            with self.subTest(response, call=call):
                self.check(call, response, CUT)
        events = [event, echoed, delta(KEY[:3], finish="error", error=echoed)]
        rests = [chunked(sse(each)) for each in events]
        rests.append(chunked(f"event: error\ndata: {echoed}\n\n".encode()))
        for rest in [*rests, chunked(b'data: {"error": "' + KEY[:30].encode()), KEY.encode()]:
            with self.subTest(rest):
                self.check("stream", BEGUN + rest, CUT)

    def test_the_partial_answer_of_an_error_is_without_the_key(self):
        elsewhere = reply(answer("Hello", region="us-east", echo={KEY: [KEY]}), x_echo=KEY)
        failed = {"choices": [{"message": {"content": KEY}, "finish_reason": "error"}]}
        halves = [delta(KEY[:9]), delta(KEY[9:] + "!", echo=KEY)]
        halves += [delta("see lr-sk-", lowrouter={"generation_id": KEY}), delta(KEY[:30])]
        cut = event_stream(*halves, done=False, end=False)
        calls = {"chat": {elsewhere: "Hello", reply(failed): "[key]"}}
        calls["stream"] = {elsewhere: "Hello", cut: "[key]!see lr-sk-"}
        for call, table in calls.items():
            for response, text in table.items():
                with self.subTest(text, call=call):
                    error = self.check(call, response, CUT, route={"region": "eu-west"})
                    self.assertEqual(error.completion.text, text)
                    self.assert_key_is_hidden(str(error.completion.headers))

    def test_a_key_that_is_cut_or_escaped_is_hidden_too(self):
        for size in range(16, len(KEY), 3):
            self.check("chat", reply('{"error": "' + KEY[:size], "401 No"))
        for length in [*range(20, 320, 28), 65500]:
            text = "x" * length + KEY
            for body, status in ((text, "400 Bad"), (text, "200 OK"), ({"error": text}, "200 OK")):
                self.check("chat", reply(body, status))
            self.check("stream", STREAM_HEAD + chunked(sse(text)))
        key = NEVER_SHOWN + '"\\' + NEVER_SHOWN
        for text in (json.dumps({"error": key})[:-1], "x" + json.dumps({"error": key})):
            for status in ("400 Bad", "200 OK"):
                shown = all_that_shows(self.check("chat", reply(text, status), api_key=key))
                self.assertNotIn(NEVER_SHOWN, shown)
                self.assertIn("[key]", shown)

    def test_errors_of_the_network_and_of_settings_do_not_show_the_key(self):
        for call in CALLS:
            for settings in ({"timeout": 0.05}, {"base_url": "http://127.0.0.1:1"}):
                with self.subTest(call, **settings):
                    self.assertIsNone(self.check(call, STALL, **settings).body)
        for url in (KEY, KEY + "\n", "Bearer " + KEY):
            error = self.error(lowrouter.ConfigError, self.client, base_url=url)
            self.assert_key_is_hidden(str(error))
        for settings in ({"timeout": "x"}, {"headers": {"a b": "c"}}, {"base_url": "ftp://x"}):
            error = raised(self, lowrouter.ConfigError, lowrouter.Client, KEY, **settings)
            self.assert_key_is_hidden(all_that_shows(error))

    def test_a_key_that_occurs_in_ordinary_text_does_not_change_it(self):
        routed = {"X_LowRouter_Region": "eu-west", "X_LowRouter_Generation_ID": "gen_test"}
        settings = {"route": {"region": "eu-west"}}
        for key in ("x", "ed", "key", "test", "west", "chunked", "event-stream", "application"):
            with self.subTest(key=key):
                self.stub.play(stream_head(**routed) + chunked(sse(delta("a", "stop"))))
                completion = self.client(api_key=key, **settings).stream("Hello").result()
                self.assertEqual((completion.text, completion.generation_id), ("a", "gen_test"))
                completion = self.chat(reply(SMALL, **routed), api_key=key, **settings)
                self.assertEqual(completion.region, "eu-west")
        public = "no lr-sk- ed"  # the beginning of every key, and two letters
        refusal = reply({"error": {"message": public}}, "400 Bad", x_hint=public)
        for key in (KEY, "ed"):
            error = failed_call(self, lowrouter.APIStatusError, "chat", refusal, api_key=key)
            self.assertEqual((error.message, error.headers["X-Hint"]), (public, public))

    def test_logs_debug_output_and_audit_hooks_do_not_see_the_key(self):
        script = """
            import http.client, logging, urllib.request
            logging.basicConfig(level=logging.DEBUG)
            http.client.HTTPConnection.debuglevel = 1
            urllib.request.install_opener("which fails if it is used")
            seen = []
            client = lowrouter.Client(sys.argv[2], base_url=sys.argv[3])
            sys.addaudithook(lambda name, details: seen.append((name, repr(details))))
            stream = client.stream("Hello")
            print(client, stream, stream.result(), client.chat("Hello"), client.models())
            found = list(seen)
            print([name for name, details in found if sys.argv[2] in details])
            print({"urllib.Request", "socket.connect"} <= {name for name, details in found})
        """
        output, errors = run_script(self, script, KEY, self.stub.url).communicate(timeout=30)
        self.assert_key_is_hidden(output)
        self.assertEqual((output.splitlines()[-2:], errors), (["[]", "True"], ""))

    def test_redirects_are_refused_and_nothing_is_sent_there(self):
        other = enter(self, StubGateway())
        here = f"127.0.0.1:{self.stub.port}"
        there = f"127.0.0.1:{other.port}"
        targets = {"/elsewhere": "", "file:///etc/passwd": "", "http://[": "", "ftp://x/": "x"}
        targets.update({f"http://{here}/elsewhere": here, f"{other.url}/models": there})
        targets.update({f"//{there}/x": there, f"https://u:{NEVER_SHOWN}@x.test/": "x.test"})
        for call in CALLS:
            for status, target in zip((300, 301, 302, 303, 304, 305, 307, 308), targets):
                with self.subTest(status, target=target, call=call):
                    moved = head(f"{status} Moved", f"Location: {target}", "Content-Length: 0")
                    error = failed_call(self, lowrouter.BadResponseError, call, moved)
                    self.assertRegex(str(error), f"{status}.*{re.escape(targets[target])}")
                    self.assertNotIn(NEVER_SHOWN, str(error))
        failed_call(self, lowrouter.BadResponseError, "models", head("302 No", "Content-Length: 0"))
        self.assertEqual((len(self.stub.requests), other.connections), (41, 0))


class TestTls(WithCertificates):
    NAMES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_parent_and_child_of_a_fork_share_neither_connections_nor_context(self):
        script = """
            import ssl
            contexts = []
            real = ssl.create_default_context
            ssl.create_default_context = lambda **options: contexts.append(1) or real(**options)
            client = lowrouter.Client(sys.argv[2], base_url=sys.argv[3], ca_file=sys.argv[4])
            stream = client.stream("Hello")
            text = next(stream).text
            client.chat("parent")
            child = os.fork()
            name = "parent" if child else "child"
            right = all(client.chat(f"{name} {n}").text.endswith(f"{name} {n}") for n in range(20))
            if not child:
                try:
                    next(stream)
                except lowrouter.StreamError:
                    stream.close()
                    client.close()
                    os._exit(len(contexts) if right else 0)
            status = os.waitpid(child, 0)[1] >> 8
            print("child is done", flush=True)
            client.chat("parent")
            text += "".join(chunk.text for chunk in stream)
            client.close()
            print(right, text, len(contexts), status)
        """
        stub = self.gateway()
        done = threading.Event()
        stub.play(BEGUN, Wait(done), chunked(sse(delta("!", "stop"))))
        process = run_script(self, script, KEY, stub.url, self.path("ca.pem"))
        self.assertEqual(process.stdout.readline(), "child is done\n")
        done.set()
        self.assertEqual(process.communicate(timeout=30), ("True so far! 1 2\n", ""))
        used = set()  # by whom, and the number of the connection
        for request in stub.requests:
            used.add((request.json["messages"][0]["content"].split()[0], request.connection))
        self.assertEqual(sorted(used), [("Hello", 1), ("child", 3), ("parent", 2)])

    def test_the_cas_are_those_of_the_first_setting_that_is_not_empty(self):
        stub = self.gateway()
        ca, stranger, hashed = map(self.path, ("ca.pem", "stranger.pem", "hashed"))
        empty = enter(self, tempfile.TemporaryDirectory())
        missing = os.path.join(empty, "missing")
        folders = [hashed, os.pathsep.join([empty, hashed]), os.pathsep.join([hashed, missing])]
        file, folder, third, fourth = self.NAMES
        trusted = [{name: path} for path in (ca, hashed) for name in ("ca_file", third)]
        trusted += [{folder: path} for path in folders]
        trusted += [{file: ca, third: stranger}, {fourth: ca}, {file: ca, folder: missing}]
        trusted += [{file: "", folder: "", third: "", fourth: ca}, {file: stranger, folder: hashed}]
        trusted += [{"ca_file": ca, file: stranger, fourth: stranger}]
        trusted += [{folder: hashed, third: stranger}, {third: ca, fourth: stranger}]
        refused = [{}, {file: "", folder: ""}, {"ca_file": stranger, file: ca, folder: hashed}]
        refused += [{file: stranger, third: ca}, {folder: empty, fourth: ca}]
        for settings in [*trusted, *refused, {third: stranger, fourth: ca}]:
            variables = dict(settings)
            ca_file = variables.pop("ca_file", None)
            with self.subTest(settings), mock.patch.dict(os.environ, variables):
                client = self.client(base_url=stub.url, ca_file=ca_file)
                if settings in trusted:
                    self.assertEqual(client.chat("Say hello").text, "Hello!")
                    continue
                error = self.error(lowrouter.APIConnectionError, client.chat, "Hello")
                self.assertIn("certificate", str(error))
                self.assertIn(next(iter(settings.values()), ""), str(error))
        # Empty variables leave the CAs of the system, which this makes the private one.
        system = ssl.get_default_verify_paths()._replace(openssl_cafile=ca, openssl_capath=hashed)
        enter(self, mock.patch("ssl.get_default_verify_paths", return_value=system))
        enter(self, mock.patch.dict(os.environ, dict.fromkeys(self.NAMES, "")))
        self.assertEqual(self.client(base_url=stub.url).chat("Say hello").text, "Hello!")

    def test_cas_that_cannot_be_loaded_are_an_error_that_names_them(self):
        stub = self.gateway()
        paths = (self.path("missing.pem"), self.path("garbage.pem"))
        for path, name in itertools.product(paths, self.NAMES):
            with self.subTest(path, name=name), mock.patch.dict(os.environ, {name: path}):
                error = self.error(lowrouter.ConfigError, lowrouter.Client, KEY)
                self.assertIn(path, str(error))
                self.assertIn(name if "missing" in path else "", str(error))
                self.assertEqual(self.client().chat("Say hello").text, "Hello!")  # without TLS
        for ca_file in (*paths, 3):
            error = self.error(lowrouter.ConfigError, lowrouter.Client, KEY, ca_file=ca_file)
            self.assertIn(str(ca_file), str(error))
        self.assertEqual(stub.connections, 0)
        path = shutil.copy(self.path("ca.pem"), self.path("vanishes.pem"))
        client = self.client(base_url=stub.url, ca_file=path)
        os.remove(path)  # it is not missed later
        self.assertEqual(client.chat("Say hello").text, "Hello!")

    def test_nothing_is_sent_to_a_server_without_the_right_certificate(self):
        reasons = {"expired": "expired", "selfsigned": "self.signed", "good": "issuer|self.signed"}
        reasons["wronghost"] = "(?i)hostname mismatch|not valid for"
        for certificate, reason in reasons.items():
            stub = self.gateway(certificate)
            trusted = self.path("stranger.pem" if certificate == "good" else "ca.pem")
            for call in CALLS:
                with self.subTest(certificate, call=call):
                    client = self.client(base_url=stub.url, ca_file=trusted)
                    error = self.error(lowrouter.APIConnectionError, CALLS[call], client)
                    self.assertRegex(str(error), reason)
                    for part in ("localhost", trusted, "SSL_CERT_FILE"):
                        self.assertIn(part, str(error))
                    self.assertNotIn("billed", str(error))
                    self.assertFalse(error.retryable)
            self.assertEqual((stub.requests, stub.connections), ([], len(CALLS)))
        client = self.client(base_url=self.stub.url.replace("http:", "https:"))  # without TLS
        self.error(lowrouter.APIConnectionError, client.chat, "Hello")
        self.assertEqual(self.stub.requests, [])

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "descriptors cannot be counted here")
    def test_no_end_of_a_call_leaks_a_descriptor(self):
        ends = [[reply(SMALL)], [reply("<html>")], [reply("", "500 Oops")], [b"garbage\r\n\r\n"]]
        ends += [[reply(SMALL)[:-1], CUT], [CUT], [STALL], [BEGUN, STALL], [BEGUN, CUT]]
        ends += [[head("302 Found", "Location: http://other.test/")]]
        expired = {"base_url": self.gateway("expired").url, "ca_file": self.path("ca.pem")}
        self.stub.close()
        errors = []  # with their tracebacks
        before = count_descriptors()
        with StubGateway() as stub, Peer(tunnels(None, reply("", "407 No"))) as proxy:
            enter(self, mock.patch.dict(os.environ, HTTPS_PROXY=proxy.url))
            for settings in ({"base_url": stub.url}, {"base_url": "https://x.test"}, expired):
                client = lowrouter.Client(KEY, max_retries=0, **settings)
                for steps in ends * 3:
                    stub.script.clear()
                    stub.play(*steps)
                    try:
                        next(client.stream("Hello", timeout=0.01 if STALL in steps else 5))
                    except lowrouter.LowRouterError as error:
                        errors.append(error)
                client.close()
            stub.script.clear()
        self.assertLessEqual(count_descriptors(), before)
        self.assertGreater(len(errors), 60)


class TestProxies(WithCertificates):
    def proxied(self, url, **environment):
        """Whether a call to `url` reaches the proxy, whose address replaces each @."""
        with Peer(tunnels(None, head("404 Not Found"))) as proxy, only_loopback():
            for name, value in environment.items():
                environment[name] = value.replace("@", f"127.0.0.1:{proxy.port}")
            with mock.patch.dict(os.environ, environment):
                # The private CA is loaded much faster than those of the system.
                settings = {"allow_http": True, "ca_file": self.path("ca.pem")}
                client = self.client(base_url=url, max_retries=0, **settings)
            with contextlib.suppress(lowrouter.LowRouterError):
                client.chat("Hello")
            return bool(proxy.heads)

    def test_the_hosts_of_no_proxy(self):
        for host, direct, proxied in (
            ("gateway.test", "gateway.test|GateWay.TEST|gateway.test.|test|*", "gateway|,|.|"),
            ("gateway.test", "x.test, gateway.test|x.test gateway.test|x.test,*", "x.test"),
            ("gateway.test", "gateway.test:443| gateway.test ,", "eway.test|gateway.test:80"),
            ("GATEWAY.test.", "gateway.test|.test", "gateway|gateway.test.org|10.0.0.1"),
            ("eu.gateway.test", "gateway.test|.gateway.test|*.gateway.test", "us.gateway.test"),
            ("gateway.test:8443", "gateway.test:8443|gateway.test|.test:8443", "gateway.test:443"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.4"),
            ("10.1.2.3:8443", "10.1.2.3:8443", "10.1.2.3:443"),
            ("[fd00::1]", "fd00::1|[fd00::1]|[FD00::1]", "fd00::2"),
            ("[fd00::1]:8443", "[fd00::1]:8443", "[fd00::1]:443"),
        ):
            for no_proxy in [*direct.split("|"), *proxied.split("|")]:
                with self.subTest(host, no_proxy=no_proxy):
                    got = self.proxied("https://" + host, HTTPS_PROXY="@", NO_PROXY=no_proxy)
                    self.assertIs(got, no_proxy in proxied.split("|"))

    def test_which_variables_name_a_proxy(self):
        yes = [{"HTTPS_PROXY": "@"}, {"https_proxy": " http://@/ "}]
        yes += [{"HTTPS_PROXY": "@", "no_proxy": "", "NO_PROXY": "*"}]  # small letters count
        no = [{}, {"HTTP_PROXY": "@"}, {"HTTPS_PROXY": ""}, {"HTTPS_PROXY": "@", "no_proxy": "*"}]
        no += [{"HTTPS_PROXY": "@", "https_proxy": "127.0.0.1:9"}]
        for environment in [*yes, *no]:
            with self.subTest(**environment):
                got = self.proxied("https://gateway.test", **environment)
                self.assertIs(got, environment in yes)
        local = [f"https://{host}:1" for host in ("127.0.0.1", "127.1.2.3", "[::1]", "LOCALHOST")]
        for url in ["http://gateway.test", *local]:  # which are never proxied
            self.assertFalse(self.proxied(url, HTTP_PROXY="@", HTTPS_PROXY="@"))
        with only_loopback(), mock.patch.dict(os.environ, HTTPS_PROXY="127.0.0.1"):
            client = self.client(base_url="https://gateway.test", max_retries=0)
        error = self.error(lowrouter.APIConnectionError, client.chat, "Hello")
        self.assertIn("127.0.0.1:80", str(error))  # the port by default

    def failed(self, proxy, login="", **settings):
        """The error of a call through a proxy that does not make a tunnel."""
        url = f" http://{login}127.0.0.1:{proxy.port}\n"
        with mock.patch.dict(os.environ, HTTPS_PROXY=url), only_loopback():
            client = self.client(base_url="https://gateway.test:8443/api/v1", **settings)
            return raised(self, lowrouter.APIConnectionError, client.chat, "Hello")

    def test_a_proxy_that_makes_no_tunnel_is_named_without_its_password(self):
        login = "user:pa%3Ass%20word@"
        encoded = "Basic dXNlcjpwYTpzcyB3b3Jk"  # user:pa:ss word
        echoed = "user:pa:ss word pa%3Ass%20word " + encoded
        responses = {reply(echoed, f"{status} No"): 1 for status in (407, 401, 403, 302, 404)}
        responses[reply("<html>", "502 Bad Gateway")] = 3
        odd = (b"220 smtp.test ESMTP\r\n", b"", b"HTTP/1.1 200 OK\r\nX", b"\x05\xff\x00\r\n\r\n")
        responses.update(dict.fromkeys(odd, 3))
        for response, attempts in responses.items():
            with self.subTest(response), Peer(tunnels(None, response)) as proxy:
                error = self.failed(proxy, login)
                self.assertEqual(len(proxy.heads), attempts)
                self.assertTrue(proxy.heads[0].startswith(b"CONNECT gateway.test:8443 HTTP/1."))
                self.assertIn(f"127.0.0.1:{proxy.port}", str(error))
                self.assertIn("gateway.test:8443", str(error))
                self.assertNotIn("billed", str(error))
                for secret in ("pa:ss", "pa%3Ass", encoded):
                    self.assertNotIn(secret, all_that_shows(error))
                if response not in odd:
                    self.assertIn(response[9:12].decode(), str(error))
                if b" 407 " in response:  # a wrong password is not a missing one
                    self.assertNotEqual(str(error), str(self.failed(proxy)))
                    self.assertIn("HTTPS_PROXY", str(error))
        stub = self.gateway("wronghost")
        with Peer(tunnels(stub.port)) as proxy:
            error = self.failed(proxy, ca_file=self.path("ca.pem"))
            self.assertRegex(str(error), "gateway.test.*certificate")
            self.assertEqual((len(proxy.sockets), stub.requests), (1, []))

    def test_a_login_goes_to_the_proxy_byte_for_byte(self):
        logins = {"user:pass@": b"user:pass", "user@": b"user:", ":pass@": b":pass", "": b""}
        for login, sent in {**logins, "u%40x:p%3A%e9@": b"u@x:p:\xe9"}.items():
            with self.subTest(login), Peer(tunnels(None, b"")) as proxy:
                self.failed(proxy, login, max_retries=0)
                expected = b"\r\nHost: gateway.test:8443"
                if sent:
                    expected += b"\r\nProxy-Authorization: Basic " + base64.b64encode(sent)
                self.assertTrue(proxy.heads[0].endswith(expected), proxy.heads)

    def test_an_invalid_proxy_is_a_configuration_error_that_shows_no_part_of_it(self):
        urls = "x:SECRET@proxy.test:abc x:SECRET@proxy.test:99999 x:SECRET@ x:SECRET@[::1 SECRET:@/"
        urls += " us#SECRET:x@proxy.test us/SECRET:x@proxy.test us?SECRET:x@proxy.test x:SECRET#@p"
        urls += " us@SECRET:x@proxy.test x:SECRET/1@proxy.test x:SECRET?@proxy.test \udce4SECRET@p"
        urls = ["http://" + url for url in urls.split()]
        urls += [f"{scheme}://x:SECRET@proxy.test" for scheme in ("socks5", "https", "ftp")]
        for url in [*urls, "http://", "http://x:SECRET@pro xy:80"]:
            with self.subTest(url), mock.patch.dict(os.environ, HTTPS_PROXY=url):
                error = raised(self, lowrouter.ConfigError, lowrouter.Client, KEY)
                self.assertIn("HTTPS_PROXY", str(error))
                self.assertNotIn("SECRET", all_that_shows(error))


class TestBounds(Case):
    @contextlib.contextmanager
    def memory(self, megabytes):
        """At most so much more memory at the peak, that of the stub included."""
        gc.collect()
        tracemalloc.start()
        try:
            yield
            self.assertLess(tracemalloc.get_traced_memory()[1], megabytes * (1 << 20))
        finally:
            tracemalloc.stop()

    def test_what_does_not_end_is_an_error_that_takes_little_memory(self):
        json_head = head("200 OK", "Content-Type: application/json") + b'{"x": "'
        line = chunked(b"data: " + b"x" * 65536 + b"\n", end=False)
        short_lines = chunked((b"data: " + b"x" * 100 + b"\n") * 1000, end=False)
        pieces = chunked(b"x" * 16, end=False) * 1000
        sized = head("402 No", "Content-Length: 99999999")
        for call, kind, megabytes, start, data, times in (
            ("stream", "StreamError", 36, BEGUN, line[:-3] + b"x\r\n", 640),
            ("stream", "StreamError", 52, BEGUN, line, 640),
            ("stream", "StreamError", 22, BEGUN, short_lines, 1000),
            ("stream", "StreamError", 1.2, BEGUN, pieces, 30),
            ("chat", "BadResponseError", 97, json_head, b"x" * (1 << 20), 100),
            ("chat", "InsufficientCreditsError", 20, head("402 No"), b"x" * 65536, 640),
            ("chat", "InsufficientCreditsError", 20, sized, b"x" * 65536, 640),
            ("chat", "LowRouterError", 20, b"HTTP/1.1 200 OK\r\n", b"X: 1\r\n" * 10000, 100),
        ):
            with self.subTest(start=start, data=data[:20]):
                steps = [start, Drip(data, 0, times), CUT]
                with self.memory(megabytes):
                    error = failed_call(self, getattr(lowrouter, kind), call, *steps, max_retries=0)
                if start == BEGUN:
                    self.assertEqual(error.completion.text, "so far")
                self.assertLess(len(error.body or ""), 1 << 20)
                self.assertIn((error.body or "")[:8], ('{"x": "x', "x" * 8, ""))

    def test_a_large_answer_takes_little_more_than_twice_its_size(self):
        start = head("200 OK") + b'{"choices": [{"message": {"content": "'
        for end in (b"", b" \r\n"):  # which servers like to send
            self.stub.play(start, Drip(b"x" * (1 << 20), 0, 10), b'"}}]}' + end, CUT)
            with self.subTest(end), self.memory(10 * 2.5 + 2):
                self.assertEqual(len(self.client().chat("Hello").text), 10 << 20)

    def test_an_encoded_answer_is_refused_without_decoding_it(self):
        bomb = gzip.compress(b" " * (10 << 20))
        refused = ("gzip", "GZIP", "br", "deflate", "zstd", "compress", "identity, gzip")
        with self.memory(5):
            for encoding, call in itertools.product(refused, CALLS):
                with self.subTest(encoding, call=call):
                    encoded = reply(bomb, content_encoding=encoding)
                    error = failed_call(self, lowrouter.BadResponseError, call, encoded)
                    self.assertIn(encoding, str(error))
                    self.assertIn("proxy", str(error))
        self.assertEqual(self.stub.requests[-1].headers["Accept-Encoding"], "identity")
        encoded = reply(bomb, "400 Bad", content_encoding="gzip")
        self.assertIn("Bad", str(failed_call(self, lowrouter.APIStatusError, "chat", encoded)))
        for encoding in ("identity", "Identity ", "", "none", "utf-8"):
            self.assertEqual(self.chat(reply(SMALL, content_encoding=encoding)).text, "whole")

    def test_json_that_cannot_be_read_is_a_bad_response(self):
        text = json.dumps(SMALL)
        bodies = [text.encode("utf-16"), text.encode("utf-32"), text + text, text + "\0", " "]
        bodies += ['{"a":' * 100000, "\ufeff <html>", '{"choices": 5}']
        for body, call in itertools.product(bodies, ("chat", "stream")):
            with self.subTest(body[:20], call=call):
                error = failed_call(self, lowrouter.BadResponseError, call, reply(body))
                self.assertLess(len(str(error)), 1000)
        odd = [json.dumps({**SMALL, "n": float(number)}) for number in ("inf", "nan")]
        for body in [*odd, "\ufeff" + text]:
            self.assertEqual(self.chat(reply(body)).text, "whole")


class TestVisibleBugs(Case):  # which must not look like failures of the network
    def run_traced(self, name, lines, line=None, bug=None):
        """The error of a call that adds its lines of lowrouter.py, with a bug at one of them."""

        def trace(frame, event, arg):
            code = frame.f_code
            if code.co_filename != lowrouter.__file__ or code.co_name == "__del__":
                return None  # Python itself reports what a destructor raises
            if event == "line":
                lines.add(frame.f_lineno)
                if frame.f_lineno == line:
                    raise bug
            return trace

        client = self.client(max_retries=0)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            CALLS[name](client)
        except Exception as error:
            return error
        finally:
            sys.settrace(before)
        return None

    def test_an_exception_raised_at_any_line_is_raised_as_itself(self):
        # http.client's destructor fails if our constructor did not reach its own.
        enter(self, mock.patch("sys.unraisablehook"))
        kinds = ((ValueError, 1), (TypeError, 6), (KeyError, 6))
        for name, (kind, step) in itertools.product(("chat", "stream", "models"), kinds):
            lines = set()
            self.assertIsNone(self.run_traced(name, lines))
            self.assertGreater(len(lines), 100)
            disguised = []
            for line in sorted(lines)[::step]:
                bug = kind("a bug")
                error = self.run_traced(name, set(), line, bug)
                if error not in (None, bug):
                    disguised.append(type(error))
            if kind is ValueError:  # which parsing foreign data raises
                self.assertLessEqual(len(disguised), len(lines) // 7)
            else:  # the caller's values may be no JSON
                self.assertIn(disguised, ([], [lowrouter.ConfigError]))


@unittest.skipUnless(shutil.which("curl") and shutil.which("bash"), "needs curl and bash")
class TestCurl(WithCertificates):  # the stub compares what it received from curl and from us
    def bash(self, script, **variables):
        """What a script prints. curl must find neither a proxy nor a configuration file."""
        names = {"LOWROUTER_API_KEY": KEY, "URL": self.stub.url, "no_proxy": "*", "LC_ALL": "C"}
        names.update(PATH=os.environ.get("PATH", os.defpath), HOME=os.devnull, **variables)
        options = {"input": script.encode("utf-8") + b"\n", "env": names, "timeout": 20}
        run = subprocess.run(["bash", "--norc"], capture_output=True, **options)
        self.assertEqual(run.returncode, 0, run.stderr)
        return run.stdout.decode("utf-8")

    def test_the_printed_command_survives_bash(self):
        client = self.client()
        prompt = 'it\'s "so"\n\r\t$HOME ${x} `id` $(id) \\ \\n \\u0041 \\'
        prompt += "!! !x; # & | > <y é 日本 😀 \u2028 @f %s *"
        fields = {"temperature": 0.5, "user": "o'neill", "route": {"region": "eu-west"}}
        history = "set -o history; set -o histexpand\n"  # as at a prompt, where !x is history
        for stream in (False, True):
            with self.subTest(stream=stream):
                command = client.curl(prompt, stream=stream, **fields)
                self.assertNotIn(KEY, command)
                self.assertIn('"Authorization: Bearer $LOWROUTER_API_KEY"', command)
                self.assertEqual(" -N " in command, stream)
                output = self.bash(history + command)
                if stream:
                    client.stream(prompt, **fields).result()
                    self.assertTrue(output.endswith("data: [DONE]\n\n"))
                else:
                    choices = client.chat(prompt, **fields)["choices"]
                    self.assertEqual(json.loads(output)["choices"], choices)
                requests = []
                for request in self.stub.requests[-2:]:
                    headers = [request.headers[each] for each in ("Authorization", "Content-Type")]
                    requests.append((request.method, request.path, headers, request.json))
                self.assertEqual(*requests)
                self.assertEqual(request.json["messages"][0]["content"], prompt)

    def test_settings_of_the_client_are_printed_too(self):
        headers = {"X-LowRouter-Region": "us-east", "X-Title": "it's `mine`", "X-Empty": ""}
        output = self.bash(self.client(headers=headers).curl("Hello"))
        self.assertEqual(json.loads(output)["lowrouter"]["region"], "us-east")
        self.assertEqual(self.stub.requests[-1].headers["X-Title"], "it's `mine`")
        self.assertEqual(self.stub.requests[-1].headers["X-Empty"], "")
        path = self.path("the key")
        with open(path, "w", encoding="utf-8") as file:
            file.write(KEY + "\n")
        with mock.patch.dict(os.environ, LOWROUTER_API_KEY_FILE=path):
            command = self.client(api_key=None).curl("Say hello")
        output = self.bash(command, LOWROUTER_API_KEY="", LOWROUTER_API_KEY_FILE=path)
        self.assertIn("Hello!", output)
        url = self.gateway().url
        for ca in (shutil.copy(self.path("ca.pem"), self.path("the ca.pem")), self.path("hashed")):
            command = self.client(base_url=url, ca_file=ca).curl("Say hello")
            self.assertIn("Hello!", self.bash(command))


# ---- the stub: every other test relies on it ----------------------------------------------------

_WEATHER = {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}}
_SCHEMA = {"type": "object", "properties": _WEATHER}
_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": _SCHEMA}}


class TestStub(Clean):
    """The stub answers as the gateway's documentation says, and plays what a test scripts."""

    def ask(self, method, path, body=None, key=KEY, **headers):
        """Send any request on a new connection; return the status, the headers and the body."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers["Authorization"] = "Bearer " + key
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode("utf-8")
        connection = HTTPConnection(self.stub.host, self.stub.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, "/api/v1" + path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def get(self, path):
        return json.loads(self.ask("GET", path)[2])

    def complete(self, prompt="Hello", region_header=None, **fields):
        """Send a prompt; return the completion and its record."""
        body = {"messages": [{"role": "user", "content": prompt}], **fields}
        headers = {"X_LowRouter_Region": region_header} if region_header else {}
        status, headers, raw = self.ask("POST", "/chat/completions", body, **headers)
        self.assertEqual(status, 200, raw)
        completion = json.loads(raw)
        block = completion["lowrouter"]
        for header, name in (("Generation-ID", "generation_id"), ("Region", "region")):
            self.assertEqual(headers["X-LowRouter-" + header], block[name])
        self.assertEqual(headers["X-LowRouter-Provider"], block["provider"])
        return completion, self.get("/generation/" + block["generation_id"])

    def test_a_completion_and_its_record_agree(self):
        for model in ("lowrouter/auto", "lowrouter/auto-cheap", "openai/gpt-4o"):
            with self.subTest(model=model):
                completion, record = self.complete("What is a vector database?", model=model)
                expected = {**completion["usage"], **completion["lowrouter"], "status": "ok"}
                expected.update(requested_model=model, resolved_model=completion["model"])
                expected["cost_credits"] = expected.pop("cost")
                self.assertEqual({name: record[name] for name in expected}, expected)
                total = record["prompt_tokens"] + record["completion_tokens"]
                self.assertEqual(record["total_tokens"], total)
                self.assertGreater(record["cost_credits"], 0)
                per_1k = record["eco"]["carbon_g"] / total * 1000
                self.assertAlmostEqual(per_1k, record["eco"]["carbon_per_1k_tokens_g"], 6)
                self.assertLessEqual(record["created_at"], record["completed_at"])
                self.assertNotIn(KEY, json.dumps(record))
        completion, record = self.complete(model="deepinfra/preview-1")  # its size is unknown
        self.assertNotIn("eco", completion["lowrouter"])
        self.assertIsNone(record["eco"])

    def test_routing_weighs_price_and_carbon_as_requested(self):
        completion, auto = self.complete()
        self.assertLessEqual(len(json.dumps(auto, indent=2).split("\n")), 30)  # fits a terminal
        trace = auto["routing_trace"]
        picked = [line for line in trace if "picked" in line]
        self.assertEqual((len(trace), picked), (3, trace[:1]))
        for value in (completion["model"], auto["provider"], auto["region"]):
            self.assertIn(value, trace[0])
        cheap = self.complete(model="lowrouter/auto-cheap")[1]
        green = self.complete(route={"prefer_low_carbon": True})[1]
        auto_carbon, cheap_carbon, green_carbon = (
            record["eco"]["carbon_per_1k_tokens_g"] for record in (auto, cheap, green)
        )
        self.assertLess(cheap["cost_credits"], auto["cost_credits"])
        self.assertLess(auto_carbon, cheap_carbon)
        self.assertLess(green_carbon, auto_carbon)

    def test_a_pinned_route_is_kept(self):
        for header, route, region, provider in (
            (None, {"region": "us-east", "provider": "deepinfra"}, "us-east", "deepinfra"),
            (None, {"region": "us-west", "provider": None}, "us-west", None),
            ("us-east", None, "us-east", None),
            ("us-east", {"region": "eu-west"}, "eu-west", None),
        ):
            with self.subTest(header=header, route=route):
                block = self.complete(region_header=header, route=route)[0]["lowrouter"]
                self.assertEqual(block["region"], region)
                self.assertIn(provider, (None, block["provider"]))

    def test_errors_look_like_those_of_openai_and_leave_a_record(self):
        hello = [{"role": "user", "content": "Hello"}]
        elsewhere = {"messages": hello, "model": "openai/gpt-4o", "route": {"provider": "mistral"}}
        for body, status, code in (
            (b'{"messages": [', 400, "invalid_json"),
            (b'{"temperature": NaN}', 400, "invalid_json"),
            ([], 400, "invalid_body"),
            ({}, 400, "invalid_messages"),
            ({"messages": ["Hello"]}, 400, "invalid_messages"),
            ({"messages": hello, "route": "eu-west"}, 400, "invalid_type"),
            ({"messages": hello, "tools": [7]}, 400, "invalid_body"),
            ({"messages": hello, "model": "openai/gpt-9"}, 404, "model_not_found"),
            ({"messages": hello, "route": {"region": "ap-south"}}, 503, "service_unavailable"),
            (elsewhere, 503, "service_unavailable"),
        ):
            with self.subTest(body=body):
                got, headers, raw = self.ask("POST", "/chat/completions", body)
                error = json.loads(raw)["error"]
                self.assertEqual((got, error["code"]), (status, code))
                self.assertEqual(set(error), {"message", "type", "code", "param"})
                record = self.get("/generation/" + headers["X-LowRouter-Generation-ID"])
                outcome = "upstream_error" if status == 503 else "client_error"
                self.assertEqual((record["status"], record["cost_credits"]), (outcome, 0))

    def test_a_wrong_key_and_a_wrong_path_are_errors(self):
        for method, path, key, status, code in (
            ("GET", "/models", "lr-sk-of-someone-else", 401, "invalid_api_key"),
            ("GET", "/nowhere", "", 401, "invalid_api_key"),
            ("GET", "/nowhere", KEY, 404, "not_found"),
            ("GET", "/v1/models", KEY, 404, "not_found"),
            ("POST", "/models", KEY, 404, "not_found"),
            ("GET", "/generation/", KEY, 404, "not_found"),
            ("GET", "/generation/gen_0", KEY, 404, "generation_not_found"),
            ("GET", "/generation/..%2Fmodels", KEY, 404, "generation_not_found"),
        ):
            with self.subTest(method=method, path=path, key=key):
                got, _, raw = self.ask(method, path, key=key)
                self.assertEqual((got, json.loads(raw)["error"]["code"]), (status, code))
        self.stub.gateway.records["a/ü"] = {"found": True}  # an id is percent-decoded
        self.assertEqual(self.get("/generation/a%2F%C3%BC"), {"found": True})

    def test_every_model_is_served_in_each_of_its_regions(self):
        providers = {each["id"]: each["regions"] for each in self.get("/providers")["data"]}
        for model in self.get("/models")["data"]:
            self.assertLessEqual(set(providers[model["owned_by"]]), set(model["regions"]))
            self.assertEqual({"prompt", "completion", "unit"}, set(model["pricing"]))
            self.assertGreater(model["context_length"], 0)
            for region in model["regions"]:
                completion = self.complete(model=model["id"], route={"region": region})[0]
                served = (completion["model"], completion["lowrouter"]["region"])
                self.assertEqual(served, (model["id"], region))

    def test_the_balance_goes_down_by_the_cost(self):
        before = self.get("/credits")["balance"]
        costs = [self.complete(model="openai/gpt-4o")[0]["usage"]["cost"] for _ in range(3)]
        balance = self.ask("HEAD", "/models")[1]["X-Credit-Balance"]
        self.assertAlmostEqual(float(balance), before - sum(costs), 8)
        self.stub.gateway.balance = 0
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        self.assertEqual(self.ask("POST", "/chat/completions", body)[0], 402)

    def test_tools_and_formats_are_answered_in_kind(self):
        client = self.client()
        question = "What is the weather in Paris?"
        completion = client.chat(question, tools=[_TOOL])
        self.assertEqual(completion.finish_reason, "tool_calls")
        call = completion.tool_calls[0]
        arguments = json.loads(call["function"]["arguments"])
        self.assertEqual(arguments, {"city": "Paris", "unit": "C", "days": 1})
        for prompt, choice, calls in ((question, "none", 0), ("Hello", _TOOL, 1)):
            got = client.chat(prompt, tools=[_TOOL], tool_choice=choice)
            self.assertEqual(len(got.tool_calls), calls)
        result = {"role": "tool", "tool_call_id": call["id"], "content": "21 degrees"}
        messages = [{"role": "user", "content": question}, completion.message, result]
        self.assertEqual(client.chat(messages, tools=[_TOOL]).text, "The tool says: 21 degrees")
        wanted = {"type": "json_schema", "json_schema": {"name": "day", "schema": _SCHEMA}}
        got = client.chat("Hello", response_format=wanted)
        self.assertEqual(set(json.loads(got.text)), set(_WEATHER))
        got = client.chat("Say hello", response_format={"type": "json_object"})
        self.assertEqual(json.loads(got.text), {"answer": "Hello!"})

    def test_a_stream_and_a_completion_have_the_documented_content(self):
        client = self.client()
        with StubGateway("another-key-0123") as other, mock.patch.dict(os.environ, other.env):
            self.assertEqual(client.chat("Hello"), lowrouter.chat("Hello"))
        for prompt, text, fields in (
            ("Say hello.", "Hello!", {}),
            ("hi", "Hello! How can I help you today?", {}),
            ("Count to 3", "1\n2\n3", {}),
            ("Why is it blue?", "You wrote: Why is it blue?", {}),
            ("  «Grüße» 😀\u2028\n\tand `$HOME`  ", mock.ANY, {}),
            ("Count to 100", mock.ANY, {"max_tokens": 5}),
            ("What is the weather in Paris?", "", {"tools": [_TOOL]}),
            ("Hello", "", {"tools": [_TOOL], "tool_choice": "required"}),
            ("Hello", mock.ANY, {"response_format": {"type": "json_object"}}),
        ):
            with self.subTest(prompt=prompt, **fields):
                whole = client.chat(prompt, **fields)
                self.assertEqual(whole.text, text)
                streamed = client.stream(prompt, **fields).result()
                for name in ("text", "tool_calls", "finish_reason", "usage", "eco", "model"):
                    self.assertEqual(getattr(streamed, name), getattr(whole, name), name)
                record = client.generation(streamed.generation_id)
                self.assertEqual(record["cost_credits"], whole.usage["cost"])
                self.assertEqual(record["eco"], whole.eco)

    def test_a_stream_has_one_word_per_chunk_and_a_choice_in_every_chunk(self):
        body = {"messages": [{"role": "user", "content": "Count to 3"}], "stream": True}
        _, headers, raw = self.ask("POST", "/chat/completions", body)
        self.assertEqual(headers["Content-Type"], "text/event-stream")
        *events, last, end = raw.decode("utf-8").split("\n\n")
        self.assertEqual((last, end), ("data: [DONE]", ""))
        chunks = [json.loads(event[len("data: ") :]) for event in events]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        self.assertEqual(deltas[0]["role"], "assistant")
        self.assertEqual([each["content"] for each in deltas[1:-1]], ["1\n", "2\n", "3"])
        self.assertEqual(chunks[-1]["choices"][0]["finish_reason"], "stop")
        self.assertIn("eco", chunks[-1]["lowrouter"])

    def test_the_steps_of_a_response_are_played_in_order(self):
        event = threading.Event()
        sockets = []
        self.stub.play(
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
            sockets.append,
            Drip(b"ab", 0.001, 3),
            lambda sock: event.set(),
            Wait(event),
            b"cde",
        )
        self.stub.play(CUT)
        self.stub.play(RESET)
        connection = HTTPConnection(self.stub.host, self.stub.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            self.assertEqual(connection.getresponse().read(), b"abababcde")
            self.assertIsInstance(sockets[0], socket.socket)
            connection.request("POST", "/x", b'{"a": 1}')
            with self.assertRaises(ConnectionError):  # http.client sees an end without a response
                connection.getresponse()
        with socket.create_connection((self.stub.host, self.stub.port), 10) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with self.assertRaises(ConnectionResetError):
                sock.recv(1)
        seen = [(r.method, r.path, r.body, r.json, r.connection) for r in self.stub.requests]
        get = ("GET", "/", b"", None)
        post = ("POST", "/x", b'{"a": 1}', {"a": 1})
        self.assertEqual(seen, [(*get, 1), (*post, 1), (*get, 2)])
        self.assertEqual(self.stub.connections, 2)

    def test_an_answer_is_a_complete_completion_and_can_be_a_step_but_a_string_cannot(self):
        with self.assertRaises(TypeError):
            self.stub.play("HTTP/1.1 200 OK\r\n\r\n")
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        route = {"region": "us-east", "provider": "mistral"}
        for fields, reason in (
            ({}, "stop"),
            ({"finish_reason": "length"}, "length"),
            ({"tool_calls": [call]}, "tool_calls"),
        ):
            with self.subTest(fields=fields):
                made = answer("Hi", model="m", **route, **fields)
                self.assertEqual(set(made), set(self.complete()[0]))
                self.stub.play(made, times=2)
                for _ in range(2):
                    got = self.client().chat("Hello", route=route)  # which it must have kept
                    self.assertEqual((got.text, got.model, got.finish_reason), ("Hi", "m", reason))
                    self.assertEqual(got.tool_calls, fields.get("tool_calls", []))

    def test_scripted_responses_that_were_not_used_are_an_error(self):
        with self.assertRaisesRegex(AssertionError, r"\A.*: 2;.*429 Too Many Requests.*\Z"):
            with StubGateway() as stub:
                stub.play(reply({}, "429 Too Many Requests"), times=2)
        self.assertFalse(stub.thread.is_alive())
        with StubGateway(check_unused=False) as stub:
            stub.play(CUT)
        with self.assertRaises(ZeroDivisionError):  # which must not be hidden by another error
            with StubGateway() as stub:
                stub.play(CUT)
                raise ZeroDivisionError

    def test_close_ends_every_wait(self):
        for step in (STALL, Drip(b"x", 60), Wait(threading.Event()), None):
            stub = StubGateway()
            with self.subTest(step=step), socket.create_connection((stub.host, stub.port)) as sock:
                sock.settimeout(10)
                if step:
                    stub.play(b"HTTP/1.1 200 OK\r\n\r\n", step)
                    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    self.assertTrue(sock.recv(1))
                stub.close()
                self.assertFalse(stub.thread.is_alive())
                self.assertFalse(stub.server.open)
                with sock.makefile("rb") as file, contextlib.suppress(ConnectionResetError):
                    file.read()  # returns when the server has closed the connection

    def test_under_another_name_only_the_tests_of_the_user_are_collected(self):
        """The user's test is the example of the docstring, which leaves three responses unused."""
        documentation = sys.modules[StubGateway.__module__].__doc__
        example = re.search(r"(?ms)^    import lowrouter$.*?(?=^\S)", documentation)[0]
        code = textwrap.dedent(
            f"""
            import unittest
            from gateway_stub import StubGateway, answer

            class TestOfTheUser(unittest.TestCase):
                def test_example(self):
                    with self.assertRaisesRegex(AssertionError, ": 3;.*429"):
                        exec({textwrap.dedent(example)!r}, {{}})
            """
        )
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(lowrouter.__file__, os.path.join(folder, "lowrouter.py"))
            shutil.copy(__file__, os.path.join(folder, "gateway_stub.py"))
            pathlib.Path(folder, "test_user.py").write_text(code, encoding="utf-8")
            command = [sys.executable, "-W", "error", "-m", "unittest"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            done = subprocess.run(command, cwd=folder, timeout=60, **pipes)
        self.assertIn(b"\nRan 1 test ", done.stdout)
        self.assertEqual(done.returncode, 0, done.stdout.decode("utf-8", "replace"))


# ---- the command line ---------------------------------------------------------------------------

PROGRAM = os.path.abspath(lowrouter.__file__)
COMMANDS = ("chat", "models", "generation", "batch", "get")
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def standard_stream(data=b"", terminal=False):
    stream = io.TextIOWrapper(io.BytesIO(data), encoding="ascii", write_through=True)
    stream.isatty = mock.Mock(return_value=terminal)
    return stream


class Commands(Case):
    """Tests of commands, each in a folder of its own."""

    def setUp(self):
        super().setUp()
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        os.environ.update(self.stub.env, TERM="xterm", COLUMNS="80", PYTHONDONTWRITEBYTECODE="1")

    def path(self, name, content=None):
        """The path of a file in the folder of the test, written when there is a content."""
        path = pathlib.Path(self.folder, name)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    def run_main(self, *argv, stdin=None, out=False, err=False):
        """Return the status of main(argv); without `stdin`, standard input is a terminal."""
        streams = [standard_stream(stdin or b"", stdin is None)]
        streams += [standard_stream(terminal=out), standard_stream(terminal=err)]
        with mock.patch.multiple(sys, **dict(zip(("stdin", "stdout", "stderr"), streams))):
            status = lowrouter.main(list(argv))
        self.out, self.err = (stream.buffer.getvalue().decode("utf-8") for stream in streams[1:])
        return status

    def run_chat(self, *argv, **streams):
        """Run a chat that must succeed; return the body of its request."""
        self.assertEqual(self.run_main("chat", *argv, **streams), 0, self.err)
        return self.bodies()[-1]

    def start(self, *argv, code=None, shell=None, **settings):
        """Start a command in a process of its own; `shell` is a script that runs it as "$@"."""
        program = [PROGRAM] if code is None else ["-c", "import lowrouter\n" + code]
        command = [sys.executable, "-W", "error", *program, *argv]
        if shell:
            command = ["sh", "-c", shell, "sh", *command]
        settings = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), **settings}
        process = subprocess.Popen(command, cwd=os.path.dirname(PROGRAM), **settings)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def finish(self, process, data=b"", is_bug=False):
        """Return the status at the end of a command; only a bug may have a traceback."""
        out, err = process.communicate(data, timeout=30)
        self.out = out.decode("utf-8")
        self.err = err.decode("utf-8")
        self.assertEqual("Traceback" in self.err, is_bug, self.err)
        self.assertNotIn("Exception ignored", self.err)
        return process.returncode

    def bodies(self):
        return [request.json for request in self.stub.requests if request.json]

    def prompts(self):
        return [body["messages"][-1]["content"] for body in self.bodies()]

    def assert_one_line(self, *facts):
        self.assertRegex(self.err, r"\Alowrouter: [^\n]+\n\Z")
        for fact in facts:
            self.assertIn(fact, self.err)


class TestChatCommand(Commands):
    def test_stdout_has_only_the_answer_and_a_line_feed_and_a_cut_answer_has_a_note(self):
        for options, streams in (([], True), (["--no-stream"], None)):
            for terminal in (False, True):
                body = self.run_chat(*options, "Count to 3", out=terminal)
                found = (self.out, self.err, body.get("stream"))
                self.assertEqual(found, ("1\n2\n3\n", "", streams))
            self.run_chat("--json", *options, "Count to 3", out=True)
            self.assertTrue(self.out.endswith("\n}\n"))
            self.assertEqual(lowrouter.Completion(json.loads(self.out)).text, "1\n2\n3")
            for more in ([], ["--json"]):
                self.run_chat("-p", "max_tokens=1", *options, *more, "Count to 99")
                self.assert_one_line("length")

    def test_a_terminal_gets_no_control_characters_but_a_file_gets_every_byte(self):
        text = "\x1b[2J\x07\u009b31m\r\ta\nü\x7f\n"
        shown = "\\u001b[2J\\u0007\\u009b31m\\u000d\ta\nü\\u007f\n"
        self.stub.play(answer(text), times=2)
        for terminal, expected in ((False, text), (True, shown)):
            self.run_chat("Hello", out=terminal)
            self.assertEqual(self.out, expected)

    def test_the_prompt_is_the_argument_then_what_is_piped(self):
        for words, stdin, prompt in (
            ([], b"Hello\n", "Hello"),
            (["-"], b"Hello\n", "Hello"),
            (["Review:"], b"a\nb\n", "Review:\n\na\nb"),
            (["Hello"], b"", "Hello"),
            ([], b"\xef\xbb\xbfHello\r\n", "Hello"),  # a byte order mark, as PowerShell writes it
            ([], "a \ufffd".encode(), "a \ufffd"),
            (["a\udcff"], None, "a\ufffd"),
            (["\udcc3\udcbc"], None, "ü"),  # what the C locale makes of UTF-8
            (["--", "--json"], None, "--json"),
        ):
            with self.subTest(words=words, stdin=stdin):
                self.run_chat(*words, stdin=stdin)
                self.assertEqual((self.prompts()[-1], self.err), (prompt, ""))
        self.run_chat(stdin=b"caf\xe9")
        self.assertEqual(self.prompts()[-1], "caf\ufffd")
        self.assert_one_line("UTF-8")

    def test_binary_and_utf16_input_and_a_missing_prompt_are_refused(self):
        wide = "Hello".encode("utf-16-le")
        for stdin in (b"a\0b", wide, b"\xff\xfe" + wide, "Hello".encode("utf-16"), None, b""):
            with self.subTest(stdin=stdin):
                self.assertEqual(self.run_main("chat", stdin=stdin), 2)
                self.assert_one_line("UTF-8" if stdin else "prompt")
        self.assertEqual(self.stub.requests, [])

    def test_options_become_fields_of_the_request(self):
        short = ["-m", "openai/gpt-4o", "-s", "Be brief", "-p", "temperature=0"]
        long = ["--model=openai/gpt-4o", "--system=Be brief", "--param", "temperature=0"]
        more = ["-puser=me", "-p", 'stop=["x"]', "--region=eu-west", "--provider", "openai"]
        messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
        expected = {"model": "openai/gpt-4o", "messages": messages, "temperature": 0, "user": "me"}
        expected.update(stop=["x"], route={"region": "eu-west", "provider": "openai"})
        for words in ([*short, *more, "Hello"], ["Hello", *long, *more]):
            self.assertEqual(self.run_chat("--no-stream", *words), expected)

    def test_a_value_can_be_read_from_a_file(self):
        response_format = {"type": "json_object"}
        schema = self.path("format.json", b"\xef\xbb\xbf" + json.dumps(response_format).encode())
        options = ["-s", "@" + self.path("system.md", "é"), "-p", "response_format=@" + schema]
        options += ["-p", "user=@" + self.path("notes.txt", "{not JSON"), "-p", 'metadata="@me"']
        body = self.run_chat(*options, "Hello")
        values = [body[name] for name in ("response_format", "user", "metadata")]
        self.assertEqual(values, [response_format, "{not JSON", "@me"])
        self.assertEqual(body["messages"][0]["content"], "é")

    def test_options_override_the_body_of_a_file(self):
        body = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "Say hello"}]}
        body.update(temperature=1, top_p=0.5, route={"prefer_low_carbon": True})
        path = self.path("body.json", json.dumps({**body, "stream": False}))
        options = ["--body", path, "--region", "eu-west", "-p", "temperature=0"]
        changed = {**body, "temperature": 0, "route": {**body["route"], "region": "eu-west"}}
        self.assertEqual(self.run_chat(*options), changed)
        self.assertEqual(self.run_chat("--body", path, "Hi")["messages"][0]["content"], "Hi")
        data = b"\xef\xbb\xbf" + json.dumps({**body, "messages": "Say hello"}).encode()
        sent = self.run_chat("--body", "-", "--no-stream", "-s", "Be brief.", stdin=data)
        system = {"role": "system", "content": "Be brief."}
        self.assertEqual(sent, {**body, "messages": [system, *body["messages"]]})

    def test_the_summary_has_what_was_reported_with_numbers_before_units(self):
        block = {"generation_id": "gen_7", "provider": "openai", "region": "eu-west"}
        block["eco"] = {"energy_wh": 0.000576, "carbon_g": 2.53e-05, "accuracy": "accurate"}
        for options, terminal in ((["-v"], False), (["--verbose"], False), ([], True)):
            self.stub.play(answer("Hi", usage={"total_tokens": 32}, lowrouter=block))
            self.run_chat(*options, "Hello", err=terminal)
            self.assert_one_line("openai/gpt-4o-mini", " openai", "eu-west", "32 tokens", "gen_7")
            self.assert_one_line("0.000576 Wh", "0.0000253 g CO2e", "accurate")
        for model, usage, block in (("m", {"total_tokens": "many"}, {"eco": None}), [None] * 3):
            self.stub.play(answer("Hi", model=model, usage=usage, lowrouter=block))
            self.run_chat("-v", "Hello")
            self.assert_one_line(model or "")
            self.assertNotRegex(self.err, "tokens|Wh|CO2e|None|null|gen_| via | in ")

    def test_verbose_shows_each_retry_before_its_wait(self):
        self.stub.play(reply({"error": "busy"}, "500 Oh", retry_after="3"))
        self.stub.play(reply({"error": "busy"}, "429 Slow", retry_after="7"))
        shown = []
        with mock.patch("time.sleep", lambda _: shown.append(sys.stderr.buffer.getvalue())):
            self.run_chat("-v", "Say hello")
        self.assertEqual([text.count(b"\n") for text in shown], [1, 2])
        first, second = shown[1].splitlines()  # the status, the wait, which try of how many
        self.assertRegex(first, rb"(?=.*\b500\b)(?=.*\b3(\.0)? s)(?=.*\b[12] of [23]\b)")
        self.assertRegex(second, rb"(?=.*\b429\b)(?=.*\b7(\.0)? s)(?=.*\b[23] of [23]\b)")

    def test_curl_prints_a_command_that_works_and_sends_nothing(self):
        self.assertEqual(self.run_main("chat", "--curl", "-p", "temperature=0", "It's"), 0)
        body = next(json.loads(word) for word in shlex.split(self.out) if word.startswith("{"))
        self.assertEqual(body["messages"], [{"role": "user", "content": "It's"}])
        self.assertEqual((body["stream"], body["temperature"]), (True, 0))
        self.assertEqual((KEY in self.out, self.stub.requests), (False, []))

    def test_a_pinned_route_must_be_confirmed_unless_the_check_is_off(self):
        pinned = ["chat", "--region", "eu-west", "Hello"]
        for options in ([], ["--no-stream"], ["--json"]):  # an answer from elsewhere is not shown
            self.stub.play(answer("Hello!", region="us-east"))
            self.assertEqual((self.run_main(*pinned, *options), self.out), (6, ""))
            self.assertRegex(self.err, "us-east.*eu-west|eu-west.*us-east")
        for step in (event_stream(delta("Hi"), delta(finish="stop")), answer("Hi", lowrouter=None)):
            self.stub.play(step, times=2)
            self.assertEqual(self.run_main(*pinned), 6)
            self.assert_one_line("eu-west", "verify")
            self.assertRegex(self.out, r"\A(Hi\n)?\Z")  # the text of a stream was shown before
            self.assertEqual(self.run_main(*pinned, "--no-verify-route"), 0)
            self.assertEqual((self.out, self.err), ("Hi\n", ""))


class TestUsage(Commands):
    def test_a_usage_error_is_one_line_with_the_fact_that_helps(self):
        bodies = {"[1]": "object", '{"route": "eu"}': "route", '{"messages": [5]}': "messages"}
        bodies[b"\xff\xfe{\0}\0"] = "UTF-8"
        source = self.path("in.jsonl", '{"messages": [{}]}\n')
        batch = ["batch", source, self.path("out.jsonl")]
        chat = ["chat", "Hello"]
        pinned = ["chat", "-s", "Be brief.", "--region=eu-west"]
        gone = self.path("gone/file")
        for argv, *facts in (
            (["nonsense"], "nonsense"),
            ([*chat, "--modle", "x"], "--modle", "--model"),
            ([*chat, "--reg", "eu-west"], "--reg", "--region"),
            (["chat", "one", "two"], "two", "quotes"),
            ([*chat, "-p", "temperature"], "-p", "temperature", "KEY=VALUE"),
            *(([*chat, "-p", text], text.split("=")[0]) for text in ("=3", "api_key=x", "route=x")),
            *(([*chat, name, "user=@" + gone], gone) for name in ("-p", "--param")),
            *(([*chat, *words], gone) for words in (["-s", "@" + gone], ["--body", gone])),
            *(([*pinned, "--body", self.path(fact, text)], fact) for text, fact in bodies.items()),
            *(([*chat, name, "soon"], name, "soon") for name in ("--timeout", "--deadline")),
            *(([*chat, "--timeout", text], "timeout") for text in ("-1", "nan")),
            # Empty values are mostly variables that are not set.
            *(([*chat, name, ""],) for name in ("-m", "--region", "--provider", "--body")),
            *(([*chat, f"{name}="],) for name in ("--model", "--provider", "--timeout")),
            *(([*batch, "--shard", text], text) for text in ("", "0/4", "5/4", "1", "a/b", "1/0")),
            *(([*batch, "--workers", text], "--workers") for text in ("", "0", "1001", "inf")),
            *((["batch", *words], gone) for words in ([gone, source], [source, gone])),
            (["batch", source], "OUT"),
            *(([name], word) for name, word in (("generation", "ID"), ("get", "PATH"))),
            *((["generation", ".."],), (["models", "--curl"], "--curl")),
        ):
            with self.subTest(argv=argv):
                self.assertEqual(self.run_main(*argv), 2)
                self.assert_one_line(*facts)
                self.assertEqual(self.out, "")
        self.assertEqual(self.stub.requests, [])
        os.environ["LOWROUTER_BASE_URL"] = "http://gateway.invalid/v1"
        for status, *options in ((2,), (7, "--allow-http")):
            self.assertEqual(self.run_main(*chat, *options), status)

    def test_help_fits_a_screen_and_has_what_a_new_user_needs(self):
        for rows, *argv in ((30,), *((32, command) for command in COMMANDS)):
            with self.subTest(argv=argv):
                self.assertEqual(self.run_main(*argv, "--help"), 0)
                text = self.out
                self.assertLessEqual(text.count("\n"), rows)
                self.assertLessEqual(max(map(len, text.split("\n"))), 80)
                self.assertNotRegex(text, "--key|--api")  # every user can see arguments
                self.assertEqual((self.run_main(*argv, "-h"), self.out), (0, text))
                if argv:
                    self.assertEqual(len(re.findall(rf"\n .*lowrouter {argv[0]} ", text)), 2)
                    self.assertRegex(text, r"--timeout S[^-]*\b600\b")
        self.run_main("batch", "--help")
        self.assertRegex(self.out, r"--workers N[^-]*\b8\b[^-]*twice")
        self.assertEqual(self.run_main(), 2)
        for fact in ('lowrouter chat "', "LOWROUTER_API_KEY", "lr-sk-", *COMMANDS, *"123456789"):
            self.assertRegex(self.out + self.err, rf"(?m)(^| ){fact}")
        self.assertEqual(self.run_main("--version"), 0)
        self.assertRegex(self.out, f"{lowrouter.__version__} .*Python {sys.version.split()[0]}")

    def test_the_exit_status_tells_scripts_what_kind_of_failure_it_was(self):
        refused = {"error": {"message": "no", "code": "c"}}
        later = (408, 409, 429, 500, 501, 502, 503, 504, 529)
        ended = answer("half", finish_reason="error")
        pins = (["--region=eu-west"], ["-p", 'route={"provider": "openai"}'])
        for status, steps, *options in (
            *((3, [reply(refused, f"{code} No")]) for code in (401, 403)),
            *((4, [reply(refused, f"{code} No")]) for code in (400, 402, 404, 413, 422)),
            *((5, [reply(refused, f"{code} No", retry_after="99")]) for code in later),
            *((6, [reply(refused, "503 No")], *pin) for pin in pins),
            (7, [CUT]),
            *((7, [STREAM_HEAD, chunked(each, end=False), CUT]) for each in (b"", b": ping\n\n")),
            (7, [event_stream(delta(""), done=False, end=False), CUT]),
            *((7, [STALL], name, "0.1") for name in ("--deadline", "--timeout")),
            (8, [event_stream(delta("half"), done=False, end=False), CUT]),
            *((8, [ended], *words) for words in ([], ["--no-stream"])),
            (1, [reply("<html>", content_type="text/html")]),
            # An error that the gateway reports is not a failure of the network.
            (1, [event_stream({"error": {"message": "overloaded"}})]),
            (1, [reply({"error": {"message": "overloaded"}})]),
        ):
            with self.subTest(status=status, steps=steps, options=options):
                self.stub.play(*steps, times=2)
                self.assertEqual(self.run_main("chat", *options, "Hello"), status)
                self.assert_one_line()
                self.assertEqual(self.out, "half\n" if status == 8 else "")
                self.assertEqual(self.run_main("chat", "--json", *options, "Hello"), status)
                error = json.loads(self.err)["error"]
                self.assertEqual((error["exit"], bool(error["message"])), (status, True))
                if status == 5:
                    self.assertEqual((error["code"], error["retry_after"]), ("c", 99))
                    self.assertTrue(error["status"] in later and hasattr(lowrouter, error["type"]))
                if status == 8:
                    self.assertEqual(lowrouter.Completion(json.loads(self.out)).text, "half")

    def test_a_bug_is_status_1_with_its_traceback(self):
        code = "def chat(*args, **options):\n    raise KeyError('on purpose')\n"
        code += "lowrouter.Client.chat = lowrouter.Client.stream = chat\nlowrouter.main()\n"
        source = self.path("in.jsonl", '{"messages": [{"role": "user", "content": "Hi"}]}\n')
        for argv in (["chat", "--json", "Hello"], ["batch", source, self.path("out")]):
            self.assertEqual(self.finish(self.start(*argv, code=code), is_bug=True), 1)
            self.assertIn("KeyError: 'on purpose'", self.err)


class TestListings(Commands):
    def table(self, columns, *argv):
        """The cells of the table that a terminal with so many columns shows."""
        with mock.patch.dict(os.environ, COLUMNS=str(columns)):
            self.assertEqual(self.run_main("models", *argv, out=True), 0)
        return [re.split("  +", line.strip()) for line in self.out.splitlines()]

    def test_models_are_a_sorted_table_of_whole_cells_that_fits_the_terminal(self):
        complete = self.table(10000)
        self.assertEqual(self.err, "")
        self.assertNotIn(" ,", self.out)
        ids = sorted(model["id"] for model in lowrouter.models())
        for columns in (60, 80, 100, 20, 1, 0, "wide"):
            with self.subTest(columns=columns):
                rows = self.table(columns)
                self.assertEqual([row[0] for row in rows[1:]], ids)
                for row, whole in zip(rows, complete):
                    self.assertLessEqual(set(row), set(whole))
                left_out = len(complete[0]) - len(rows[0])
                if left_out:
                    self.assert_one_line(f" {left_out} ", "--json")
                if columns in (60, 80, 100):
                    self.assertLessEqual(max(map(len, self.out.splitlines())), columns)
                    self.assertTrue(left_out and len(rows[0]) > 1)

    def test_the_table_has_what_the_gateway_lists_whatever_its_name(self):
        odd = {"id": "b", "prompt_price": "0.1", "vision": True, "context_window": 8192}
        odd.update(regions={"eu-west": True, "us-east": False}, name="two\nlines")
        self.stub.play(reply([{"id": "a"}, odd, {"id": None}, {"x": [{}]}]))
        self.assertEqual(len(self.table(10000)), 5)
        for word in (*odd, "0.1", "true", "8192", "false", "two lines"):
            self.assertIn(word, self.out.lower())

    def test_models_can_be_filtered_and_are_complete_as_json(self):
        self.assertEqual(self.run_main("models", "--json"), 0)
        models = json.loads(self.out)
        self.assertEqual(models, lowrouter.models())
        self.assertEqual(self.run_main("models", "CODESTRAL", "--json"), 0)
        self.assertEqual(json.loads(self.out), [each for each in models if "Code" in each["name"]])
        self.stub.play(reply([{"id": "Ü/B"}, {"id": "other"}]))
        self.assertEqual(self.table(80, "ü/b")[1:], [["Ü/B"]])
        self.assertEqual((self.run_main("models", "nothing has this"), self.out), (1, ""))
        self.assert_one_line()

    def test_a_generation_and_any_other_path_are_indented_json(self):
        name = lowrouter.chat("Hello").generation_id
        for path, *argv in (
            ("/generation/" + name, "generation", name),
            ("/providers", "get", "/providers"),
            ("/credits", "get", "credits"),
        ):
            self.assertEqual(self.run_main(*argv), 0)
            self.assertEqual(json.loads(self.out), lowrouter.request("GET", path))
            self.assertIn('\n  "', self.out)
            self.assertLess(len(self.out.splitlines()), 30 if name in argv else 60)
        for status, *options in ((4,), (0, "--wait", "9")):  # for a record that is not written yet
            self.stub.play(reply({"error": {"message": "not yet"}}, "404 Not Found"))
            self.assertEqual(self.run_main("generation", name, *options), status)


class TestStandardStreams(Commands):
    def test_tokens_are_shown_as_they_arrive_and_ctrl_c_is_status_130(self):
        shown = threading.Event()
        parts = [chunked(sse(delta(text), done=False), end=False) for text in ("one", "two")]
        self.stub.play(STREAM_HEAD, parts[0], Wait(shown), parts[1], STALL)
        process = self.start("chat", "--deadline=9", "Hello", stdin=subprocess.DEVNULL)
        self.assertEqual(os.read(process.stdout.fileno(), 10), b"one")
        shown.set()
        self.assertEqual(os.read(process.stdout.fileno(), 10), b"two")
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.finish(process), 130)
        self.assert_one_line()

    def test_a_silent_standard_input_is_explained_and_the_deadline_ends_the_wait(self):
        processes = [self.start("chat", "Hello", "--deadline", each) for each in ("1", "2.3")]
        for process, lines in zip(processes, (1, 2)):  # the notice comes after two seconds
            process.wait(timeout=10)  # standard input is still open
            self.assertEqual((self.finish(process), self.err.count("\n")), (7, lines), self.err)
            self.assertRegex(self.err.splitlines()[-1], "standard input.*deadline")
        self.assertRegex(self.err, "standard input.*</dev/null")

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_closed_and_full_streams_do_no_harm(self):
        hello = ["chat", "-v", "Say hello"]
        job = '{"messages": [{"role": "user", "content": "Hi"}], "model": "no/such"}\n'
        batch = ["batch", self.path("in.jsonl", job), self.path("out.jsonl")]
        os.environ.pop("PYTHONUNBUFFERED", None)  # with it, nothing is left to write at the exit
        del os.environ["COLUMNS"]
        table = (
            ('"$1" -m lowrouter chat -v "Say hello"', hello, 0, "Hello!\n", "tokens"),
            ('"$@" <&-', hello, 0, "Hello!\n", "tokens"),
            ('"$@" >&-', hello, 0, "", "tokens"),
            ('"$@" 2>&-', hello, 0, "Hello!\n", ""),
            ('"$@" 0>/dev/null', hello, 0, "Hello!\n", "tokens"),  # as under nohup
            ('"$@" | head -c 1', ["chat", "Count to 9999"], 0, "1", ""),
            ('"$@" | head -c 1', ["models"], 0, "i", ""),
            ('"$@" >/dev/full', hello, 1, "", "No space left"),
            ('"$@" 2>/dev/full', hello, 0, "Hello!\n", ""),
            ('"$@" 2>/dev/full', ["get", "no/such"], 4, "", ""),
            ('"$@" 2>/dev/full', batch, 9, "", ""),
        )
        settings = {"stdin": subprocess.DEVNULL}  # an open pipe is reported after two seconds
        for process, row in [(self.start(*row[1], shell=row[0], **settings), row) for row in table]:
            script, argv, status, out, fact = row
            with self.subTest(script=script, argv=argv):
                self.assertEqual((self.finish(process), self.out.lower()), (status, out.lower()))
                self.assertRegex(self.err, rf"\A(lowrouter: .*{fact}.*\n)?\Z")
                self.assertEqual(bool(self.err), bool(fact))

    @unittest.skipUnless(sys.platform == "linux", "names of files are bytes on Linux")
    def test_text_is_utf8_and_a_file_may_have_any_name_whatever_the_locale(self):
        for name, locale in itertools.product(("é in", "\udcff"), ({}, NO_UTF8)):
            with self.subTest(name=name, locale=locale):
                source = self.path(name, '{"messages": [{"role": "user", "content": "Hi"}]}\n')
                environment = {**os.environ, **locale, "PYTHONIOENCODING": "ascii"}
                process = self.start("batch", source, source + ".out", env=environment)
                self.assertEqual(self.finish(process), 0)
                os.remove(source + ".out")
        words = ["chat", "--body", source, "-s", "@" + source, "ü"]
        process = self.start(*words, env=environment)
        self.assertEqual(self.finish(process, "€".encode()), 0)
        self.assertEqual(self.out, "You wrote: ü\n\n€\n")
        process = self.start("batch", source + ".gone", "out", env=environment)
        self.assertEqual(self.finish(process), 2)
        self.assert_one_line(".gone")


class BatchCase(Commands):
    def jobs(self, *jobs):
        """Write IN with these lines: objects, or texts as they are."""
        lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
        self.path("in.jsonl", "".join(line + "\n" for line in lines))

    @staticmethod
    def job(name, prompt=None, **fields):
        messages = [{"role": "user", "content": prompt or name}]
        return {"custom_id": name, "body": {"messages": messages, **fields}}

    def numbered(self, count, **fields):
        """Write IN with the ids id-0, id-1, ..., each of which is its prompt too."""
        self.jobs(*(self.job(f"id-{number}", **fields) for number in range(count)))

    def batch(self, status, *options, workers=1, **streams):
        """Run IN with one worker, and expect this status and no more than one line."""
        words = ["batch", self.path("in.jsonl"), self.path("out.jsonl"), *options]
        got = self.run_main(*words, "--workers", str(workers), **streams)
        self.assertEqual(got, status, self.err)
        if not streams:
            self.assert_one_line()

    def start_batch(self, count, workers=1, **settings):
        self.numbered(count)
        words = ["batch", self.path("in.jsonl"), self.path("out.jsonl")]
        return self.start(*words, "--workers", str(workers), **settings)

    def results(self, name="out.jsonl"):
        """The lines of OUT, or of another file; each must end with a line feed."""
        text = self.files()[name].decode("utf-8")
        self.assertRegex(text, r"(\A|\n)\Z")
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def ids(self, name="out.jsonl"):
        return sorted(result["custom_id"] for result in self.results(name))

    def files(self):
        """The name and the content of each regular file of the test."""
        paths = filter(pathlib.Path.is_file, pathlib.Path(self.folder).iterdir())
        return {path.name: path.read_bytes() for path in paths}

    def start_over(self):
        """Remove what a batch has written, and all that the stub has seen."""
        for name in {"out.jsonl", "out.jsonl.errors"}.intersection(self.files()):
            os.remove(self.path(name))
        self.stub.requests.clear()
        self.stub.script.clear()

    def total(self, word):
        """The number before the word in the totals; 0 without it."""
        found = re.search(rf"([0-9][0-9.,]*)[^0-9,;:]*{word}", self.err)
        return float(found[1].replace(",", "")) if found else 0


class TestBatch(BatchCase):
    def test_an_answer_is_a_line_of_out_in_the_shape_of_openai(self):
        bare = {"messages": [{"role": "user", "content": "Say hello"}], "stream": True}
        self.jobs(self.job("a", "Count to 3", model="openai/gpt-4o"), "", bare)
        self.path("in.jsonl", b"\xef\xbb\xbf" + self.files()["in.jsonl"])
        self.batch(0)
        for result, name, text in zip(self.results(), ("a", "line-3"), ("1\n2\n3", "Hello!")):
            self.assertEqual((result["custom_id"], result["error"]), (name, None))
            self.assertEqual(result["response"]["status_code"], 200)
            self.assertEqual(lowrouter.Completion(result["response"]["body"]).text, text)
        self.assertEqual(self.bodies()[0]["model"], "openai/gpt-4o")
        self.assertEqual([body.get("stream") for body in self.bodies()], [None, None])

    def test_a_failure_is_a_line_of_the_errors_file_with_what_arrived(self):
        body = {"error": {"message": "no", "code": "c"}}
        self.stub.play(reply(body, "404 No", x_request_id="7"))
        self.stub.play(reply(answer("Hello"))[:-9], CUT)
        self.stub.play(answer("half", finish_reason="error"))
        self.stub.play(reply(answer("ü"), x_request_id="8"))
        self.numbered(4)
        self.batch(9)
        refused, lost, ended = self.results("out.jsonl.errors")
        self.assertEqual((refused["custom_id"], refused["error"]["code"]), ("id-0", "c"))
        response = {"status_code": 404, "request_id": "7", "body": body}
        self.assertEqual((refused["response"], lost["response"]), (response, None))
        self.assertTrue(lost["error"]["code"] and lost["error"]["message"])
        self.assertEqual(lowrouter.Completion(ended["response"]["body"]).text, "half")
        self.assertEqual(self.results()[0]["response"]["request_id"], "8")
        self.assertIn("ü".encode(), self.files()["out.jsonl"])

    def test_a_second_run_sends_what_failed_and_what_is_new(self):
        self.jobs(self.job("good"), self.job("bad", model="no/such"))
        for _ in range(2):
            self.batch(9)
            self.assertEqual(self.ids("out.jsonl.errors"), ["bad"])
            self.assertEqual(self.ids(), ["good"])
            self.assert_one_line("out.jsonl.errors", "no/such")  # the first error
        before = self.files()["out.jsonl"]
        self.jobs(self.job("new"), self.job("bad"), self.job("good"))
        for _ in range(2):
            self.batch(0)
            self.assertEqual(self.ids(), ["bad", "good", "new"])
            self.assertEqual(set(self.files()), {"in.jsonl", "out.jsonl"})
            self.assertTrue(self.files()["out.jsonl"].startswith(before))  # OUT only grows
        self.assertEqual(self.prompts(), ["good", "bad", "bad", "new", "bad"])

    def test_a_line_with_an_error_in_out_is_sent_again(self):
        self.numbered(3)
        line = '{"custom_id": "id-%d", "response": %s, "error": {"code": "c", "message": "no"}}\n'
        refused = line % (0, '{"status_code": 400, "body": {}}')  # as 1.0.0 wrote it
        self.path("out.jsonl", refused + line % (1, "null"))
        for _ in range(2):
            self.batch(0)
            self.assertEqual(self.ids(), ["id-0", "id-0", "id-1", "id-1", "id-2"])
        self.assertEqual(self.prompts(), ["id-0", "id-1", "id-2"])

    def test_a_torn_last_line_is_repaired(self):
        self.numbered(4)
        self.batch(0)
        complete = self.files()["out.jsonl"]
        last = complete.rindex(b"\n", 0, -1) + 1
        self.numbered(5)
        for size in (0, 1, last, last + 1, last + 20, len(complete) - 2, len(complete) - 1):
            with self.subTest(size=size, of=len(complete)):
                self.path("out.jsonl", complete[:size])
                self.batch(0)
                self.assertEqual(self.ids(), ["id-0", "id-1", "id-2", "id-3", "id-4"])
        self.assertEqual(self.prompts().count("id-0"), 3)

    def test_a_file_that_batch_did_not_write_is_refused_and_not_changed(self):
        self.numbered(3)
        record = '{"custom_id": %s, "response": %s, "error": null}\n'
        ours = record % ('"id-0"', '{"body": {}}')
        lines = ["notes\n", '{"a": 1}\n', '{"custom_id": "x"}\n', '{"custom_id": "x\n']
        lines += [record % ('"x"', response) for response in ("null", '{"body": []}')]
        lines.append(record % ('["x"]', '{"body": {}}'))
        texts = ["notes", "notes\n" + ours[:-9], *lines, *(ours + line for line in lines)]
        cases = itertools.product(("out.jsonl", "out.jsonl.errors"), texts)
        for name, text in (*cases, ("out.jsonl.errors", ours)):
            with self.subTest(name=name, text=text):
                self.start_over()
                self.path(name, text)
                files = self.files()
                self.batch(2)
                self.assert_one_line(name)
                self.assertEqual((self.files(), self.bodies()), (files, []))

    def test_out_must_be_a_regular_file_of_its_own(self):
        result = {"custom_id": "a", "response": {"body": {}}, "error": None}
        self.jobs({**result, **self.job("a")["body"]})  # it could be a line of OUT as well
        os.link(self.path("in.jsonl"), self.path("hard"))
        os.symlink(self.path("in.jsonl"), self.path("soft"))
        os.link(self.path("in.jsonl"), self.path("out.errors"))
        os.link(self.path("other", ""), self.path("other.errors"))
        files = self.files()
        os.mkdir(self.path("folder"))
        os.mkfifo(self.path("pipe"))
        with contextlib.suppress(OSError):  # only root may make a device
            os.mknod(self.path("null"), stat.S_IFCHR | 0o600, os.stat(os.devnull).st_rdev)
        for name in {*os.listdir(self.folder), "out"} - {"out.errors", "other.errors"}:
            with self.subTest(name=name):
                status = self.run_main("batch", self.path("in.jsonl"), self.path(name))
                self.assertEqual((status, self.files()), (2, files))
                self.assert_one_line()
        self.assertEqual(self.bodies(), [])

    @unittest.skipUnless(hasattr(os, "lockf"), "there are no locks here")
    def test_a_second_run_on_the_same_out_is_refused_and_changes_nothing(self):
        third = threading.Event()
        go = threading.Event()
        self.stub.play(answer("x"))
        self.stub.play(reply({"error": "no"}, "404 No"))
        self.stub.play(lambda sock: third.set(), Wait(go), answer("x"))
        process = self.start_batch(3)
        self.assertTrue(third.wait(10))
        files = self.files()
        self.assertTrue(files["out.jsonl"] and files["out.jsonl.errors"])
        self.batch(2)
        self.assert_one_line("out.jsonl")
        self.assertEqual(self.files(), files)
        go.set()
        self.assertEqual(self.finish(process), 9)
        self.assertEqual((len(self.bodies()), self.ids()), (3, ["id-0", "id-2"]))

    def test_a_bad_line_is_reported_with_its_number_before_anything_is_sent(self):
        good = self.job("a")
        bare = good["body"]
        bad_bodies = {"route": {"route": "eu-west"}, "region": {"route": {"Region": "eu-west"}}}
        bad_bodies.update(messages={"messages": ["a"]}, api_key={"api_key": "x"})
        bad_bodies["JSON"] = {"top_p": float("nan")}
        for jobs, pattern in (
            ([good, '{"messages": [],, }', bare], r"line 2 .*(column|char) 1[0-9]"),
            ([good, bare, good], r"line 3 .*line 1\b"),
            ([good, self.job("line-3"), bare], r"line 3 .*line 2\b"),
            ([good, "", {"custom_id": 7, "body": bare}], "line 3 .*custom_id"),
            *(([{"custom_id": "a", "body": body}], "line 1 .*body") for body in ("text", None)),
            ([{"prompt": "x"}], "line 1 .*messages"),
            *(([text], "line 1 ") for text in ("null", "[" * 5000)),
            ([good, self.job("b", "\ud800")], "line 2 "),
            *(([bare, {**bare, **body}], "line 2 .*" + word) for word, body in bad_bodies.items()),
        ):
            with self.subTest(jobs=jobs):
                self.jobs(*jobs)
                self.batch(2)
                self.assertRegex(self.err, pattern)
        self.path("in.jsonl", b'{"messages": "\xff"}\n')
        self.batch(2)
        self.assertEqual((set(self.files()), self.stub.requests), ({"in.jsonl"}, []))

    def test_progress_is_a_bar_on_a_terminal_and_nothing_elsewhere(self):
        self.numbered(10)
        table = [(20, "xterm", True), (80, "xterm", True), (80, "xterm", False), (80, "dumb", True)]
        table += [(80, "xterm", True, "-q"), (80, "xterm", True, "--quiet")]
        for columns, term, terminal, *options in table:
            self.start_over()
            os.environ.update(COLUMNS=str(columns), TERM=term)
            self.batch(0, *options, err=terminal)
            *bars, self.err = self.err.splitlines(True)  # it splits at \r too
            self.assert_one_line()
            has_bar = terminal and term == "xterm" and not options
            self.assertEqual("".join(bars).count("\n"), int(has_bar))
            self.assertLessEqual(max(map(len, bars), default=0), columns)

    def test_the_totals_are_those_of_all_answers_in_out(self):
        names = ("tokens", "Wh", "g CO2e", "cut", "failed")
        jobs = [self.job(str(limit), "Count to 99", max_tokens=limit) for limit in (1, 2, 99)]
        jobs.append(self.job("no eco numbers", model="deepinfra/preview-1"))
        self.jobs(self.job("infinite"), *jobs)
        self.stub.play(answer("x", usage={"total_tokens": 1e400}))
        self.batch(0)
        answers = [lowrouter.Completion(each["response"]["body"]) for each in self.results()[1:]]
        totals = [self.total(name) for name in names]
        tokens, energy, carbon, *others = totals
        self.assertEqual(tokens, sum(each.usage["total_tokens"] for each in answers))
        self.assertAlmostEqual(energy, sum(each.eco["energy_wh"] for each in answers[:3]))
        self.assertEqual([carbon > 0, *others, self.total("skipped")], [True, 2, 0, 0])
        self.start_over()
        for part in (jobs[:2], jobs[1:]):
            self.jobs(*part)
            self.batch(0)
        self.assertEqual([self.total(name) for name in names], totals)
        self.assertEqual((self.total("skipped"), self.total("not in")), (1, 1))


class TestBatchFailures(BatchCase):
    def test_all_workers_wait_for_the_longest_time_that_a_429_requests(self):
        arrivals = []
        self.numbered(9)
        for waits in (("0.2", "0.5"), ("0.5", "0.2")):
            self.start_over()
            arrivals.clear()
            refusals = [reply({"error": ""}, "429 Slow", retry_after=seconds) for seconds in waits]
            for number, step in enumerate([*refusals, answer("x")], 1):
                pause = Drip(b"", 0.1, number)  # so that all three are sent before the first 429
                self.stub.play(lambda sock: arrivals.append(time.monotonic()), pause, step)
            self.stub.play(lambda sock: arrivals.append(time.monotonic()), answer("x"), times=8)
            self.batch(0, workers=3)
            self.assertGreater(arrivals[3] - arrivals[0], 0.55)

    def test_a_line_is_given_up_after_six_requests_and_the_others_are_sent(self):
        self.numbered(2)
        for status, times in itertools.product(("500 Oh", "429 Slow", "503 Oh"), (5, 6)):
            with self.subTest(status=status, times=times):
                self.start_over()
                self.stub.play(reply({"error": ""}, status, retry_after="0.01"), times=times)
                self.batch(9 if times == 6 else 0)
                self.assertEqual((len(self.bodies()), "id-0" in self.ids()), (7, times == 5))
                self.assertIn("id-1", self.ids())

    def test_a_failure_of_one_line_does_not_stop_the_others(self):
        pin = {"route": {"region": "eu-west"}}
        retried = reply({"error": ""}, "500 Oh", retry_after="0")
        for fields, *steps in (
            ({}, [reply({"error": "no"}, "404 No")]),
            ({}, [reply({"error": "not this model"}, "403 No")]),
            ({}, [reply(answer("x"))[:-9], CUT]),
            ({}, [retried], [CUT]),
            ({}, [retried], [STALL]),
            (pin, [reply({"error": "not available"}, "503 No", retry_after="99")]),
            (pin, [answer("x", region="us-east")]),
        ):
            with self.subTest(steps=steps):
                self.start_over()
                for step in steps:
                    self.stub.play(*step)
                self.numbered(3, **fields)
                self.batch(9, "--deadline", "0.4")
                self.assertEqual(self.ids("out.jsonl.errors"), ["id-0"])
                self.assertEqual(self.ids(), ["id-1", "id-2"])
                self.assertEqual((self.total("failed"), self.total("not sent")), (1, 0))

    def test_a_failure_that_every_line_would_have_stops_the_batch(self):
        self.numbered(100)
        for status, seconds in (("401 No", 0), ("402 No", 0), ("429 No", 61), ("503 No", 3600)):
            with self.subTest(status=status):
                self.start_over()
                self.stub.play(reply({"error": "no"}, status, retry_after=seconds), times=100)
                self.batch(9, workers=4)
                self.assert_one_line(status[:3])
                sent = len(self.bodies())
                self.assertLessEqual(sent, 8)
                self.assertEqual(len(self.ids("out.jsonl.errors")), sent)
                self.assertEqual(self.total("not sent"), 100 - sent)
        self.stub.script.clear()
        self.batch(0)
        self.assertEqual(len(self.ids()), 100)

    def test_a_gateway_that_cannot_be_reached_stops_the_batch(self):
        self.numbered(20)
        self.stub.close()
        with Peer(tunnels(None, reply("", "502 No"))) as proxy, Peer(never_answers) as silent:
            no_tls = f"https://127.0.0.1:{silent.port}"
            table = [(self.stub.url, ""), (no_tls, ""), ("https://a.test", proxy.url)]
            for url, https_proxy in table:
                with self.subTest(url=url):
                    os.environ.update(LOWROUTER_BASE_URL=url, HTTPS_PROXY=https_proxy)
                    self.batch(9, "--deadline", "0.3")
                    self.assertEqual((self.total("failed"), self.total("not sent")), (1, 19))

    def test_a_first_answer_that_names_no_route_stops_a_pinned_batch(self):
        self.numbered(5, route={"region": "eu-west"})
        self.stub.play(answer("paid", lowrouter=None), times=6)
        self.batch(9)
        self.assertEqual((len(self.bodies()), self.total("not sent")), (1, 4))
        self.assertIn(b'"paid"', self.files()["out.jsonl.errors"])
        self.assert_one_line("verify")
        self.batch(0, "--no-verify-route")
        self.assertEqual((len(self.bodies()), len(self.ids())), (6, 5))

    def test_after_a_kill_each_id_is_in_out_once_and_few_are_sent_twice(self):
        reached = threading.Event()
        self.stub.play(answer("x"), times=12)
        self.stub.play(lambda sock: reached.set(), STALL, times=4)
        process = self.start_batch(30, workers=4)
        self.assertTrue(reached.wait(10))
        while self.files()["out.jsonl"].count(b"\n") < 12:
            self.assertIsNone(process.poll())
        process.kill()
        process.wait()
        written = self.ids()
        self.stub.script.clear()
        self.batch(0, workers=4)
        self.assertEqual(self.ids(), sorted(f"id-{number}" for number in range(30)))
        self.assertFalse([name for name in written if self.prompts().count(name) > 1])
        self.assertLessEqual(len(self.bodies()), 30 + 4)

    def interrupt(self, before, after, workers=1, times=1):
        """Press Ctrl-C so many times between these steps; return the seconds that it takes."""
        ready = threading.Event()
        self.stub.play(*before, lambda sock: ready.set(), *after, times=20)
        process = self.start_batch(20, workers)
        self.assertTrue(ready.wait(10))
        start = time.monotonic()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.3)
        self.assertEqual(self.finish(process), 130)
        return time.monotonic() - start

    def test_ctrl_c_ends_a_batch_within_seconds_and_keeps_the_answer_under_way(self):
        pause = Drip(b"", 0.2, 1)  # until the batch is idle
        self.assertLess(self.interrupt([pause], [pause, reply(answer("x"))]), 5)
        self.assert_one_line("same command")
        self.assertEqual((len(self.ids()), len(self.bodies())), (1, 1))
        self.assertEqual(set(self.files()), {"in.jsonl", "out.jsonl"})
        slow = reply({"error": "slow"}, "429 Slow", retry_after="60")
        self.start_over()
        self.assertLess(self.interrupt([slow, pause], [], workers=4), 3)
        self.start_over()
        self.assertLess(self.interrupt([pause], [STALL], times=9), 3)  # pressed again and again

    def test_ctrl_c_while_an_answer_is_written_loses_none_of_the_others(self):
        go = threading.Event()
        self.stub.play(answer("x" * (8 << 20)))  # so that it takes a moment to write
        self.stub.play(Wait(go), answer("y"), times=3)
        out = self.path("out.jsonl", "")
        process = self.start_batch(4, workers=4)
        while not os.path.getsize(out):
            self.assertIsNone(process.poll())
        process.send_signal(signal.SIGINT)
        go.set()
        self.assertEqual(self.finish(process), 130)
        self.assertEqual(len(self.ids()), len(self.bodies()))

    def test_an_in_that_changes_meanwhile_loses_no_answer(self):
        self.numbered(5000)
        self.stub.play(lambda sock: self.jobs(*["no request"] * 9), answer("x"))
        self.batch(2)
        self.assertEqual(len(self.ids()), len(self.bodies()))
        self.assertNotIn("nothing was sent", self.err)

    def test_a_full_disk_loses_nothing_that_was_written(self):
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        process = self.start_batch(20, code=limit + "lowrouter.main()")
        self.assertEqual(self.finish(process), 1)
        self.assert_one_line("out.jsonl", "too large", "same command")
        self.assertGreater(len(self.results()), 0)
        self.batch(0)
        self.assertEqual(self.ids(), sorted(f"id-{number}" for number in range(20)))


# ---- the README ---------------------------------------------------------------------------------

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def read_readme():
    path = os.path.join(_FOLDER, "README.md")
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def readme_sections():
    """The text of each section by its title; the first screen has the title ""."""
    parts = re.split(r"(?m)^## (.*)\n", read_readme())
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def readme_blocks(language):
    """(title of the section, code) of each block in a language."""
    blocks = []
    for title, text in readme_sections().items():
        for code in re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text):
            blocks.append((title, code))
    return blocks


def readme_table(title):
    """The rows of a section's table as lists of cells, without its head."""
    lines = [line for line in readme_sections()[title].split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def output_pattern(lines):
    """A pattern for printed text, in which "..." is any text and all white space is alike."""
    expected = " ".join(" ".join(lines).split())
    return "(?s)^" + ".*".join(map(re.escape, expected.split("..."))) + "$"


class FakeRows(list):
    """The little of Spark's distributed lists that the README uses, in this process."""

    def map(self, function):
        return FakeRows(function(item) for item in self)

    def collect(self):
        return list(self)


def fake_modules():
    """Stand-ins for the modules that are not here, and the stub under its new name."""
    boto3 = mock.MagicMock()
    boto3.client.return_value.get_secret_value.return_value = {"SecretString": KEY}
    spark = mock.MagicMock()
    context = spark.SparkContext.getOrCreate.return_value
    context.parallelize.side_effect = lambda items, slices: FakeRows(items)
    ray = mock.MagicMock()
    ray.remote.return_value.side_effect = lambda function: mock.Mock(remote=function)
    ray.get.side_effect = lambda value: value
    stub = sys.modules[__name__]
    return {"boto3": boto3, "pyspark": spark, "ray": ray, "gateway_stub": stub}


@unittest.skipUnless(read_readme().startswith("# lowrouter\n"), "no README.md of lowrouter here")
class TestReadme(Clean):
    """What a reader copies from the README works, and its tables are complete."""

    def setUp(self):
        super().setUp()
        os.environ.update(self.stub.env, LOWROUTER_SECRET="name-of-the-secret")
        for name, module in fake_modules().items():
            sys.modules[name] = module
            self.addCleanup(sys.modules.pop, name)

    def run_python(self, code):
        """Return the namespace in which the code was run, and what it printed."""
        namespace = {"__name__": "readme"}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        return namespace, " ".join(printed.getvalue().split())

    def new_folder(self):
        """A folder with both files, and with the function of the section on Lambda."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        shutil.copy(lowrouter.__file__, os.path.join(folder.name, "lowrouter.py"))
        shutil.copy(__file__, os.path.join(folder.name, "test_lowrouter.py"))
        with open(os.path.join(folder.name, "handler.py"), "w", encoding="utf-8") as file:
            file.write(self.lambda_code())
        return folder.name

    def lambda_code(self):
        return next(code for _, code in readme_blocks("python") if "def handler" in code)

    def run_bash(self, code, folder):
        """Run commands with the Python that runs the tests, and return their stdout."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment.update(PYTHONWARNINGS="error", THIS_PYTHON=sys.executable)
        start = 'set -euo pipefail; python3() { "$THIS_PYTHON" "$@"; }\n'
        settings = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 60}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        done = subprocess.run(["bash", "-c", start + code], **settings, **pipes)
        self.assertEqual(done.returncode, 0, done.stderr.decode("utf-8", "replace"))
        return " ".join(done.stdout.decode("utf-8").split())

    def test_it_is_short(self):
        lines = read_readme().splitlines()
        self.assertLessEqual(len(lines), 290)
        self.assertLessEqual(max(map(len, lines)), 120)

    def test_its_links_lead_to_its_sections(self):
        anchors = []
        for title in readme_sections():
            anchors.append(re.sub("[^a-z -]", "", title.lower()).replace(" ", "-"))
        links = re.findall(r"\]\((.*?)\)", read_readme())
        self.assertGreater(len(links), 10)
        for link in links:
            self.assertIn(link[1:], anchors)

    def test_the_changelog_begins_with_this_version(self):
        versions = re.findall(r"\*\*([0-9.]+)\*\*", readme_sections()["Changelog"])
        self.assertEqual(versions[0], lowrouter.__version__)

    def test_python_blocks_print_what_their_comments_say(self):
        for title, code in readme_blocks("python"):
            with self.subTest(section=title):
                _, printed = self.run_python(code)
                expected = re.findall(r"(?m)^ *print\(.*\)  # (.*)$", code)
                self.assertEqual(len(expected), code.count("print("))
                self.assertRegex(printed, output_pattern(expected))

    @unittest.skipIf(sys.version_info < (3, 9), "asyncio.to_thread came with Python 3.9")
    def test_the_async_call_works(self):
        call = re.search("`(await .*?)`", read_readme())[1]
        code = f"import asyncio, lowrouter\nasync def main():\n    print(({call}).text)\n"
        _, printed = self.run_python(code + "asyncio.run(main())")
        self.assertEqual(printed, "Hello!")

    @unittest.skipUnless(shutil.which("bash"), "no bash")
    def test_bash_blocks_print_what_their_comments_say(self):
        folder = self.new_folder()
        for title, code in readme_blocks("bash"):
            # Within a test, running all tests would never end.
            code = re.sub(r"(?m)^python3 test_lowrouter\.py$", ":", code)
            if "sha256sum" in code and not shutil.which("sha256sum"):
                continue  # macOS calls it shasum
            with self.subTest(section=title):
                expected = re.findall(r"(?m)  # (.*)$", code)
                self.assertRegex(self.run_bash(code, folder), output_pattern(expected or ["..."]))
        for command in re.findall("`(grep .*?|python3 .* --version)`", read_readme()):
            # LIBRARY: --version and --help print nothing to a pipe, since os._exit does not flush.
            self.assertNotEqual(self.run_bash(command, folder), "", command)
        with open(os.path.join(folder, "out.jsonl"), encoding="utf-8") as file:
            ids = [json.loads(line)["custom_id"] for line in file]
        self.assertCountEqual(ids, ["a", "line-2"])
        self.assertFalse(os.path.exists(os.path.join(folder, "out.jsonl.errors")))

    @unittest.skipUnless(shutil.which("bash"), "no bash")
    def test_the_zip_for_lambda_runs_from_its_byte_code(self):
        folder = self.new_folder()
        commands = next(code for _, code in readme_blocks("bash") if "function.zip" in code)
        commands += "python3 -m zipfile -e function.zip task; cd task; test -f handler.py\n"
        commands += "echo 'raise ValueError' > lowrouter.py\n"  # only the byte code is left
        commands += "python3 -c 'import lowrouter; print(lowrouter.chat(\"Say hello\").text)'"
        self.assertEqual(self.run_bash(commands, folder), "Hello!")

    def test_the_lambda_function_keeps_its_connection_and_its_deadline(self):
        namespace, _ = self.run_python(self.lambda_code())
        self.addCleanup(namespace["client"].close)
        context = mock.Mock()
        context.get_remaining_time_in_millis.return_value = 9000
        for _ in range(2):
            answer = namespace["handler"]({"prompt": "Say hello"}, context)
            self.assertEqual(json.loads(json.dumps(answer))["text"], "Hello!")
        self.assertEqual(self.stub.connections, 1)
        context.get_remaining_time_in_millis.return_value = 900
        with self.assertRaises(lowrouter.APITimeoutError):
            namespace["handler"]({"prompt": "Say hello"}, context)
        self.assertEqual(len(self.stub.requests), 2)

    @unittest.skipUnless(shutil.which("bash"), "no bash")
    def test_the_jobs_of_ci_share_the_lines_and_send_each_once(self):
        [(_, code)] = readme_blocks("yaml")
        command = re.search(r"python3 lowrouter\.py (batch .*)", code)[1]
        shards = re.search(r"shard: \[(.*?)\]", code)[1].split(", ")
        saved = re.search('path: "(.*?)"', code)[1]
        folder = self.new_folder()
        ids = [f"id-{number}" for number in range(9)]
        with open(os.path.join(folder, "in.jsonl"), "w", encoding="utf-8") as file:
            for name in ids:
                body = {"messages": [{"role": "user", "content": name}]}
                file.write(json.dumps({"custom_id": name, "body": body}) + "\n")
        for _ in range(2):  # the second time with the files of the first
            for shard in shards:
                self.run_bash(f"SHARD={shard}; python3 lowrouter.py {command}", folder)
        found = []
        for path in glob.glob(os.path.join(folder, saved)):
            with open(path, encoding="utf-8") as file:
                found += [json.loads(line)["custom_id"] for line in file]
        self.assertEqual(sorted(found), ids)
        self.assertEqual(len(self.stub.requests), len(ids))

    def test_the_table_of_settings_is_that_of_the_client(self):
        rows = readme_table("Settings")
        documented = [(row[0].strip("`"), row[2].strip("`")) for row in rows if row[0]]
        parameters = inspect.signature(lowrouter.Client).parameters.values()
        actual = [(each.name, repr(each.default).replace("'", '"')) for each in parameters]
        self.assertEqual(documented, actual)
        variables = re.findall(r"`(\w+)`", " ".join(row[1] for row in rows))
        self.assertCountEqual(variables, re.findall(r"\b[A-Z]+_[A-Z_]+\b", lowrouter.__doc__))

    def test_the_table_of_errors_has_every_class_with_its_status(self):
        rows = readme_table("Errors")
        names = [row[0].strip("`") for row in rows]
        classes = [name for name in lowrouter.__all__ if name.endswith("Error")]
        self.assertCountEqual(["LowRouterError", *names], classes)
        for name, row in zip(names, rows):
            status = re.match("([0-9]{3}): ", row[1])
            if not status:
                continue
            with self.subTest(name), self.client(max_retries=0) as client:
                self.stub.play(reply({"error": {"message": "no"}}, f"{status[1]} No"))
                with self.assertRaises(lowrouter.LowRouterError) as caught:
                    client.chat("Say hello")
                self.assertIs(type(caught.exception), getattr(lowrouter, name))
                self.assertEqual(caught.exception.retryable, row[2] in ("yes", "without a pin"))

    def test_the_command_line_is_that_of_the_help(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            lowrouter.main(["--help"])
        commands = [re.search(r"\w+", row[0])[0] for row in readme_table("Command line")]
        self.assertEqual(commands, re.findall(r"(?m)^ {2,4}([a-z]+)  ", printed.getvalue()))
        paragraph = readme_sections()["Command line"].partition("Exit statuses: ")[2]
        statuses = re.findall(r"(?:^|· |·\n)([0-9]+) ", paragraph)
        self.assertEqual(list(map(int, statuses)), [*range(10), 130])
        for status in statuses:
            self.assertRegex(printed.getvalue(), rf"\b{status}\b")

    def test_each_equivalent_of_the_openai_sdk_works(self):
        client = self.client()
        answer = client.chat("Say hello")
        with client.stream("Say hello") as stream:
            chunk = next(stream)
        known = {"lowrouter": lowrouter, "client": client, "answer": answer, "chunk": chunk}
        known.update(key=KEY, error=lowrouter.RateLimitError("slow down", status=429))
        known.update(model="openai/gpt-4o-mini", route={"region": "eu-west"})
        known.update(messages=[{"role": "user", "content": "Say hello"}])
        for _, ours in readme_table("OpenAI SDK"):
            for expression in re.findall("`(.*?)`", ours):
                with self.subTest(expression):
                    self.assertIsNotNone(eval(expression, known))

    def test_security_names_only_tests_that_exist(self):
        names = re.findall("`(Test.*?)`", readme_sections()["Security"])
        self.assertTrue(names)
        for name in names:
            self.assertIn(name, list_test_names())


# ---- this file as a program ---------------------------------------------------------------------


class TestRunner(Clean):
    """This file as a program: it runs tests, tries a command, and serves a stub."""

    @contextlib.contextmanager
    def running(self, *arguments, code=None):
        """Start this file, or some other code, as a program; stop it at the end."""
        program = [os.path.abspath(__file__)] if code is None else ["-c", code]
        command = [sys.executable, "-W", "error", *program, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, universal_newlines=True, encoding="utf-8", **pipes) as run:
            try:
                yield run
            finally:
                run.kill()

    def run_to_end(self, *arguments, code=None):
        """Return the status, what was written to stdout, and what was written to stderr."""
        with self.running(*arguments, code=code) as run:
            output, errors = run.communicate(timeout=60)
            return run.returncode, output, errors

    def test_the_last_line_has_the_totals_and_the_status_reports_failures(self):
        path, name = os.path.split(os.path.abspath(__file__))
        code = textwrap.dedent(
            f"""
            import sys, unittest
            sys.path.insert(0, {path!r})
            import {os.path.splitext(name)[0]} as module

            class TestSample(unittest.TestCase):
                def test_that_passes(self):
                    pass

                def test_that_fails_twice(self):
                    for part in range(2):
                        with self.subTest(part=part):
                            self.fail("on purpose")

                def test_that_is_skipped(self):
                    self.skipTest("on purpose")

            class TestSetUp(TestSample):
                @classmethod
                def setUpClass(cls):
                    raise ValueError("on purpose")

            module.TestSample = TestSample
            module.TestSetUp = TestSetUp
            sys.exit(module.main(sys.argv[1:]))
            """
        )
        for names, status, totals in (
            (["TestSample.test_that_passes"], 0, "1 passed, 0 failed, 0 skipped"),
            (["TestSample.test_that_is_skipped"], 0, "0 passed, 0 failed, 1 skipped"),
            (["TestSample"], 1, "1 passed, 1 failed, 1 skipped"),
            (["TestSetUp"], 1, "0 passed, 1 failed, 0 skipped"),
        ):
            with self.subTest(names=names):
                got, output, errors = self.run_to_end(*names, code=code)
                self.assertEqual((got, output.splitlines()[-1]), (status, totals), errors)

    def test_an_unknown_word_gets_the_usage_and_a_suggestion(self):
        known = next(name for name in list_test_names() if name.startswith("TestStub.test"))
        for word, suggestion in (
            ("srve", "serve"),
            ("TestSTub", "TestStub"),
            (known[:-1], known),
            ("--verbose", ""),
        ):
            with self.subTest(word=word):
                status, output, errors = self.run_to_end("TestStub", word)
                self.assertEqual((status, output), (2, ""))
                self.assertIn("usage: ", errors)
                self.assertIn(word, errors.splitlines()[-1])
                self.assertIn(suggestion, errors.splitlines()[-1])

    def test_help_is_the_usage(self):
        for arguments in (["-h"], ["--help"], ["serve", "--help"]):
            with self.subTest(arguments=arguments):
                status, output, errors = self.run_to_end(*arguments)
                self.assertEqual((status, errors), (0, ""))
                self.assertIn("serve [PORT]", output)

    def test_the_readme_of_another_project_is_not_tested(self):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(lowrouter.__file__, os.path.join(folder, "lowrouter.py"))
            shutil.copy(__file__, os.path.join(folder, "test_lowrouter.py"))
            with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
                file.write("# mine\n")
            command = [sys.executable, "-W", "error", "test_lowrouter.py", "TestReadme"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            done = subprocess.run(command, cwd=folder, timeout=60, **pipes)
        self.assertRegex(done.stdout, rb"\n0 passed, 0 failed, [1-9][0-9]* skipped\n\Z")

    def test_try_runs_a_command_against_a_stub(self):
        status, output, errors = self.run_to_end("try", "chat", "Count to 3")
        self.assertEqual((status, output.split()), (0, ["1", "2", "3"]), errors)
        self.assertIn("eu-west", errors)  # the line about the route and the eco numbers
        status, output, errors = self.run_to_end("try", "models", "--json")
        self.assertEqual((status, errors), (0, ""))
        models = {model["id"] for model in json.loads(output)}
        self.assertIn("mistral/mistral-small-3.2", models)

    def test_try_is_quiet_when_the_reader_of_its_output_stops(self):
        with self.running("try", "chat", "Count to 99") as run:
            run.stdout.read(1)
            run.stdout.close()
            self.assertEqual((run.stderr.read(), run.wait(timeout=30)), ("", 0))

    def test_serve_prints_two_exports_and_ends_at_ctrl_c(self):
        with self.running("serve") as run:
            settings = {}
            for _ in range(2):
                name, _, value = run.stdout.readline().strip().partition("=")
                settings[name] = value
            key = settings["export LOWROUTER_API_KEY"]
            with lowrouter.Client(key, base_url=settings["export LOWROUTER_BASE_URL"]) as client:
                self.assertEqual(client.chat("Say hello").text, "Hello!")
            run.send_signal(signal.SIGINT)
            output, errors = run.communicate(timeout=10)
            self.assertEqual((run.returncode, output, errors), (130, "", ""))

    def test_serve_refuses_a_wrong_or_used_port(self):
        for words, expected in (
            (["abc"], 2),
            (["99999"], 2),
            (["--port=1"], 2),
            (["1", "2"], 2),
            ([str(self.stub.port)], 1),
        ):
            with self.subTest(words=words):
                status, output, errors = self.run_to_end("serve", *words)
                self.assertEqual((status, output), (expected, ""))
                self.assertIn(words[0], errors.splitlines()[-1])
                self.assertNotIn("Traceback", errors)


_PROGRAM = os.path.basename(__file__)
_USAGE = f"""\
usage: python3 {_PROGRAM}                 run all tests
       python3 {_PROGRAM} NAME...         run these tests (TestStub, TestStub.test_...)
       python3 {_PROGRAM} try COMMAND...  run a lowrouter command against a stub gateway
       python3 {_PROGRAM} serve [PORT]    keep a stub gateway running until Ctrl-C
"""
_TEST_SECONDS = 300  # for all tests, which normally take about a minute


class _Result(unittest.TextTestResult):
    """Counts the tests that passed; a test with failed subtests counts as one failure."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def count_failed(self):
        failed = set()
        for test, _ in self.failures + self.errors:
            failed.add(getattr(test, "test_case", test).id())  # a subtest has its test_case
        return len(failed)


def run_tests(names):
    """Run all tests, or the named ones; the last line of stdout has the totals."""
    module = sys.modules[__name__]
    loader = unittest.defaultTestLoader
    if names:
        suite = loader.loadTestsFromNames(names, module)
    else:
        suite = loader.loadTestsFromModule(module)
    faulthandler.dump_traceback_later(_TEST_SECONDS, exit=True)  # shows which test hangs
    result = unittest.TextTestRunner(resultclass=_Result).run(suite)
    faulthandler.cancel_dump_traceback_later()
    for test, reason in result.skipped:
        print(f"skipped: {test}: {reason}")
    sys.stderr.flush()  # Python 3.8 buffers it if it is a file, and the totals must come last
    failed = result.count_failed()
    skipped = len(result.skipped)
    print(f"{result.passed} passed, {failed} failed, {skipped} skipped", flush=True)
    if failed or result.passed + skipped == 0:  # running no test at all is not a success
        return 1
    return 0


def list_test_names():
    """Return the names that select tests: classes, and their methods."""
    names = []
    for name, value in sorted(vars(sys.modules[__name__]).items()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            methods = unittest.defaultTestLoader.getTestCaseNames(value)
            names.extend(f"{name}.{method}" for method in methods)
            if methods:
                names.append(name)
    return names


def usage_error(message):
    """Report a wrong command line; return its exit status."""
    print(f"{_USAGE}{_PROGRAM}: {message}", file=sys.stderr)
    return 2


def try_command(arguments):
    """Run a lowrouter command against a stub that lives as long as the command."""
    if arguments[:1] == ["chat"] and not {"-v", "--json", "--curl"}.intersection(arguments):
        arguments = ["chat", "-v", *arguments[1:]]  # shows the route and the eco numbers
    with StubGateway(pace=0.05) as stub:
        os.environ.update(stub.env)
        status = lowrouter.main(arguments)
        os._exit(status)  # sys.exit would flush once more, perhaps into a closed pipe


def serve(arguments):
    """Keep a stub running until Ctrl-C; print the settings of a client for a shell."""
    port = arguments[0] if arguments else "0"
    if port in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if len(arguments) > 1:
        return usage_error(f"serve takes one PORT, not {' '.join(arguments)}")
    if not re.fullmatch("[0-9]+", port) or int(port) > 65535:
        return usage_error(f"PORT is a number up to 65535, not {port}")
    try:
        stub = StubGateway(pace=0.05, port=int(port))
    except OSError as error:
        print(f"{_PROGRAM}: cannot listen on port {port}: {error}", file=sys.stderr)
        return 1
    with stub, contextlib.suppress(KeyboardInterrupt):
        exports = [f"export {name}={value}" for name, value in stub.env.items()]
        print("\n".join(exports), flush=True)
        while True:
            stub.thread.join(1)  # on Windows, Ctrl-C does not interrupt an endless join
    return 130


def main(arguments):
    """Run a command of this file, and return its exit status."""
    command = arguments[0] if arguments else None
    if command in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if command == "try":
        return try_command(arguments[1:])
    if command == "serve":
        return serve(arguments[1:])
    known = list_test_names()
    for name in arguments:
        if name not in known:
            message = f"there is no test or command {name}"
            for match in difflib.get_close_matches(name, ["try", "serve", *known], 1):
                message += f"; did you mean {match}?"
            return usage_error(message)
    return run_tests(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
