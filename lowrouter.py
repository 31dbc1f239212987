# SPDX-License-Identifier: MIT
"""A client for the LowRouter gateway in one file: a whole answer or an error, no leaked key.

    print(lowrouter.chat("In one sentence, what is a vector database?").text)
    with lowrouter.stream("Count to 5 slowly") as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)

Settings are arguments of `Client`, else variables of the environment, where empty means unset:
LOWROUTER_API_KEY, LOWROUTER_API_KEY_FILE, LOWROUTER_BASE_URL, LOWROUTER_CACHE_DIR; HTTPS_PROXY,
HTTP_PROXY, NO_PROXY; SSL_CERT_FILE, SSL_CERT_DIR, then REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE.
Each room below uses only what stands above it, in the order of the data:

    messages -> body -> call -> blocks of bytes -> texts -> events -> Chunk, ... -> Completion

Facts about the gateway: [seed] is its curl page, [docs] its other pages, [assumption] neither.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import encodings.utf_8_sig  # noqa: F401  the first answer would load it, when no file may open
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import re
import select
import socket
import ssl
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import warnings

TYPE_CHECKING = False  # true for type checkers, so that `typing` itself is never imported
if TYPE_CHECKING:
    from typing import Any, Callable, Generator, Iterable, Iterator, NoReturn, TypeVar

    Json = dict[str, Any]  # an object
    T = TypeVar("T")

__version__ = "1.0.0"
__all__ = [
    "APIConnectionError", "APIStatusError", "APITimeoutError", "AuthenticationError",
    "BadResponseError", "Chunk", "Client", "Completion", "ConfigError", "InsufficientCreditsError",
    "LowRouterError", "NoProviderError", "NotFoundError", "PermissionDeniedError",
    "RateLimitError", "RouteMismatchError", "Stream", "StreamError",
    "chat", "curl", "generation", "main", "models", "request", "stream",
]  # fmt: skip

# ---- constants: every number with its unit and its reason ----------------------------------------

_BASE_URL = "https://lowrouter.ai/api/v1"  # [seed]
_MODEL = "lowrouter/auto"  # the gateway's default route [seed]
_TIMEOUT = 600.0  # seconds; an answer that is not streamed is silent for minutes
_CONNECT_SECONDS = 10.0  # for TCP, CONNECT and TLS together; a live host needs a fraction
_ERROR_SECONDS = 5.0  # for the body of an error, whose status says most
_SETTLE_SECONDS = 0.05  # for the end of the body after [DONE]; a new TLS handshake costs as much
_IDLE_SECONDS = 30.0  # for a kept connection; load balancers drop theirs from 60 s on
_FOREVER = 1e6  # seconds, 11 days: more than any wait, and less than the 2**31 ms of poll()
_BACKOFF = (0.5, 8.0)  # seconds between tries: the first, doubled up to the last [assumption]
_RETRY_AFTER_SECONDS = 60.0  # a longer wait is the caller's decision [assumption]
_POLL_SECONDS = 0.5  # between two looks for a record that is not written yet [assumption]
_CACHE_SECONDS = 3600  # for the model list, which is stable within a session [seed]
_SHORTEST_KEY = 4  # characters; a shorter key is no secret, but a part of many a word
_SHORTEST_CUT = 10  # characters of a key at the end of a text; all keys begin with `lr-sk-`
_BLOCK = 1 << 16  # bytes read at once: four TLS records
_SEND_BLOCK = 1 << 14  # bytes sent in one wait: one TLS record
_ERROR_LIMIT = 1 << 16  # bytes of an error's body
_MESSAGE_LIMIT = 400  # characters of an error's message: some lines of a terminal
_EVENT_LIMIT = 1 << 24  # bytes of an event of a stream: an image in base64 fits
_ANSWER_LIMIT = 1 << 26  # bytes of an answer that is not streamed

# ---- answers: plain data -------------------------------------------------------------------------

_ROUTED = ("generation_id", "provider", "region")  # what the `lowrouter` block tells [docs]


def _as(kind: type[T], value: Any) -> T:
    """The value if it is of that kind, else an empty one: odd data never raises."""
    return value if isinstance(value, kind) else kind()


def _are_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(_as(str, _as(dict, part).get("text")) for part in _as(list, content))


class _Answer(dict):  # type: ignore[type-arg]
    """Exactly the JSON that arrived; its properties look at choice 0 and never raise."""

    headers = http.client.HTTPMessage()  # of the response; look-ups ignore case [docs]

    def _choice(self) -> Json:
        for choice in _as(list, self.get("choices")):
            if isinstance(choice, dict) and choice.get("index") in (0, None):
                return choice
        return {}

    def _routed(self, name: str) -> Any:
        header = "X-LowRouter-" + name.replace("_", "-")  # says the same as the block [docs]
        value = _as(dict, self.get("lowrouter")).get(name)
        return value or self.headers.get(header, "").strip() or None

    @property
    def message(self) -> Json:
        """The message, or the delta, of choice 0; {} when there is none."""
        choice = self._choice()
        return _as(dict, choice.get("delta") or choice.get("message"))

    @property
    def text(self) -> str:
        """The text of choice 0, "" when there is none."""
        return _text(self.message.get("content"))

    @property
    def reasoning(self) -> str:
        """What the model thought aloud, "" when that is not told."""
        return _text(self.message.get("reasoning") or self.message.get("reasoning_content"))

    @property
    def tool_calls(self) -> list[Any]:
        """The tool calls of choice 0 as OpenAI's dicts, [] when there are none."""
        return _as(list, self.message.get("tool_calls"))

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended: "stop", "length", "tool_calls", ...; None while it goes on."""
        return self._choice().get("finish_reason")

    @property
    def model(self) -> str | None:
        """The model that answered: the resolved one, not the string that was sent [docs]."""
        return self.get("model")

    @property
    def usage(self) -> Json | None:
        """Token counts, and `cost` where it is given; None when the gateway gave no usage."""
        return _as(dict, self.get("usage")) or None

    @property
    def generation_id(self) -> Any:
        """What `generation()` looks up: an opaque str, None when not told [docs]."""
        return self._routed("generation_id")

    @property
    def provider(self) -> Any:
        """The id of the upstream provider: a str, None when not told [docs]."""
        return self._routed("provider")

    @property
    def region(self) -> Any:
        """The region that answered: a str, None when not told [docs]."""
        return self._routed("region")

    @property
    def eco(self) -> Json | None:
        """As sent: `energy_wh` in Wh, `carbon_g` in g CO2e, `accuracy`; None when absent [docs]."""
        return _as(dict, _as(dict, self.get("lowrouter")).get("eco")) or None


class Completion(_Answer):
    """A whole answer: OpenAI's `chat.completion` object with the `lowrouter` block [docs]."""


class Chunk(_Answer):
    """One piece of a streamed answer: OpenAI's `chat.completion.chunk`; `message` is its delta."""


# ---- errors: whose fault it is, what to do, and what can be saved; all of them pickle ------------


class LowRouterError(Exception):
    """Base of all errors; what one of them cannot tell is None."""

    completion: Completion | None = None  # what had come, None before the first chunk
    generation_id: str | None = None
    phase: str | None = None  # "connect", "response", "idle", or "deadline" of a time-out
    status: int | None = None  # of HTTP, as are the headers
    headers: http.client.HTTPMessage | None = None
    message: str | None = None  # this, `code` and `body` are what the gateway said
    code: str | int | None = None
    body: Any = None
    request_id: str | None = None
    retry_after: float | None = None  # seconds
    retryable: bool = False  # to ask again may help, and cannot be billed twice
    pinned: bool = False  # a 503 that is final, since the route was pinned [seed]

    def __init__(self, message: str = "", /, **details: Any) -> None:
        super().__init__(message)  # the message alone, since pickle rebuilds the error from `args`
        self.__dict__.update(details)


class ConfigError(LowRouterError, ValueError):
    """Your side: a setting or an argument that cannot be used. Nothing was sent."""


class APIConnectionError(LowRouterError, ConnectionError):
    """The road: no connection, or it was lost before an answer."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """The road took too long, in the `phase` "connect", "response", "idle" or "deadline"."""


class APIStatusError(LowRouterError):
    """The gateway said no, by its `status`, `code` and `message`."""


class AuthenticationError(APIStatusError):
    """401: the key is missing, wrong, expired or disabled."""


class InsufficientCreditsError(APIStatusError):
    """402: no credits left, or the key's limit is reached."""


class PermissionDeniedError(APIStatusError):
    """403: the key may not use this model or region."""


class NotFoundError(APIStatusError):
    """404: no such model, id or path."""


class RateLimitError(APIStatusError):
    """429: too many requests."""


class NoProviderError(APIStatusError):
    """503: no provider is available; when the route was `pinned` that is final [seed]."""


class BadResponseError(LowRouterError):
    """Not what was promised: HTML from a proxy, cut JSON, an error object in a 200, a redirect."""


class StreamError(BadResponseError):
    """A stream that was cut or failed after it had started; `completion` holds what came."""


class RouteMismatchError(LowRouterError):
    """The answer came from another region or provider than the pinned one."""


_STATUS_ERRORS = {  # the class, and what to do
    401: (AuthenticationError, "check the API key"),
    402: (InsufficientCreditsError, "top up the account or raise the key's limit"),
    403: (PermissionDeniedError, "the key's policy must allow this model and region"),
    404: (NotFoundError, "check the model, the id and that the base URL has one /v1"),
    407: (APIStatusError, "put user and password into the URL of the proxy"),
    429: (RateLimitError, "send more slowly"),
    503: (NoProviderError, "try later, or ask for another region or provider"),
}
_scan = json.JSONDecoder().raw_decode  # json.loads takes half as long again for an event


def _loads(text: str) -> Any:
    """Parse JSON; whatever is wrong with it is a ValueError."""
    text = text.lstrip()
    try:
        value, end = _scan(text)
    except (RecursionError, MemoryError) as error:
        raise ValueError(type(error).__name__) from None
    if text[end:].strip():
        raise ValueError("more than one JSON value")
    return value


def _without(key: str, value: Any, depth: int = 99) -> Any:
    """What is quoted from outside, without the key, and so shallow that it pickles."""
    if not depth:
        return None
    if isinstance(value, dict):
        return {_without(key, k): _without(key, each, depth - 1) for k, each in value.items()}
    if isinstance(value, list):
        return [_without(key, each, depth - 1) for each in value]
    if isinstance(value, http.client.HTTPMessage):
        clean = http.client.HTTPMessage()
        for name, each in value.items():
            clean[_without(key, name)] = _without(key, each)
        return clean
    if not isinstance(value, str) or len(key) < _SHORTEST_KEY:
        return value
    text = value.replace(key, "[key]").replace(json.dumps(key)[1:-1], "[key]")
    for size in range(len(key) - 1, _SHORTEST_CUT - 1, -1):
        if text.endswith(key[:size]):
            return text[:-size]  # a limit has cut the echo of the key in two
    return text


def _is_error(data: Any) -> bool:
    return bool(_as(dict, data).get("error")) or _as(dict, data).get("object") == "error"


def _refusal(kind: Any, what: str, body: Any, reason: str = "", **details: Any) -> Any:
    """An error with what its body says, whose shape is not documented [assumption]."""
    error = _as(dict, body).get("error") or body
    said = error if isinstance(error, dict) else {"message": error}
    message = str(_without("", said.get("message") or said.get("detail") or ""))
    if message.lstrip().startswith("<"):  # of a page its title
        message = "".join(re.findall(r"(?i)<title>([^<]*)", message)[:1]).strip()
    message = message or reason or "no reason was given"
    details.update(message=message, code=said.get("code") or said.get("type"), body=body)
    return kind(f"{what}: {message}", **details)


def _status_error(response: http.client.HTTPResponse, body: Any) -> APIStatusError:
    status, headers = response.status, response.headers
    passing = status in (408, 409, 429, 500, 502, 503, 504)  # by waiting [assumption]
    later = passing or status > 500
    advice = "try later" if later else "change the request"
    kind, advice = _STATUS_ERRORS.get(status, (APIStatusError, advice))
    if status != 407 and body.lstrip().startswith("<"):
        advice = "a proxy answered, not LowRouter" + "; try later" * later
    with contextlib.suppress(ValueError):
        body = _loads(body)
    error: APIStatusError = _refusal(kind, f"answered {status} ({advice})", body, response.reason)
    error.status, error.headers, error.request_id = status, headers, headers.get("X-Request-Id")
    wait = headers.get("Retry-After", "")
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):  # it is no time
        date = None if re.fullmatch("[0-9. ]+", wait) else email.utils.parsedate_to_datetime(wait)
        seconds = date.timestamp() - time.time() if date else float(wait)
        error.retry_after = max(0.0, min(seconds, _FOREVER))
    error.retryable = passing and (error.retry_after or 0) <= _RETRY_AFTER_SECONDS
    return error


# ---- request: what is sent; pure: it touches neither the network nor the environment -------------

_OF_CLIENT = {"api_key", "base_url", "max_retries", "headers", "ca_file", "cache_dir", "allow_http"}
_OUR_HEADERS = """authorization proxy-authorization host content-type content-length te connection
transfer-encoding accept-encoding expect upgrade""".split()
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _json_bytes(body: Any) -> bytes:
    try:
        return _encode(body).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the request cannot be written as JSON: {error}") from None


def _check_names(options: Json) -> None:
    for name in _OF_CLIENT.intersection(options):
        raise TypeError(f"{name} is a setting of the client, not of a call: Client({name}=...)")
    for name in {"extra_body", "extra_headers", "extra_query"}.intersection(options):
        raise TypeError(f"{name} is none of ours: a field is a keyword; Client(headers=...)")


def _chat_body(messages: Any, streams: bool, model: Any, route: Any, options: Json) -> Json:
    """The JSON body of a chat call: all `options` but `timeout` and `deadline` are its fields."""
    _check_names(options)
    if options.get("stream") not in (None, streams):
        raise TypeError("stream= is not yours to give: chat() never streams, stream() always does")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    given = {name: value for name, value in options.items() if value is not None}
    body = {"model": model, "messages": messages, "route": route, **given}
    if not _are_dicts(messages):
        wrong = type(messages).__name__
        raise ConfigError(f"messages must be a str or a list of dicts, not this {wrong}")
    if not isinstance(body["route"] or {}, dict):
        raise ConfigError("route must be a dict such as {'region': 'eu-west'}")
    if streams:
        usage = options.get("stream_options", {"include_usage": True})  # None: not asked for
        body.update(stream=True, stream_options=usage)
    return {k: v for k, v in body.items() if v is not None and k not in ("timeout", "deadline")}


def _pins(body: Json, headers: dict[str, str]) -> Json:
    """The region and provider that the answer must come from; the body wins [assumption]."""
    route, region = _as(dict, body.get("route")), headers.get("X-Lowrouter-Region")
    pins = {"region": route.get("region") or region, "provider": route.get("provider")}
    return {name: pin for name, pin in pins.items() if pin}


def _checked_headers(headers: Any) -> dict[str, str]:
    """The caller's own headers, each name in one spelling; a line end would begin another one."""
    if not isinstance(headers, dict):
        raise ConfigError(f"headers must be a dict, not {type(headers).__name__}")
    for name, value in headers.items():
        known = isinstance(name, str) and re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.A)
        plain = isinstance(value, str) and re.fullmatch(r"[\t -~]*", value)
        if not known or not plain or name.lower() in _OUR_HEADERS:
            raise ConfigError(f"header {name!r} is set by the client itself, or no printable ASCII")
    return {name.title(): value for name, value in headers.items()}


def _our_headers(host: str, key: str, method: str, data: bytes) -> dict[str, str]:
    """What the client itself says with a request."""
    agent = "lowrouter/{} Python/{}.{}".format(__version__, *sys.version_info)
    headers = {"Host": host, "Authorization": "Bearer " + key}  # [seed]
    headers.update({"User-Agent": agent, "Accept-Encoding": "identity"})
    if data:
        headers["Content-Type"] = "application/json"  # [seed]
    if data or method != "GET":
        headers["Content-Length"] = str(len(data))
    return headers


def _head(method: str, target: str, headers: dict[str, str]) -> bytes:
    fields = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *fields, "\r\n"]).encode("ascii")


def _curl_command(url: str, body: Any, headers: Any, flags: list[str], key_file: bool) -> str:
    """A chat call as a command for a POSIX shell, which takes the key from the environment."""
    from shlex import join, quote

    shown = {"Content-Type": "application/json", **headers}
    key = '$(cat "$LOWROUTER_API_KEY_FILE")' if key_file else "$LOWROUTER_API_KEY"
    lines = [join(["curl", *flags, url]), f'-H "Authorization: Bearer {key}"']
    # "name;" is how curl sends an empty header
    lines += ["-H " + quote(f"{k}: {v}" if v else f"{k};") for k, v in shown.items()]
    return " \\\n  ".join([*lines, "-d " + quote(_json_bytes(body).decode("utf-8"))])


# ---- settings: the key, the base URL and the proxy; arguments first, then the environment -------


def _seconds(name: str, value: Any, above: float = -float("inf")) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not above < value < float("inf"):
        raise ConfigError(f"{name} must be finite seconds (a timeout above 0), not {value!r}")
    return float(max(-_FOREVER, min(value, _FOREVER)))


class _Key:
    """The API key; a mounted file is read for each call, since secrets are rotated while we run."""

    def __init__(self, api_key: str | None) -> None:
        self.source, self.file = "api_key", ""
        self.value = api_key.strip() if isinstance(api_key, str) else api_key or ""
        if not self.value:
            self.source = "LOWROUTER_API_KEY"
            self.value = os.environ.get(self.source, "").strip()
        if not self.value:
            self.source = "LOWROUTER_API_KEY_FILE"
            self.file = os.environ.get(self.source, "")

    def current(self) -> str:
        """The key, or an error that does not show the name of the file, which may be the key."""
        key, problem = self.value, "set LOWROUTER_API_KEY, or LOWROUTER_API_KEY_FILE"
        try:
            if self.file:
                with open(self.file, encoding="utf-8-sig", errors="replace") as file:
                    key = file.read(_ERROR_LIMIT).strip() or key  # one just being written is empty
        except OSError as error:
            problem = f"LOWROUTER_API_KEY_FILE cannot be read: {error.strerror}"
        if not key:
            raise ConfigError(f"no API key: {problem}")
        if not isinstance(key, str) or not re.fullmatch(r"[!-~]+", key):
            del key  # a traceback may show locals
            raise ConfigError(f"the API key from {self.source} must be a str of printable ASCII")
        self.value = key
        return key


def _url_parts(name: str, like: str, pattern: str, url: Any) -> urllib.parse.SplitResult:
    """The parts of a URL; the error does not show it, since it may be or hold a secret."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # no text, or a bad port
        parts: urllib.parse.SplitResult = urllib.parse.urlsplit(url.strip())
        if re.fullmatch(pattern, url.strip(), re.A | re.I) and parts.hostname and parts.port != 0:
            return parts
    raise ConfigError(f"{name} must look like {like}")


def _is_exempt(host: str, port: int, entry: str) -> bool:
    """Whether an entry of NO_PROXY means the host: `*`, a name, a suffix, an address, a block."""
    import ipaddress

    entry = re.sub(rf"\A(\[.*\]|[^:]*):{port}\Z", r"\1", entry)  # another port stays, so no match
    with contextlib.suppress(ValueError):
        block = ipaddress.ip_network(entry.strip("[]"), strict=False)
        return ipaddress.ip_address(host) in block
    return entry == "*" or f".{host.rstrip('.')}".endswith("." + entry.strip("*."))


def _proxy(scheme: str, host: str, port: int) -> tuple[str, int, dict[str, str]] | None:
    """Host, port and login, which is a header, of the proxy on the way to the host."""
    variables = urllib.request.getproxies_environment()
    exempt = variables.get("no", "").lower().replace(",", " ").split()
    url = variables.get(scheme, "").strip()
    if not url or any(_is_exempt(host, port, entry) for entry in exempt):
        return None
    url = url if "://" in url else "http://" + url
    name, like = scheme.upper() + "_PROXY", "http://user:p%40ss@host:port"
    parts = _url_parts(name, like, "http://[!-~]+", url)
    login = {}
    if parts.username is not None:
        pair = urllib.parse.unquote_to_bytes(f"{parts.username}:{parts.password or ''}")
        login["Proxy-Authorization"] = "Basic " + base64.b64encode(pair).decode()
    return str(parts.hostname), parts.port or 80, login


class _Gateway:
    """Where the calls go: the checked base URL, the proxy on the way, the CAs that are trusted."""

    def __init__(self, base_url: str, allow_http: bool, ca_file: Any) -> None:
        like = f"{_BASE_URL}, without user and query"
        parts = _url_parts("the base URL", like, r"https?://[\w.:/\[\]%~-]+", base_url)
        self.tls, self.netloc = parts.scheme == "https", parts.netloc
        self.host, self.port = str(parts.hostname), parts.port or (443 if self.tls else 80)
        self.target = self.netloc if parts.port else f"{self.netloc}:{self.port}"
        path = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{self.netloc}{path}"
        loopback = re.fullmatch(r"(.*\.)?localhost|127(\.[0-9]+){3}|[0:]*:0*1", self.host)
        if not (self.tls or allow_http or loopback):
            remedy = "use https, or allow_http=True (--allow-http)"
            raise ConfigError(f"plain http to {self.host} would show the key on the way: {remedy}")
        self.proxy = None if loopback else _proxy(parts.scheme, self.host, self.port)
        through = " (through the proxy {}:{})".format(*self.proxy) if self.proxy else ""
        self.name = self.netloc + through  # for messages
        file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
        if ca_file or not (file or folder):
            file = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
            file = ca_file or file
            file, folder = (None, file) if os.path.isdir(file or "") else (file, None)
        self.ca_file, self.ca_path = file or None, folder or None


# ---- wire: one connection under a clock; the only room that touches the network ------------------

_OPTIONS = (  # of a socket; 60 seconds, since a NAT forgets who is silent for 240 or more
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60),
    (socket.IPPROTO_TCP, "TCP_KEEPALIVE", 60),  # the same on macOS
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 60),
)


class _Clock:
    """The ends of a phase and of the call: a socket's own time-out starts anew with each byte."""

    def __init__(self, timeout: Any, deadline: Any) -> None:
        self.timeout = _seconds("timeout", timeout, 0)
        deadline = _FOREVER if deadline is None else _seconds("deadline", deadline)
        self.end = time.monotonic() + deadline
        self.enter("connect")

    def enter(self, phase: str) -> None:
        """Begin "connect", "response" or "idle", the silence in a body, as of its first wait."""
        self.phase, self.until = phase, 0.0  # 0.0: nobody has waited yet

    def left(self) -> float:
        """Seconds for the next wait, always above 0."""
        now = time.monotonic()
        most = _CONNECT_SECONDS if self.phase == "connect" else _FOREVER
        self.until = self.until or now + min(self.timeout, most)
        left: float = min(self.until, self.end) - now
        if left <= 0:
            raise socket.timeout("timed out")
        return left

    def pause(self, seconds: float) -> bool:
        """Sleep, unless that would end past the deadline."""
        if time.monotonic() + seconds >= self.end:
            return False
        time.sleep(seconds)
        return True


def _has_news(sock: socket.socket) -> bool:
    """Whether something can be read at once: bytes, the end or an error."""
    if getattr(sock, "pending", int)():
        return True  # OpenSSL holds it already
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], 0)[0])  # Windows
    poll = select.poll()  # which knows no limit of descriptors
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class _Socket(io.RawIOBase):
    """A socket as a raw file; before every wait it asks the clock of the present call."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self.sock, self.pid = sock, os.getpid()
        self.may_end = False  # whether the end of the connection ends the body
        self.began = False  # whether a byte of the answer has come, so that the call was seen
        self.clock: Any = clock  # None while the wire is kept: there is nothing to wait for

    def arm(self) -> None:
        """Bound the next wait; not for a millisecond's sake, since all threads queue for that."""
        left = self.clock.left()
        if abs((self.sock.gettimeout() or 0.0) - left) > 0.001:
            self.sock.settimeout(left)

    def send(self, data: Any) -> None:
        self.arm()
        self.sock.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.clock is None:
            return None
        if self.pid != os.getpid():
            raise OSError("a forked process cannot read what its parent has asked for")
        self.arm()
        size = self.sock.recv_into(buffer)
        if size:
            self.began = True
        elif not self.may_end:  # for http.client it would be the end of any head or body
            raise ConnectionError("the connection was closed too early")
        return size

    def close(self) -> None:
        super().close()
        self.sock.close()


class _Wire(io.BufferedReader):
    """What http.client takes for its socket and its file: one buffer as long as the connection.

    http.client closes its file after each answer, but what came behind an answer must be seen: so
    `close` does nothing. The socket is closed by its owner, or when nobody holds it any more.
    """

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self.link = _Socket(sock, clock)
        super().__init__(self.link, _BLOCK)

    def makefile(self, mode: str) -> _Wire:
        return self

    def close(self) -> None:
        pass

    flush = close

    def answer(self, method: str) -> http.client.HTTPResponse:
        """The head of the answer; waits through 102 and 103 too, where http.client skips 100."""
        while True:
            response = http.client.HTTPResponse(self, method=method)  # type: ignore[arg-type]
            response.begin()
            if not 101 < response.status < 200:
                return response

    def fresh(self) -> bool:
        """Whether it can be used again: nothing came after its last answer, not even the end."""
        self.link.clock = None
        try:
            if self.peek(1) or self.link.pid != os.getpid():
                return False  # what is left of the last answer nobody asked for
            return not _has_news(self.link.sock)
        except (OSError, ValueError):
            return False  # it was closed


def _dial(gateway: _Gateway, clock: _Clock) -> socket.socket:
    """Try the addresses in turn, each in half of the time that is left, since one may be dead."""
    host, port, _ = gateway.proxy or (gateway.host, gateway.port, {})
    addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    clock.enter("connect")  # not before, since nothing bounds the resolver
    for untried, (*_, address) in zip(range(len(addresses), 0, -1), addresses):
        try:
            share = clock.left() / min(untried, 2)
            return socket.create_connection(address[:2], share)  # type: ignore[arg-type]
        except OSError:
            if untried == 1:
                raise
    raise OSError("the name has no address")


def _idle_seconds(monotonic: float, wall: float) -> float:
    """Since both; the monotonic clock alone stands still in a frozen Lambda sandbox."""
    return max(time.monotonic() - monotonic, time.time() - wall)


class _Pool:
    """The connections to one gateway that are kept, last in first out.

    With TLS a new wire costs three round trips and 1 ms of CPU, a kept one a single round trip.
    `list.append` and `list.pop` need no lock. A wire belongs to the process that made it: a forked
    child finds its copies not fresh and closes them, which its parent does not notice.
    """

    def __init__(self, gateway: _Gateway) -> None:
        self.gateway, self.closed = gateway, False
        self.idle: list[tuple[_Wire, float, float]] = []  # since when, by both clocks
        self.contexts: dict[int, ssl.SSLContext] = {}
        self.locks: dict[int, Any] = {}

    def close(self) -> None:
        """Hang up what is idle, and from now on what is given back."""
        self.closed = True
        self.tidy()

    def tidy(self) -> None:
        """Hang up what rests for too long: the last one in is used first, so the first may."""
        with contextlib.suppress(IndexError):
            while self.closed or _idle_seconds(*self.idle[0][1:]) > _IDLE_SECONDS:
                self.idle.pop(0)[0].link.close()

    def keep(self, wire: _Wire) -> None:
        self.idle.append((wire, time.monotonic(), time.time()))
        self.tidy()

    def kept(self) -> _Wire | None:
        with contextlib.suppress(IndexError):  # not asked for before: another thread may be quicker
            while True:
                wire, *since = self.idle.pop()
                if _idle_seconds(*since) < _IDLE_SECONDS and wire.fresh():
                    return wire
                wire.link.close()
        return None

    def tls(self) -> ssl.SSLContext:
        """The one context of this client, made at the first call: loading the CAs takes 20 ms.

        By process, since a fork may copy locks that another thread holds, OpenSSL's and ours.
        """
        from threading import Lock  # not at the top: nobody else needs it at import

        pid, file, path = os.getpid(), self.gateway.ca_file, self.gateway.ca_path
        with self.locks.setdefault(pid, Lock()):
            if pid in self.contexts:
                return self.contexts[pid]
            try:
                if path and not file and not any(map(os.path.isdir, path.split(os.pathsep))):
                    raise OSError("no such folder")  # which OpenSSL would not mind
                context = ssl.create_default_context(cafile=file, capath=path)
            except (OSError, TypeError, ValueError) as error:
                raise ConfigError(f"needs a CA file, and {file or path} is none: {error}") from None
            return self.contexts.setdefault(pid, context)

    def connect(self, clock: _Clock) -> _Wire:
        """TCP, CONNECT where a proxy is on the way (it sees nothing of the API key), TLS."""
        gateway = self.gateway
        clock.enter("connect")
        clock.left()  # a deadline that has passed is told at once
        context = self.tls() if gateway.tls else None
        wire = _Wire(_dial(gateway, clock), clock)
        for level, option, value in _OPTIONS:
            with contextlib.suppress(AttributeError, OSError):  # no system knows all of them
                wire.link.sock.setsockopt(level, getattr(socket, option), value)
        if not context:
            return wire
        if gateway.proxy:
            headers = {"Host": gateway.target, **gateway.proxy[2]}
            wire.link.send(_head("CONNECT", gateway.target, headers))
            status = wire.answer("HEAD").status  # as to HEAD, the answer has no body
            if not 200 <= status < 300:
                login = status in (401, 407)
                remedy = "put user and password into HTTPS_PROXY" if login else "check the base URL"
                what = f"was refused by the proxy ({status}): {remedy}"
                raise APIConnectionError(what, phase="connect", retryable=not login)
        wire.link.arm()
        sock = context.wrap_socket(wire.link.sock, server_hostname=gateway.host)
        return _Wire(sock, clock)  # and what the proxy sent behind its answer is forgotten


# ---- transport: calls over kept wires, tried again where that is safe; only our errors leave it --

_EXPECTED = (OSError, http.client.HTTPException, ValueError, MemoryError, LowRouterError)
_LOST = {"connect": "cannot be reached", "response": "did not answer", "idle": "cut its answer"}


class _Call(urllib.request.Request):
    """One request and its answer; it owns its wire, and gives it back at the end of the body."""

    wire: _Wire | None = None  # as long as the call owns it
    sent = False  # to its last byte; an answer may come before, 413 say
    streams = abandoned = False
    max_retries = 0

    def __init__(
        self, pool: _Pool, clock: _Clock, key: str, method: str, path: str, data: bytes, more: Any
    ) -> None:
        gateway = self.gateway = pool.gateway
        self.pool, self.clock, self.key = pool, clock, key
        super().__init__(gateway.url + path, data, method=method)
        headers = {**_our_headers(gateway.netloc, key, method, data), **more}
        if gateway.proxy and not gateway.tls:
            host, port, login = gateway.proxy
            self.set_proxy(f"{host}:{port}", "http")
            headers.update(login)
        self.message = memoryview(_head(method, self.selector, headers) + data)
        self.received = bytearray()  # of a body that is read as a whole
        self.pins: Json = {}

    def shown(self) -> str:
        """What an error carries of a body."""
        return self.received[:_ERROR_LIMIT].decode("utf-8-sig", "replace")

    def translated(self, cause: Exception) -> LowRouterError:
        """Our error for a foreign one, by the phase in which it was raised."""
        phase = self.clock.phase
        again = self.get_method() == "GET" or phase == "connect"
        billed = "; the call may have been billed, so it is not sent again"
        billed = billed if self.sent and not again else ""
        check = "check the base URL, the network and HTTPS_PROXY" if phase == "connect" else ""
        if isinstance(cause, (socket.timeout, TimeoutError)):
            phase = "deadline" if self.clock.end <= self.clock.until else phase
            remedy = "raise deadline" if phase == "deadline" else "raise timeout"
            remedy = f"{check}, or {remedy}" if check else remedy
            reason = f"took too long (time-out: {phase}): {remedy}{billed}"
            return APITimeoutError(reason, phase=phase, retryable=again)
        reason = f"{_LOST[phase]}: {str(cause) or type(cause).__name__}"
        if isinstance(cause, ssl.SSLCertVerificationError):
            trusted = self.gateway.ca_file or self.gateway.ca_path or "the system's CAs"
            hint = "set SSL_CERT_FILE to a private CA; Python 3.13 and later check it strictly"
            date, host = "its dates or this clock are wrong", "check the base URL"
            hint = {9: date, 10: date, 62: host, 64: host}.get(cause.verify_code, hint)  # of X509_V
            return APIConnectionError(f"{reason}; checked against {trusted}: {hint}")
        if "CERTIFICATE" in str(getattr(cause, "reason", "")):  # an alert of TLS 1.3 comes late
            return APIConnectionError(f"{reason}; the server asks for a client's certificate")
        reason += billed or "; " + (check or "ask again")
        if phase != "idle":
            return APIConnectionError(reason, phase=phase, retryable=again or not self.sent)
        kind = StreamError if self.streams else BadResponseError
        return kind(reason, retryable=again)

    def failure(self, cause: Exception, come: Completion | None = None) -> LowRouterError:
        """Our error for whatever was raised: short, with what has come, and without the key."""
        error = cause if isinstance(cause, LowRouterError) else self.translated(cause)
        answer = Completion(_without(self.key, come or error.completion or {}))
        if self.clock.phase == "idle":  # else no answer has begun
            answer.headers = _without(self.key, self.response.headers)
        told = {"body": self.shown() or None, "generation_id": answer.generation_id, **vars(error)}
        vars(error).update(_without(self.key, told), completion=answer or None)
        what = str(error)  # a stream's error may pass here twice
        what = what if what.startswith(self.gateway.name) else f"{self.gateway.name} {what}"
        line = "".join(c if c.isprintable() else " " for c in _without(self.key, what))
        error.args = (line[:_MESSAGE_LIMIT],)
        error.__context__ = error.__traceback__ = None  # they hold our frames, these the client
        return error

    def exchange(self, wire: _Wire) -> None:
        """Send the request and read the head of the answer."""
        self.wire, self.sent, wire.link.began = wire, False, False
        wire.link.clock = self.clock
        self.clock.enter("response")
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            # who closes before it has read all may have said why, 413 say: the answer decides
            for start in range(0, len(self.message), _SEND_BLOCK):
                wire.link.send(self.message[start : start + _SEND_BLOCK])
                self.clock.enter("response")  # a block ends a wait
            self.sent = True
        self.response = wire.answer(self.get_method())
        wire.link.may_end = self.response.length is None and not self.response.chunked
        self.clock.enter("idle")

    def open(self) -> None:
        """Send over a kept wire; that may have died: then a new one is taken, once."""
        wire = self.pool.kept()
        if wire:
            try:
                return self.exchange(wire)
            except (ConnectionError, ssl.SSLError):
                wire.link.close()
                if wire.link.began or (self.sent and self.get_method() != "GET"):
                    raise
        return self.exchange(self.pool.connect(self.clock))

    def check(self) -> None:
        """Raise unless the gateway said yes, in the framing and the coding that we understand."""
        response, status, headers = self.response, self.response.status, self.response.headers
        encoded = headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")
        if status >= 400:
            if not encoded:
                self.within(_ERROR_SECONDS, lambda: self.fill(_ERROR_LIMIT))
            error = _status_error(response, self.shown())
            if self.pins and isinstance(error, NoProviderError):
                error.pinned, error.retryable = True, False
            raise error
        if not 200 <= status < 300:
            target = re.match(r"(?:\w+:)?//([^/?#]*)", headers.get("Location", ""))
            host = target[1].rpartition("@")[2] if target else "another path"
            reason = "the key is sent to the gateway only: check the base URL"
            raise BadResponseError(f"redirects ({status}) to {host}, refused: {reason}")
        if "Transfer-Encoding" in headers and not response.chunked:
            raise BadResponseError("sent a body whose end is not clear: a proxy may have done it")
        if encoded:
            raise BadResponseError("sent an encoded answer: a proxy may have done it")
        if headers.defects and response.length is None and not response.chunked:
            raise BadResponseError("sent a header that cannot be read: a proxy may have done it")

    def read(self) -> bytes:
        """Return bytes as soon as there are some, and b"" at the true end of the body."""
        # read1, since read(n) would wait for n bytes; without a wire the end has been seen
        block = self.response.read1(_BLOCK) if self.wire else b""
        if self.response.chunked and (self.response.chunk_left or 0) < 0:
            raise http.client.IncompleteRead(b"")  # for http.client -5 is the size of a chunk
        wire = self.wire
        if not block and wire:
            self.wire = None  # before the look at `abandoned`
            if self.response.will_close or self.abandoned or not self.sent:
                wire.link.close()
            else:
                self.pool.keep(wire)
        return block

    def close(self) -> None:
        """Hang up, unless the wire was given back."""
        wire = self.wire  # once, since another thread may just give it back
        if wire:
            wire.link.close()

    def abandon(self) -> None:
        """End the wait of another thread for this answer, which closing would not."""
        self.abandoned = True  # before the wire is looked at: from now on it is not given back
        wire = self.wire
        if wire and wire.link.pid == os.getpid():  # the answer may be that of a parent process
            with contextlib.suppress(OSError):
                # not that of SSLSocket, which takes TLS away from the thread that is reading
                socket.socket.shutdown(wire.link.sock, socket.SHUT_RDWR)

    def fill(self, limit: int) -> None:
        """Read the body to its end; any byte ends a silence."""
        for block in iter(self.read, b""):
            self.clock.enter("idle")
            self.received += block
            if len(self.received) > limit:
                raise BadResponseError(f"sent more than {limit >> 10} KiB")

    def within(self, seconds: float, read: Callable[[], Any]) -> None:
        """Read what is no news any more, for some seconds."""
        end, self.clock.end = self.clock.end, min(self.clock.end, time.monotonic() + seconds)
        with contextlib.suppress(*_EXPECTED):
            read()
        self.clock.end = end

    def json(self) -> Any:
        """The body as JSON; None where there is none (204)."""
        self.fill(_ANSWER_LIMIT)
        if not self.received and (self.response.chunked or self.response.length == 0):
            return None
        try:
            text = self.received.decode("utf-8-sig")
            del self.received[_ERROR_LIMIT:]  # 50 MB are in memory twice, not three times
            data = _loads(text)
        except ValueError:
            start, html = self.shown()[:99].lstrip(), "HTML: a proxy answered, not LowRouter"
            what = html if start.startswith("<") else f"no JSON, or a part of it: {start}"
            raise BadResponseError(f"sent {what}") from None
        if "generation_id" not in _as(dict, data) and _is_error(data):
            raise _refusal(BadResponseError, "failed", data)
        return data

    def send(self, take: Callable[[_Call], T]) -> T:
        """Send the call until it is answered, and return what `take` makes of it."""
        (pause, longest), errors = _BACKOFF, [LowRouterError()]  # a list: see the last line
        for tries_left in range(self.max_retries, -1, -1):
            try:
                self.received.clear()
                self.open()
                self.check()
                return take(self)
            except BaseException as cause:
                self.close()
                if not isinstance(cause, _EXPECTED):
                    raise
                errors = [self.failure(cause)]
            told = errors[0].retry_after
            wait = pause * random.uniform(0.75, 1) if told is None else told
            if not tries_left or not errors[0].retryable or not self.clock.pause(wait):
                break
            pause = min(pause * 2, longest)
        raise errors.pop()  # a local name would close the ring of error, traceback and frame


# ---- server-sent events: blocks -> texts -> events; WHATWG's rules, knowing neither JSON nor us --


def _texts(blocks: Iterable[bytes]) -> Iterator[list[str]]:
    """Split at blank lines, which end an event, then decode, so that no character is ever cut."""
    rest, after_cr, codec = bytearray(), False, "utf-8-sig"  # one BOM may lead
    for block in blocks:
        if after_cr and block.startswith(b"\n"):
            block = block[1:]  # the other half of a CRLF
        after_cr, searched = block.endswith(b"\r"), max(len(rest) - 1, 0)
        rest += block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in block else block
        end = rest.rfind(b"\n\n", searched)
        if end >= 0:
            yield rest[:end].decode(codec, "replace").split("\n\n")
            del rest[: end + 2]
            codec = "utf-8"
        elif len(rest) > _EVENT_LIMIT:
            raise StreamError(f"sent an event longer than {_EVENT_LIMIT >> 20} MiB")
    yield [rest.decode(codec, "replace")]


def _events(blocks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (name, data) where there is data, also in an unfinished last event [assumption]."""
    for text in itertools.chain.from_iterable(_texts(blocks)):
        if text.startswith("data: ") and "\n" not in text:
            yield "", text[6:]  # as nearly all are
        else:
            names = re.findall(r"(?m)^event: ?(.*)", text)
            data = re.findall(r"(?m)^data(?:: ?(.*))?$", text)
            if data:
                yield "".join(names[-1:]).strip(), "\n".join(data)
            elif odd := re.match(r"\n?(?:error:|(?=[{<]))\s*(.*)", text, re.S):
                yield "error", odd[1]  # a field of llama.cpp, or a proxy's words [assumption]


# ---- assembly: events -> chunks -> completion; pure, and the only room that adds deltas up -------

_GROWING = frozenset(  # texts that come in pieces; id, type and model are whole, often again
    "content reasoning reasoning_content thinking refusal arguments input data transcript".split()
)


def _parts(before: Any, value: Any) -> list[Any]:
    """The other shape of a content: a list of parts, thoughts say, which later texts join."""
    parts = _as(list, before)
    if isinstance(before, bytearray):
        parts = [{"type": "text", "text": before}]
    if isinstance(value, list):
        parts += value
    elif isinstance(_as(dict, parts[-1]).get("text"), bytearray):
        parts[-1]["text"] += value.encode("utf-8", "surrogatepass")
    else:
        parts.append({"type": "text", "text": bytearray(value, "utf-8", "surrogatepass")})
    return parts


def _tool_call(calls: list[Json], piece: Json) -> Json:
    """The call to which a piece belongs: that of its index, else of its id, else the last one."""
    key = "id" if piece.get("index") is None else "index"
    for call in reversed(calls):
        if call.get(key) == piece.get(key) or piece.get(key) in (None, ""):
            return call
    calls.append({})
    return calls[-1]


def _merge(kept: Json, piece: Json, depth: int = 3) -> None:  # choice, delta, call, function
    """Add a delta: texts, lists and objects grow, of other values the last one counts."""
    for name, value in piece.items():
        if not value:
            kept[name] = value if kept.get(name) is None else kept[name]
            continue
        before = kept.get(name) or None  # not an empty list, which is the chunk's, not ours
        if isinstance(before, bytearray) and isinstance(value, str):
            before += value.encode("utf-8", "surrogatepass")  # a str would be copied each time
        elif isinstance(value, dict) and depth:
            kept[name] = _as(dict, before)
            _merge(kept[name], value, depth - 1)
        elif isinstance(before, dict):
            continue  # odd, and no reason to forget what came
        elif name == "tool_calls" and isinstance(value, list) and depth:
            calls = kept[name] = _as(list, before)
            for call in [each for each in value if isinstance(each, dict)]:
                _merge(_tool_call(calls, call), call, depth - 1)
        elif isinstance(value, list) or (isinstance(before, list) and isinstance(value, str)):
            kept[name] = _parts(before, value)
        elif isinstance(value, str) and name in _GROWING:
            kept[name] = bytearray(value, "utf-8", "surrogatepass")
        elif not isinstance(before, (bytearray, list)):
            kept[name] = value


def _plain(value: Any, depth: int = 9) -> Any:
    """What `_merge` has put together, as plain data that does not change any more."""
    if isinstance(value, bytearray):
        return value.decode("utf-8", "surrogatepass")
    if isinstance(value, dict) and depth:
        return {name: _plain(each, depth - 1) for name, each in list(value.items())}
    if isinstance(value, list) and depth:
        return [_plain(each, depth - 1) for each in value]
    return value


class _Assembly:
    """Puts the chunks of a stream together into the completion that chat() would have given."""

    def __init__(self, headers: http.client.HTTPMessage) -> None:
        self.headers = headers
        self.fields: Json = {}  # what is said of the answer as a whole
        begun = Completion()
        begun.headers = headers
        self.routed = {n: getattr(begun, n) for n in _ROUTED if getattr(begun, n)}
        self.choices: dict[int, Json] = {}
        self.whole: Completion | None = None  # when the gateway did not stream at all
        self.done = False  # whether the gateway said that this was all
        self.failed: Any = None  # the class, the arguments and the details of an error

    def add(self, chunk: _Answer) -> None:
        for name, value in chunk.items():
            if value or name not in self.fields:  # an empty word does not replace what was said
                self.fields[name] = value
        if "lowrouter" in chunk:
            block = _as(dict, chunk["lowrouter"])
            self.routed.update({n: v for n, v in block.items() if v or n not in self.routed})
        for position, choice in enumerate(_as(list, chunk.get("choices"))):
            if isinstance(choice, dict):
                index = choice.get("index")
                index = index if isinstance(index, int) else position
                if index not in self.choices:
                    self.choices[index] = {"delta": {"role": "assistant"}}
                _merge(self.choices[index], choice)

    def complete(self) -> bool:
        """Whether nothing of the answer can be missing, except usage and eco."""
        reasons = [choice.get("finish_reason") for choice in list(self.choices.values())]
        return self.done or self.whole is not None or (bool(reasons) and all(reasons))

    def refuse(self) -> None:
        """Raise what has ended the stream: each time anew, since a traceback holds its callers."""
        if self.failed:
            kind, args, details = self.failed
            raise kind(*args, **details)

    def completion(self) -> Completion:
        """The answer as far as it has come, {} before the first chunk; nobody else's to change."""
        completion, choices = Completion(_plain(self.whole or self.fields)), []
        completion.headers = self.headers
        for index, kept in sorted(self.choices.items()):
            choice = _plain(kept)
            message = {**choice.pop("delta"), **_as(dict, choice.get("message"))}
            choices.append({**choice, "index": index, "message": message})
        if self.fields:
            completion.pop("error", None)  # which is in the exception
            completion.update({"object": "chat.completion", "choices": choices})
            if self.routed:
                completion["lowrouter"] = _plain(self.routed)
        return completion


def _failed_part(answer: Json) -> Json | None:
    """What tells that an answer failed: an error in it or in a choice, or "error" as a reason."""
    choices = [_as(dict, choice) for choice in _as(list, answer.get("choices"))]
    for each in (answer, *choices):
        if _is_error(each):
            return each
    return answer if "error" in [choice.get("finish_reason") for choice in choices] else None


def _chunks(events: Iterable[tuple[str, str]], assembly: _Assembly) -> Iterator[Chunk]:
    """Yield a chunk for each event until [DONE]; an error in the stream is raised."""
    for event, data in events:
        try:
            value = _loads(data)
        except ValueError:
            value = data.strip()
        if value == "[DONE]":
            assembly.done = True
            return
        if event == "error":
            raise _refusal(StreamError, "failed in the stream", value)
        if isinstance(value, dict):
            chunk = Chunk(value)
            chunk.headers = assembly.headers
            failed = _failed_part(chunk) if '"error"' in data else None
            if not failed or chunk.get("choices"):
                assembly.add(chunk)
            elif assembly.fields:
                assembly.add(Chunk({k: chunk[k] for k in ("usage", "lowrouter") if k in chunk}))
            if failed:
                raise _refusal(StreamError, "failed in the stream", failed)
            yield chunk
        elif value and event in ("", "message"):  # other events are not for us [assumption]
            raise StreamError("sent an event that was cut, or is no JSON object", body=data)


# ---- model cache: all that the library writes to disk; a bad cache is a miss, never an error -----


class _ModelCache:
    """The model list of each key as JSON text: in memory, and in a file where a folder is set."""

    def __init__(self, folder: Any, base_url: str) -> None:
        self.folder, self.base_url = os.fsdecode(folder) if folder else "", base_url
        self.texts: dict[str, str] = {}

    def path(self, key: str) -> str:
        """Named by digests, since the key itself is written nowhere."""
        owners = (self.base_url.encode("utf-8"), key.encode("ascii"))
        names = [hashlib.sha256(each).hexdigest()[-16:] for each in owners]
        return os.path.join(self.folder, "models-{}-{}.json".format(*names))

    def read(self, key: str) -> tuple[float, list[Json]]:
        """Its age in seconds by the wall clock and a copy of the list; a miss is infinitely old."""
        path = self.path(key)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
            if self.folder and path not in self.texts:
                with open(path, encoding="utf-8") as file:
                    self.texts[path] = file.read(_ANSWER_LIMIT)
            record = _loads(self.texts[path])
            age = time.time() - record["saved"]
            if age >= 0 and _are_dicts(record["models"]):
                return age, record["models"]
        return float("inf"), []

    def write(self, key: str, listed: list[Json]) -> None:
        path = self.path(key)
        with contextlib.suppress(OSError, ValueError, RecursionError):
            text = self.texts[path] = json.dumps({"saved": time.time(), "models": listed})
            if not self.folder or json.dumps(key)[1:-1] in text:
                return
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=self.folder)  # with mode 0600
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(draft, path)
            except OSError:
                os.unlink(draft)


# ---- client: how an answer is read, whole or as a stream; then the two classes of the user -------


def _checked(call: _Call, data: Any) -> Completion:
    """The data as an answer; one that names another route than the pinned one is an error."""
    answer = Completion(_as(dict, data))
    answer.headers = call.response.headers
    for name, pin in call.pins.items():
        got, wanted = getattr(answer, name), str(pin).strip().lower()
        if isinstance(got, str) and got.strip().lower() not in ("", wanted):
            what = f"answered from {name} {got}, not from {pin}"
            whole = answer if "choices" in answer else None
            raise call.failure(RouteMismatchError(what), whole)
    return answer


def _whole(call: _Call) -> Completion:
    """The completion that comes as one JSON object."""
    completion = _checked(call, call.json())
    if not isinstance(completion.get("choices"), list):
        raise _refusal(BadResponseError, "sent no chat completion", completion)
    failed = _failed_part(completion)
    if failed:
        raise _refusal(BadResponseError, "failed in its answer", failed, completion=completion)
    return completion


def _pieces(call: _Call, assembly: _Assembly) -> Iterator[Chunk]:
    """The chunks of an answer, by the byte it begins with; of one that is no stream, all of it."""
    blocks, kind = iter(call.read, b""), call.response.headers.get_content_type()
    first = start = b""
    for block in blocks:
        first += block
        start = first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if start or len(first) > _BLOCK:
            break
    # of data, event, id, retry or a comment, whatever type a proxy has made of it
    streams = start in (b"d", b"e", b"i", b"r", b":")
    if kind == "text/event-stream":
        streams = start not in (b"{", b"<")
    if streams:
        yield from _chunks(_events(itertools.chain([first], blocks)), assembly)
    else:
        call.received += first
        assembly.whole = _whole(call)
        chunk = Chunk(assembly.whole)
        chunk.headers = assembly.headers
        yield chunk


def _read_stream(call: _Call, assembly: _Assembly) -> Generator[Chunk, None, None]:
    """Read a stream to its end: a whole answer, or an error with what has come."""
    try:
        for chunk in _pieces(call, assembly):
            if "lowrouter" in chunk:
                _checked(call, chunk)
            yield chunk
            call.clock.enter("idle")  # as of the next wait: the caller's own time is no silence
        if assembly.done:
            call.within(_SETTLE_SECONDS, call.read)  # keep the connection if the body ends now
        else:
            raise StreamError("ended the stream before the answer")
    except _EXPECTED as cause:
        error = call.failure(cause, assembly.completion())
        lost = isinstance(error, (StreamError, APITimeoutError))
        lost = lost and error.message is None  # by the road: the gateway has said nothing
        if not call.abandoned and not (lost and assembly.complete()):
            assembly.failed = error.__reduce__()
    except (Exception, KeyboardInterrupt, SystemExit):  # of a handler of signals
        call.close()
        raise
    call.close()
    assembly.refuse()


class Stream:
    """The chunks of one answer as they come: an iterator and a context manager.

    Iterating raises `BadResponseError`, `APITimeoutError` or `RouteMismatchError`, each with what
    has come as `completion`. A stream closed early, also by another thread, ends quietly.
    """

    def __init__(self, call: _Call) -> None:
        _checked(call, {})  # whose headers name the route before the first text
        call.streams = True
        self._call, self._assembly = call, _Assembly(call.response.headers)
        self._chunks = _read_stream(call, self._assembly)
        if call.response.headers.get_content_type() != "text/event-stream":
            first = list(itertools.islice(self._chunks, 1))  # an error, most likely
            self._chunks = (chunk for part in (first, self._chunks) for chunk in part)

    @property
    def completion(self) -> Completion:
        """What has been put together so far, in the type that `chat()` returns."""
        return self._assembly.completion()

    @property
    def generation_id(self) -> Any:
        """What `generation()` looks up; known before the first chunk, from the response headers."""
        return self.completion.generation_id

    def result(self) -> Completion:
        """Read to the end and return the whole answer; raises as iterating does, or when closed."""
        for _ in self:
            pass
        self._assembly.refuse()
        if not self._assembly.complete():
            what = "gave no whole answer: the stream was closed before its end"
            raise self._call.failure(StreamError(what), self.completion)
        return self.completion

    def close(self) -> None:
        """Stop reading; a thread that waits in the iteration is woken and ends it."""
        self._call.abandon()
        with contextlib.suppress(ValueError):  # that thread is amid it, and hangs up
            self._chunks.close()
            self._call.close()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Client:
    """Settings, and the warm connections to one gateway, for any number of threads.

    `timeout` bounds, in seconds, connecting (10 at most), the wait for an answer and each silence
    in it; `deadline` bounds a whole call. Settings that cannot be used raise `ConfigError`.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        model: str = _MODEL,
        route: Json | None = None,
        timeout: float = _TIMEOUT,
        deadline: float | None = None,
        max_retries: int = 2,
        headers: dict[str, str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        allow_http: bool = False,
    ) -> None:
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ConfigError(f"max_retries must be a whole number from 0 up, not {max_retries!r}")
        self._key = _Key(api_key)
        del api_key  # a traceback may show locals
        url = base_url or os.environ.get("LOWROUTER_BASE_URL") or _BASE_URL
        self._gateway = _Gateway(url, allow_http, ca_file)
        self._key.current()
        self._model, self._route, self._headers = model, route, _checked_headers(headers or {})
        self._timeout, self._deadline, self._ca_file = timeout, deadline, ca_file
        _Clock(timeout, deadline)  # which checks both
        directory = cache_dir or os.environ.get("LOWROUTER_CACHE_DIR")
        self._cache = _ModelCache(directory, self._gateway.url)
        self._pool, self._max_retries = _Pool(self._gateway), max_retries

    def __repr__(self) -> str:
        if not hasattr(self, "_model"):
            return "Client(...)"  # amid its making, in a traceback that shows locals
        key = "..." + (self._key.value[-4:] if len(self._key.value) > 8 else "")
        return f"Client({key!r}, base_url={self._gateway.url!r}, model={self._model!r})"

    def __reduce__(self) -> Any:
        raise TypeError("a Client holds sockets: do not pickle it, make one where it is used")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up the kept connections; streams that are under way go on."""
        self._pool.close()

    def _call(self, method: str, path: str, body: Any = None, options: Json | None = None) -> _Call:
        given = {name: value for name, value in (options or {}).items() if value is not None}
        clock = _Clock(given.get("timeout", self._timeout), given.get("deadline", self._deadline))
        key, data = self._key.current(), b"" if body is None else _json_bytes(body)
        call = _Call(self._pool, clock, key, method, path, data, self._headers)
        call.pins, call.max_retries = _pins(_as(dict, body), self._headers), self._max_retries
        return call

    def _chat_call(self, messages: Any, streams: bool, options: Json) -> _Call:
        body = _chat_body(messages, streams, self._model, self._route, options)
        return self._call("POST", "/chat/completions", body, options)  # [seed]

    def chat(self, /, messages: str | list[Json], **options: Any) -> Completion:
        """Ask, and return the whole answer; raises a `LowRouterError`.

        `model`, `route` (pins `region` and `provider` [seed]), `timeout` and `deadline` (seconds)
        are as in `Client`; every other keyword is a field of the JSON body, such as `temperature`.
        """
        return self._chat_call(messages, False, options).send(_whole)

    def stream(self, /, messages: str | list[Json], **options: Any) -> Stream:
        """Ask as `chat()` does, raising a refusal, and return the chunks as they come."""
        return self._chat_call(messages, True, options).send(Stream)

    def curl(self, /, messages: str | list[Json], stream: bool = False, **options: Any) -> str:
        """Return the curl command that sends what `chat()` or `stream()` would send."""
        body = _chat_body(messages, stream, self._model, self._route, options)
        authority = "--capath" if self._gateway.ca_path else "--cacert"
        flags = ["-N"] * bool(stream) + [authority, str(self._ca_file)] * bool(self._ca_file)
        url, key_file = self._gateway.url + "/chat/completions", bool(self._key.file)
        return _curl_command(url, body, self._headers, flags, key_file)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Send any request to the gateway; return its JSON, None for an empty answer."""
        if not isinstance(path, str) or not re.fullmatch("[A-Za-z]+", _as(str, method)):
            raise ConfigError(f"request() takes 'GET', '/providers', not {method!r}, {path!r}")
        safe = "/?%:@!$&'()*+,;=~"  # what stands in a path and its query as it is
        path = "/" + urllib.parse.quote(path.lstrip("/"), safe=safe, errors="surrogatepass")
        call = self._call(method.upper(), path, body)
        data = call.send(_Call.json)
        _checked(call, data)  # if it names its route, that is the pinned one
        return data

    def models(self, refresh: bool = False) -> list[Json]:
        """Return the routable models [seed], kept for an hour; only their `id` is sure.

        When the gateway cannot be reached, an older list is returned with a warning.
        """
        call = self._call("GET", "/models")  # [seed]
        age, kept = self._cache.read(call.key)
        if age <= _CACHE_SECONDS and not refresh:
            return kept
        try:
            data = call.send(_Call.json)
        except APIConnectionError as error:
            if not kept:
                raise
            warnings.warn(f"using the models of {age / 60:.0f} minutes ago: {error}", stacklevel=2)
            return kept
        listed = _as(dict, data).get("data", data)  # in an envelope or as it is [assumption]
        if not _are_dicts(listed):
            raise call.failure(BadResponseError("sent no list of models", body=data))
        self._cache.write(call.key, listed)
        return list(listed)

    def generation(self, generation_id: str, wait: float = 0.0) -> Json:
        """Return the record of an answer [seed]: tokens, cost, eco numbers, routing trace.

        For `wait` seconds one that is not written yet is asked for again; then `NotFoundError`.
        """
        if not isinstance(generation_id, str) or generation_id in ("", ".", ".."):
            raise ConfigError(f"a generation id is a text such as gen_01J9, not {generation_id!r}")
        segment = urllib.parse.quote(generation_id, safe="", errors="surrogatepass")  # it is opaque
        call = self._call("GET", "/generation/" + segment)
        end = time.monotonic() + _seconds("wait", wait)
        while True:
            try:
                record = _as(dict, call.send(_Call.json))
                break
            except NotFoundError:
                left = end - time.monotonic()
                if left <= 0 or not call.clock.pause(min(left, _POLL_SECONDS)):
                    raise
        record = record if "generation_id" in record else _as(dict, record.get("data")) or record
        if not record:
            raise call.failure(BadResponseError(f"sent no record of {generation_id}"))
        return record


# ---- functions: one client for the whole program, made at the first call -------------------------

# REQUEST_METHOD tells CGI, where HTTP_PROXY may be a stranger's header and is not used
_VARIABLES = """LOWROUTER_API_KEY LOWROUTER_API_KEY_FILE LOWROUTER_BASE_URL LOWROUTER_CACHE_DIR
HTTPS_PROXY https_proxy HTTP_PROXY http_proxy NO_PROXY no_proxy REQUEST_METHOD
SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE""".split()


@functools.lru_cache(maxsize=1)  # what is under way keeps the last one until it ends
def _made_for(*environment: int) -> Client:
    """By hashes, since a traceback may show the arguments."""
    return Client()


def _client(**options: Any) -> Client:
    """The shared client, made anew when a variable of the environment has changed."""
    _check_names(options)
    return _made_for(*map(hash, map(os.environ.get, _VARIABLES)))


def chat(messages: str | list[Json], **options: Any) -> Completion:
    """Ask, and return the whole answer: `Client.chat` of the shared client."""
    return _client(**options).chat(messages, **options)


def stream(messages: str | list[Json], **options: Any) -> Stream:
    """Ask, and return the chunks as they come: `Client.stream` of the shared client."""
    return _client(**options).stream(messages, **options)


def curl(messages: str | list[Json], stream: bool = False, **options: Any) -> str:
    """Return the curl command of a call: `Client.curl` of the shared client."""
    return _client(**options).curl(messages, stream, **options)


def request(method: str, path: str, body: Any = None) -> Any:
    """Send any request below the base URL: `Client.request` of the shared client."""
    return _client().request(method, path, body)


def models(refresh: bool = False) -> list[Json]:
    """Return the routable models: `Client.models` of the shared client."""
    return _client().models(refresh)


def generation(generation_id: str, wait: float = 0.0) -> Json:
    """Return the record of an answer: `Client.generation` of the shared client."""
    return _client().generation(generation_id, wait)


# ---- command line: calls what is public; the only room that prints ----------------------------

_EXAMPLES = """\
  lowrouter chat "In one sentence, what is a vector database?"
  git diff | lowrouter chat --region eu-west -p temperature=0 "Review this."
  lowrouter models eu-west
  lowrouter models --json | jq -r '.[].id'
  lowrouter generation gen_01J9
  lowrouter generation --wait 10 --json "$id"
  lowrouter batch in.jsonl out.jsonl --workers 16
  lowrouter batch in.jsonl "out-$I.jsonl" --shard "$I/4"
  lowrouter get /providers
  lowrouter get /credits
""".splitlines()
_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # characters that a terminal obeys
_UNITS = {"energy_wh": "Wh", "carbon_g": "gCO2e", "latency_ms": "ms", "cost_credits": "credits"}
_COLUMNS = "context|pric|cost|region|capabilit|vision|_use$|_output$|^eco|band"  # of the models
_CELL = 12  # characters that a cell keeps on a narrow terminal: of most names enough to tell
_TOTALS = {"total_tokens": "tokens", "cost": "cost", "energy_wh": "Wh", "carbon_g": "gCO2e"}
_DRAFT = ".lowrouter"  # behind the name of OUT while it is rewritten
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 0.0)  # seconds after the tries of a line; 0.0: give up
# refusals that all other lines would get, too, unless they pass or are of a line's own route
_FATAL = (AuthenticationError, InsufficientCreditsError, RateLimitError, NoProviderError)
_KEPT = "what was written is kept: once it can be, the same command goes on"
_NO_STREAM = {"stream": None, "stream_options": None}  # a line of OUT is a whole answer
_PATIENCE = 5.0  # seconds that Ctrl-C leaves to what is under way: who waits longer presses again


def _put(text: str, stream: Any = None) -> None:
    """Write at once; what a terminal shows must not steer it."""
    stream = stream or sys.stdout
    if stream.isatty():
        text = re.sub(_CONTROL, lambda match: f"\\u{ord(match[0]):04x}", text)  # also for JSON
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        if stream is not sys.stderr:  # what is told beside the answer may get lost
            raise


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _parsed(text: str | bytes) -> Any:
    """What JSON says; anything else as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _cell(value: Any) -> str:
    """Any JSON in one line, without its quotes and brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return "not given" if value is None else " ".join(text.split())


def _exit_status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, (ValueError, TypeError)) or getattr(error, "filename", None) is not None:
        return 2  # also a file that cannot be opened
    if not isinstance(error, LowRouterError):
        return 1
    if isinstance(error, RouteMismatchError) or error.pinned:
        return 6
    if error.status in (401, 403):
        return 3
    if error.status:
        return 5 if error.status >= 500 or error.status in (408, 409, 429) else 4
    if error.completion and error.completion.text:
        return 8
    return 7 if isinstance(error, (APIConnectionError, StreamError)) and not error.message else 1


def _request(client: Client, args: Any) -> Json:
    """The body of --body, overridden by -p, and both by the options that have a name."""
    body: Any = {}
    if args.body == "-":
        body = _parsed(getattr(sys.stdin, "buffer", sys.stdin).read())
    elif args.body is not None:
        with open(args.body, "rb") as file:
            body = _parsed(file.read())
    fields = [field.partition("=") for field in args.p]
    if not isinstance(body, dict) or not all(name and equals for name, equals, _ in fields):
        raise ConfigError("--body takes a file with a JSON object, -p takes KEY=JSON")
    body.update({name: _parsed(value) for name, _, value in fields})
    prompts = [] if args.prompt == "-" else [args.prompt]
    if args.prompt == "-" or not sys.stdin.isatty():
        with contextlib.suppress(OSError):  # below nohup it is no file to read
            prompts.append(sys.stdin.read().rstrip("\r\n"))  # `echo` adds one
    asked = "\n\n".join(filter(None, prompts)) or body.get("messages")
    if not asked:
        raise ConfigError("no prompt: give it as an argument, through a pipe or with --body")
    body["messages"] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    pins = {"region": args.region, "provider": args.provider}
    pins = {name: pin for name, pin in pins.items() if pin is not None}
    if "" in (args.m, *pins.values()):
        raise ConfigError("-m, --region and --provider take a name: is a variable empty?")
    client.curl(**{**body, "stream": False})  # refuses what is no body
    if args.s:
        body["messages"] = [{"role": "system", "content": args.s}, *body["messages"]]
    if pins:
        body["route"] = {**(body.get("route") or {}), **pins}
    return {**body, "model": args.m or body.get("model")}


def _chat(client: Client, args: Any) -> None:
    """Print the text as it comes, also what came before an error, and then what it took."""
    body, shown, failure = _request(client, args), 0, None
    streams = body.pop("stream", None) is not False and not args.no_stream
    if args.curl:
        _put(client.curl(stream=streams, **body) + "\n")
        return
    try:
        answer: Any = client.stream(**body) if streams else client.chat(**body)
        for chunk in answer if streams and not args.json else ():
            _put(chunk.text)
            shown += len(chunk.text)
        answer = answer.result() if streams else answer
    except LowRouterError as error:
        if _exit_status(error) != 8:
            raise
        answer, failure = error.completion, error
    _put(_dumped(answer) if args.json else answer.text[shown:])
    _put("\n" if sys.stdout.isatty() and not args.json else "")
    if failure:
        raise failure
    if args.v or sys.stderr.isatty():
        names = "generation_id model provider region finish_reason".split()
        told = {name: getattr(answer, name) for name in names}
        usage, eco = answer.usage or {}, answer.eco or {}
        told.update({"tokens": usage.get("total_tokens"), "Wh": eco.get("energy_wh")})
        told.update({"gCO2e": eco.get("carbon_g"), "accuracy": eco.get("accuracy")})
        _put(_cell(told) + "\n", sys.stderr)


def _table(models: list[Json], names: list[str]) -> Iterator[str]:
    """These columns of the models, as wide as the terminal: the widest ones give way."""
    from shutil import get_terminal_size

    rows = sorted([_cell(model.get(name, "")) for name in names] for model in models)
    rows = [[name.upper() for name in names], *rows] if rows else []
    widths = [max(map(len, column)) for column in zip(*rows)]
    width = get_terminal_size((10000, 24)).columns  # into a pipe nothing is cut
    while sum(widths) + 2 * len(widths) > width and max(widths[1:], default=0) > _CELL:
        widths[widths.index(max(widths[1:]), 1)] -= 1  # not of an id, which is there to be copied
    for row in rows:
        cells = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(row, widths)]
        line = "  ".join(cell.ljust(w) for cell, w in zip(cells, widths))
        yield line[: max(width, widths[0])].rstrip() + "\n"


def _models(client: Client, args: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = client.models(args.refresh)
    _put("".join(f"lowrouter: {each.message}\n" for each in caught), sys.stderr)
    names = [name for model in models for name in model if re.search(_COLUMNS, name)]
    names, word = ["id", *dict.fromkeys(names)], args.filter.lower()
    models = [m for m in models if word in _cell([m.get(name, "") for name in names]).lower()]
    _put(_dumped(models) if args.json else "".join(_table(models, names)))


def _tree(value: Any, indent: str = "") -> Iterator[str]:
    """Any JSON as indented lines, with the units that are documented."""
    for name, each in value.items() if isinstance(value, dict) else [("-", each) for each in value]:
        if each and isinstance(each, (dict, list)):
            yield f"{indent}{name}\n"
            yield from _tree(each, indent + "  ")
        else:
            yield f"{indent + name:<24} {_cell(each)} {_UNITS.get(name, '')}".rstrip() + "\n"


def _generation(client: Client, args: Any) -> None:
    record = client.generation(args.id, args.wait)
    shown = {**record, "eco": record.get("eco")}
    _put(_dumped(record) if args.json else "".join(_tree(shown)))


def _get(client: Client, args: Any) -> None:
    _put(_dumped(client.request("GET", args.path)))


def _jobs(source: Iterable[bytes], client: Client) -> Iterator[tuple[int, str, Json]]:
    """Line number, id and body of each request; at the end an error if some lines are none."""
    lines: dict[str, int] = {}
    problems = []
    for number, line in filter(lambda each: each[1].strip(), enumerate(source, 1)):
        job = _parsed(line)
        job = job if isinstance(job, dict) else {"body": None}  # which is refused below
        custom_id, body = job.pop("custom_id", f"line-{number}"), job.get("body", job)
        try:
            if not isinstance(body, dict) or not isinstance(custom_id, str):
                raise ConfigError("line and body are JSON objects, custom_id is a text")
            client.curl(**{"messages": None, **body, "stream": False})  # refuses what is no body
            if lines.setdefault(custom_id, number) != number:
                raise ConfigError(f"its custom_id is that of line {lines[custom_id]}")
            yield number, custom_id, body
        except (LowRouterError, TypeError) as error:
            problems.append(f"line {number} is no request: {error}")
    if problems:
        raise ConfigError("; ".join(problems[:9]) + f" ({len(problems)} bad lines, nothing sent)")


def _results(out: Any) -> Iterator[tuple[bytes, str, Any]]:
    """Line, id and answer, None for a failure, of what is in OUT; a torn last line is mended."""
    out.seek(0)
    for line in filter(bytes.strip, out):
        record, whole = _parsed(line), line.endswith(b"\n")
        try:
            answer = None if record["error"] else Completion(**record["response"]["body"])
            custom_id = "" + record["custom_id"]  # a str, or it is not ours
        except (TypeError, KeyError):
            # what `_parsed` gives back as it is was no JSON: a line of ours that was torn
            if whole or record is not line or not line.startswith(b'{"custom_id"'[: len(line)]):
                raise ConfigError(f"{out.name} is no file that a batch has written") from None
            out.truncate(out.tell() - len(line))
            return
        yield line, custom_id, answer
        if not whole:
            out.write(b"\n")


def _rewrite(out: Any) -> str:
    """Rewrite OUT with one line per id; return its totals."""
    last = {custom_id: number for number, (_, custom_id, _) in enumerate(_results(out))}
    spent = []
    with open(out.name + _DRAFT, "wb") as file:
        for number, (line, custom_id, answer) in enumerate(_results(out)):
            if last[custom_id] == number:
                file.write(line)
                told = answer and {**(answer.usage or {}), **(answer.eco or {})}
                spent += [] if told is None else [[told.get(name) for name in _TOTALS]]
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, os.fstat(out.fileno()).st_mode & 0o777)
    out.close()  # or Windows could not replace it
    os.replace(file.name, out.name)
    totals = f"{len(last)} requests, {len(last) - len(spent)} failed"
    for name, column in zip(_TOTALS.values(), zip(*spent)):
        given = [n for n in column if isinstance(n, (int, float)) and abs(n) < 1e15]  # no NaN
        none = f" ({len(column) - len(given)} gave none)" if len(given) < len(column) else ""
        totals += f", {sum(given):,.12g} {name}{none}"
    return totals


def _record(custom_id: str, outcome: Any) -> Json:
    """The line of OUT for an answer or an error, in the shape of OpenAI's batches."""
    headers, status = getattr(outcome, "headers", None) or {}, getattr(outcome, "status", 200)
    code = getattr(outcome, "code", None) or type(outcome).__name__
    response = {"status_code": status, "request_id": headers.get("X-Request-Id")}
    response["body"] = getattr(outcome, "body", outcome)
    error = {"code": code, "message": str(outcome)} if isinstance(outcome, Exception) else None
    return {"custom_id": custom_id, "response": response if status else None, "error": error}


class _Batch:
    """Requests under way, and what has become of those before."""

    def __init__(self, client: Client, out: Any, total: int, quiet: bool) -> None:
        from threading import Event

        self.client, self.out, self.total, self.quiet = client, out, total, quiet
        self.stop, self.done, self.failed, self.problem = Event(), 0, 0, ""
        self.began = self.start = time.monotonic() - 0.001  # the past: a rate divides by it

    def ask(self, custom_id: str, body: Json) -> Json | None:
        """Send a request and return its line for OUT; None when the batch was stopped before."""
        pauses, done = iter(_PAUSES), self.done
        while not self.stop.wait(max(0.0, self.start - time.monotonic())):
            if self.start > time.monotonic():
                continue  # meanwhile another line was told to wait longer
            try:
                return _record(custom_id, self.client.chat(**{**body, **_NO_STREAM}))
            except LowRouterError as caught:
                error = caught
            if isinstance(error, RateLimitError) and self.done > done:
                pauses, done = iter(_PAUSES), self.done  # others get through, so this one shall
            pause = next(pauses)
            wait = error.retry_after or pause
            if isinstance(error, RateLimitError):  # the others have to wait, too
                self.start = max(self.start, time.monotonic() + wait)
            lost = error.retryable and error.phase in ("connect", "deadline") and not pause
            if lost or (isinstance(error, _FATAL) and not (error.retryable or error.pinned)):
                self.stop.set()
            if not pause or not error.retryable or self.stop.wait(wait):
                return _record(custom_id, error)
        return None

    def write(self, tasks: set[Any]) -> None:
        """Append what has become of finished tasks."""
        for record in filter(None, (task.result() for task in tasks)):
            line = json.dumps(record, ensure_ascii=False) + "\n"
            self.out.write(line.encode("utf-8", "backslashreplace"))
            self.out.flush()
            self.done, self.failed = self.done + 1, self.failed + (record["error"] is not None)
            self.problem = self.problem or (record["error"] or {}).get("message", "")
            if not self.quiet:
                self.show()

    def show(self) -> None:
        """Tell how far it is: by a bar on a terminal, elsewhere by a line for each tenth."""
        from shutil import get_terminal_size

        tenths, rate = 10 * self.done // self.total, self.done / (time.monotonic() - self.began)
        left = (self.total - self.done) / rate
        text = f"{self.done} of {self.total}, {self.failed} failed, {rate:.1f}/s, {left:.0f} s left"
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            width = get_terminal_size().columns - 1
            bar, end = f"[{'#' * tenths:<10}] {text}"[:width], "\r" if left else "\n"
            print(bar.ljust(width), end=end, file=sys.stderr, flush=True)
        elif tenths > 10 * (self.done - 1) // self.total:
            _put(text + "\n", sys.stderr)

    def run(self, jobs: Iterator[tuple[int, str, Json]], workers: int) -> None:
        """Keep the workers busy; after Ctrl-C they have some seconds for what is under way."""
        from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

        pool, jobs = ThreadPoolExecutor(workers), itertools.islice(jobs, self.total)
        tasks = (pool.submit(self.ask, i, body) for _, i, body in jobs if not self.stop.is_set())
        under_way: set[Any] = set()
        try:
            under_way.update(itertools.islice(tasks, workers))
            while under_way:
                done = wait(under_way, return_when=FIRST_COMPLETED).done
                self.write(done)
                under_way -= done
                under_way.update(itertools.islice(tasks, len(done)))
        except (KeyboardInterrupt, ConfigError) as reason:
            self.stop.set()
            self.write(wait(under_way, _PATIENCE).done)
            why = "IN has changed" if isinstance(reason, ConfigError) else "interrupted"
            raise type(reason)(f"{why}; the same command goes on with the batch") from None


def _batch(client: Client, args: Any) -> int:
    """Send what is not done yet; 9 when lines have failed."""
    shard = re.fullmatch("([0-9]+)/([0-9]+)", args.shard)
    part, parts = map(int, shard.groups() if shard else (0, 0))
    if not 0 < part <= parts or not 1 <= args.workers <= 1000:
        raise ConfigError("--shard takes I/N with I from 1 to N, --workers a number up to 1000")
    with open(args.source, "rb") as source, open(os.path.realpath(args.out), "a+b") as out:
        if not os.path.isfile(out.name) or os.path.samefile(source.name, out.name):
            raise ConfigError("IN and OUT must be two regular files")
        try:
            os.lockf(out.fileno(), os.F_TLOCK, 0)  # two runs would pay twice and lose lines
        except BlockingIOError:
            raise ConfigError(f"{out.name} is in use: each run and shard needs its own") from None
        except (AttributeError, OSError):
            pass  # Windows, and file systems without locks
        last = {custom_id: answer is not None for _, custom_id, answer in _results(out)}
        jobs = (job for job in _jobs(source, client) if (job[0] - part) % parts == 0)
        todo = {custom_id for _, custom_id, _ in jobs if not last.get(custom_id)}
        source.seek(0)
        batch = _Batch(client, out, len(todo), args.q)
        try:
            batch.run((job for job in _jobs(source, client) if job[1] in todo), args.workers)
            client.close()  # its descriptors may be the last ones
            totals = _rewrite(out)
        except OSError as error:
            batch.stop.set()
            with contextlib.suppress(OSError):
                os.unlink(out.name + _DRAFT)
            with contextlib.suppress(OSError):
                out.close()  # which fails again, and then had the last word
            raise OSError(f"{args.out} cannot be written ({error.strerror}); {_KEPT}") from None
    hint = f", {len(todo) - batch.done} not sent; first: {batch.problem}; the same command retries"
    _put(totals + hint * bool(batch.failed) + "\n", sys.stderr)
    return 9 if batch.failed else 0


def _utf8(argument: str) -> str:
    """An argument as UTF-8, whatever the locale made of it; names of files stay as they are."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _arguments(chat: Any, models: Any, generation: Any, batch: Any, get: Any) -> None:
    """What each command takes."""
    chat("prompt", nargs="?", default="", type=_utf8, help="a pipe goes below it, or in its place")
    chat("-m", metavar="MODEL", type=_utf8, help="the model [lowrouter/auto]")
    chat("-s", metavar="TEXT", type=_utf8, help="a system message")
    chat("--region", metavar="R", type=_utf8, help="an answer from there, or none")
    chat("--provider", metavar="P", type=_utf8, help="an answer from there, or none")
    field = "a field of the body; bare words are strings"
    chat("-p", metavar="KEY=JSON", type=_utf8, action="append", default=[], help=field)
    chat("--body", metavar="FILE", help="a whole request, which other options override")
    chat("--no-stream", action="store_true", help="wait for all of it")
    chat("--curl", action="store_true", help="print the curl command instead")
    chat("-v", action="store_true", help="route, tokens and eco numbers on stderr")
    models("filter", nargs="?", default="", type=_utf8, help="only those with this in their row")
    models("--refresh", action="store_true", help="ask again, even if the list is young")
    generation("id", type=_utf8, help="route, tokens, cost and eco numbers of this answer")
    generation("--wait", type=float, default=0.0, metavar="S", help="seconds, for one to come")
    batch("source", metavar="IN", help="one request a line: {custom_id, body} or a body")
    batch("out", metavar="OUT", help="the same command goes on, or retries what failed")
    batch(
        "--workers", type=int, default=8, metavar="N", help="[8]; a kill makes at most N go twice"
    )
    batch("--shard", default="1/1", metavar="I/N", help="line I of every N, for CI matrices")
    batch("-q", action="store_true", help="no progress on stderr")
    get("path", type=_utf8, help="such as /providers")


def _parser() -> Any:
    from argparse import ArgumentParser, RawDescriptionHelpFormatter

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            dash = ", and put -- before a prompt that begins with a dash"
            raise ConfigError(f"{message}; see --help" + dash * ("unrecognized" in message))

    def command(run: Any, usage: str, what: str) -> Any:
        name, usage = usage.split()[0], f"lowrouter {usage} [options]"
        examples = "\n".join(line for line in _EXAMPLES if f"lowrouter {name} " in line)
        parser = commands.add_parser(name, usage=usage, help=what, epilog=examples, **strict)
        parser.set_defaults(run=run)
        add: Any = parser.add_argument
        silence = "seconds for connecting, the answer, a silence in it [600]"
        add("--json", action="store_true", help="JSON on stdout, errors as JSON on stderr")
        add("--timeout", type=float, default=_TIMEOUT, metavar="S", help=silence)
        add("--deadline", type=float, metavar="S", help="seconds for a whole call")
        add("--allow-http", action="store_true", help="plain http also to other machines")
        return add

    strict: Any = {"allow_abbrev": False, "formatter_class": RawDescriptionHelpFormatter}
    more = "The key is that of LOWROUTER_API_KEY(_FILE). COMMAND --help tells its options."
    parser = Parser("lowrouter", epilog=more, **strict)
    version = f"lowrouter {__version__} (Python {sys.version.split()[0]})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _arguments(
        command(_chat, "chat [PROMPT]", "stream an answer"),
        command(_models, "models [FILTER]", "list the models"),
        command(_generation, "generation ID", "show the record of an answer"),
        command(_batch, "batch IN OUT", "send the requests of a file"),
        command(_get, "get PATH", "get any other path below the base URL"),
    )
    return parser


def _run(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.path.join(folder, "lowrouter") if os.path.isabs(folder) else None
    cache = os.environ.get("LOWROUTER_CACHE_DIR") or cache
    tries = 0 if args.run is _batch else 2  # of a batch all workers wait together
    limits = {name: getattr(args, name) for name in ("timeout", "deadline", "allow_http")}
    with Client(max_retries=tries, cache_dir=cache, **limits) as client:
        return args.run(client, args) or 0


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; without `argv`, end the program with it."""
    import signal  # not amid a Ctrl-C

    words = sys.argv[1:] if argv is None else argv
    for name in ("stdin", "stdout", "stderr"):
        stream: Any = getattr(sys, name) or io.StringIO()  # it was closed
        setattr(sys, name, stream)
        errors = "replace" if name == "stdin" else "backslashreplace"
        with contextlib.suppress(AttributeError, ValueError):  # a test's, or in use already
            stream.reconfigure(encoding="utf-8", errors=errors, newline="\n", line_buffering=True)
    try:
        status = _run(words)
    except SystemExit:
        status = 0  # --help
    except BrokenPipeError:
        status = 0  # the reader has had enough, so nothing is flushed to it at the end either
        with contextlib.suppress(OSError):
            sys.stdout.close()
    except (Exception, KeyboardInterrupt) as error:
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        status, text = _exit_status(error), " ".join(str(error).split())
        text = text or ("interrupted" if status == 130 else type(error).__name__)
        told = {"type": type(error).__name__, "message": text, "exit": status}
        for name in ("status", "code", "generation_id", "request_id", "retry_after"):
            told[name] = getattr(error, name, None)
        line = json.dumps({"error": told}) if "--json" in words else f"lowrouter: {text}"
        below = "\n" if status == 130 and sys.stderr.isatty() else ""  # what was being written
        _put(f"{below}{line}\n", sys.stderr)
    if argv is None:
        os._exit(status)  # the interpreter's own end would wait for what is under way, and flush
    return status


if __name__ == "__main__":
    sys.exit(main())
