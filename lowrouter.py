# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The lowrouter authors
# From the lowrouter project. To update, replace this file, and read the changelog in the README.
"""A client for the LowRouter gateway in one file. A call returns a complete answer or raises.

    print(lowrouter.chat("In one sentence, what is a vector database?").text)
    with lowrouter.stream("Count to 5 slowly") as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)

Settings are arguments of `Client`, or else environment variables, where empty means unset:
LOWROUTER_API_KEY, LOWROUTER_API_KEY_FILE, LOWROUTER_BASE_URL; HTTPS_PROXY, NO_PROXY;
SSL_CERT_FILE, SSL_CERT_DIR, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE. Python's `ssl` also reads
SSLKEYLOGFILE, which lets its owner decrypt the traffic.

The sections follow the data, and each one uses only names that are defined above it:

    messages -> body -> Request -> response -> blocks -> lines -> events -> Chunk, ... -> Completion

The library ends where the banner says "command line". A reviewer who vendors only the library
can stop reading there, and can delete everything from there to the licence.

Facts about the gateway are marked [docs] if its documentation states them, and [assumption] if
they follow the practice of OpenAI and OpenRouter.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import email.utils
import http.client
import itertools
import json
import os
import random
import re
import socket
import ssl
import sys
import time
import urllib.parse
import urllib.request
import warnings

TYPE_CHECKING = False  # type checkers treat it as True; importing typing would cost 3 ms
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Iterator, NoReturn, TypeVar

    Json = dict[str, Any]  # an object
    T = TypeVar("T")

__version__ = "2.0.0"
__all__ = [
    "APIConnectionError", "APIStatusError", "APITimeoutError", "AuthenticationError",
    "BadResponseError", "Chunk", "Client", "Completion", "ConfigError", "InsufficientCreditsError",
    "LowRouterError", "NoProviderError", "NotFoundError", "PermissionDeniedError",
    "RateLimitError", "RouteMismatchError", "Stream", "StreamError",
    "chat", "curl", "generation", "models", "request", "stream",
]  # fmt: skip

_BASE_URL = "https://lowrouter.ai/api/v1"  # [docs]
_MODEL = "lowrouter/auto"  # the gateway's default route [docs]
_TIMEOUT = 600.0  # seconds; an answer that is not streamed can be silent for minutes
_CONNECT_SECONDS = 10.0  # for TCP, CONNECT and TLS together; a live host needs a fraction of it
_ERROR_BODY_SECONDS = 5.0  # the status of an error says more than its body
_DRAIN_SECONDS = 0.05  # to wait for EOF after [DONE]; a longer wait costs more than reconnecting
_IDLE_SECONDS = 30.0  # load balancers drop idle connections after 60 s or more
_KEEPALIVE_SECONDS = 60  # NAT gateways forget a silent connection after 240 s or more
_LONGEST_WAIT = 1e6  # seconds (11 days), also for "no limit"; poll() takes 2**31 ms at most
_RETRY_DELAY = 0.5  # seconds before the first retry; doubled for each further one [assumption]
_LONGEST_RETRY_DELAY = 8.0  # seconds [assumption]
_LONGEST_RETRY_AFTER = 60.0  # seconds; a longer wait is the caller's decision [assumption]
_POLL_SECONDS = 0.5  # between two requests for a record that is not written yet [assumption]
_MODELS_SECONDS = 3600.0  # the model list is stable within a user session [docs]
_SHORTEST_KEY = 4  # characters; shorter keys would match ordinary words in messages
_SHORTEST_KEY_PART = 10  # characters that are redacted; all keys begin with `lr-sk-` [docs]
_BLOCK = 1 << 16  # bytes per read: four TLS records
_SEND_BLOCK = 1 << 14  # bytes per send: one TLS record
_ERROR_BODY_LIMIT = 1 << 16  # bytes
_MESSAGE_LIMIT = 300  # characters quoted from a body in a message: a few lines of a terminal
_EVENT_LIMIT = 1 << 24  # bytes of one event of a stream; an image in base64 fits
_LINE_OVERHEAD = 50  # bytes that a line takes in memory besides its characters
_ANSWER_LIMIT = 1 << 26  # bytes of an answer that is not streamed
_MAX_DEPTH = 50  # levels of JSON that are merged and copied; Python allows 1,000 nested calls

# ---- answers: dicts with exactly the JSON that arrived -------------------------------------------
# Properties look at choice 0, and never raise: a field of the wrong type counts as missing.


def _dict_or_empty(value: Any) -> Json:
    if isinstance(value, dict):
        return value
    return {}


def _list_or_empty(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return []


def _dicts(value: Any) -> list[Json]:
    """The objects in a list. Everything else is passed over."""
    return [item for item in _list_or_empty(value) if isinstance(item, dict)]


def _str_or_none(value: Any) -> str | None:
    if isinstance(value, str) and value.strip():
        return value.strip()
    return None


def _text_of(content: Any) -> str:
    """The text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in _dicts(content)]
    return "".join(text for text in texts if isinstance(text, str))


class _Answer(dict):  # type: ignore[type-arg]
    """What `Completion` and `Chunk` have in common."""

    #: The headers of the response, looked up without regard to case.
    headers = http.client.HTTPMessage()

    def _choice(self) -> Json:
        for choice in _dicts(self.get("choices")):
            if choice.get("index") in (0, None):
                return choice
        return {}

    def _route_field(self, name: str) -> str | None:
        """A field of the `lowrouter` block, or else of the headers, which repeat it [docs]."""
        block = _dict_or_empty(self.get("lowrouter"))
        header = self.headers.get("X-LowRouter-" + name.replace("_", "-"))
        return _str_or_none(block.get(name)) or _str_or_none(header)

    @property
    def message(self) -> Json:
        """The message of choice 0, or the delta of a chunk; {} when there is none."""
        choice = self._choice()
        return _dict_or_empty(choice.get("message") or choice.get("delta"))

    @property
    def text(self) -> str:
        """The text of choice 0, "" when there is none."""
        return _text_of(self.message.get("content"))

    @property
    def reasoning(self) -> str:
        """The reasoning of the model, "" when the gateway does not return it."""
        message = self.message
        return _text_of(message.get("reasoning") or message.get("reasoning_content"))

    @property
    def tool_calls(self) -> list[Any]:
        """The tool calls of choice 0 as OpenAI's dicts, [] when there are none."""
        return _list_or_empty(self.message.get("tool_calls"))

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended: "stop", "length", "tool_calls", ...; None until then."""
        return _str_or_none(self._choice().get("finish_reason"))

    @property
    def model(self) -> str | None:
        """The model that answered: the resolved one, not the name that was sent [docs]."""
        return _str_or_none(self.get("model"))

    @property
    def usage(self) -> dict[str, Any] | None:
        """Token counts and, where the gateway sends it, `cost`; None without them."""
        return _dict_or_empty(self.get("usage")) or None

    @property
    def generation_id(self) -> str | None:
        """The id that `generation()` looks up; it is opaque [docs]."""
        return self._route_field("generation_id")

    @property
    def provider(self) -> str | None:
        """The id of the upstream provider, None when it is not named [docs]."""
        return self._route_field("provider")

    @property
    def region(self) -> str | None:
        """The region that answered, None when it is not named [docs]."""
        return self._route_field("region")

    @property
    def eco(self) -> dict[str, Any] | None:
        """As sent: `energy_wh` in Wh, `carbon_g` in g CO2e, `accuracy`; None if absent [docs]."""
        return _dict_or_empty(_dict_or_empty(self.get("lowrouter")).get("eco")) or None


class Completion(_Answer):
    """A complete answer: OpenAI's `chat.completion` object with a `lowrouter` block [docs]."""


class Chunk(_Answer):
    """A piece of a streamed answer: OpenAI's `chat.completion.chunk` object."""

    added_text: str | None = None  # `Stream` sets it: it depends on the chunks that came before

    @property
    def text(self) -> str:
        """What this chunk adds to the text of choice 0, "" when it adds nothing."""
        if self.added_text is None:
            return super().text
        return self.added_text


# ---- errors: whose fault it is, what to do, and what was received --------------------------------
# Everything that is quoted from outside passes `_redact` before it leaves this module.


class LowRouterError(Exception):
    """The base class of all errors. All can be pickled; attributes that do not apply are None."""

    #: The partial answer; None before the first chunk.
    completion: Completion | None = None
    #: The id of the answer, for `generation()`.
    generation_id: str | None = None
    #: The HTTP status, and the headers of the response.
    status: int | None = None
    headers: http.client.HTTPMessage | None = None
    #: The reason and the code that the gateway gave, and the body of its response.
    message: str | None = None
    code: str | int | None = None
    body: Any = None
    request_id: str | None = None
    #: Seconds, from the header `Retry-After`.
    retry_after: float | None = None
    #: Whether a retry may help. False if the answer may have been billed and lost.
    retryable: bool = False
    #: True for a 503 with a pinned route: retrying will not help [docs].
    pinned: bool = False
    #: Of a network failure: "connect", "response" (sending included), "idle" or "deadline".
    phase: str | None = None

    def __init__(self, message: str = "", /, **details: Any) -> None:
        super().__init__(message)  # what pickle passes; it restores the attributes by itself
        self.__dict__.update(details)


class ConfigError(LowRouterError, ValueError):
    """Invalid configuration or argument. Nothing was sent."""


class APIConnectionError(LowRouterError, ConnectionError):
    """Network failure: no connection, or it was lost before the response."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """A time limit passed; `phase` says which one."""


class APIStatusError(LowRouterError):
    """The gateway answered with an HTTP error status."""


class AuthenticationError(APIStatusError):
    """401: the key is missing, wrong, expired or disabled."""


class InsufficientCreditsError(APIStatusError):
    """402: no credits left, or the key's limit is reached."""


class PermissionDeniedError(APIStatusError):
    """403: the key may not use this model or region."""


class NotFoundError(APIStatusError):
    """404: no such model, generation or path."""


class RateLimitError(APIStatusError):
    """429: too many requests."""


class NoProviderError(APIStatusError):
    """503: no provider is available; final when the route is `pinned` [docs]."""


class BadResponseError(LowRouterError):
    """An unusable response: HTML from a proxy, invalid JSON, an error in a 200, a redirect."""


class StreamError(BadResponseError):
    """A stream failed or was cut; `completion` holds the partial answer."""


class RouteMismatchError(LowRouterError):
    """The answer did not come from the pinned region or provider, or did not name it."""


_CHECK_NETWORK = "check the network, the base URL and HTTPS_PROXY"
_STATUS_ERRORS = {  # the class, and what to do
    401: (AuthenticationError, "check the API key"),
    402: (InsufficientCreditsError, "top up the account or raise the key's limit"),
    403: (PermissionDeniedError, "check that the key's policy allows this model and region"),
    404: (NotFoundError, ""),
    429: (RateLimitError, "send requests more slowly"),
    503: (NoProviderError, "try again later, or choose another region or provider"),
}
_GATEWAY_TIMEOUTS = (504, 520, 524)  # a proxy in front of the gateway gave up waiting
_NOT_RETRIED = "it may have been billed, so it is not retried"
_REASON_FIELDS = ("message", "Message", "detail", "msg", "error_description", "errors", "title")


_decode_json = json.JSONDecoder().raw_decode  # json.loads is about 50 % slower


def _parse_json(text: str) -> Any:
    """Parse JSON. Whatever is wrong with it raises ValueError."""
    text = text.lstrip("\ufeff \t\r\n")
    try:
        value, end = _decode_json(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end != len(text) and text[end:].strip():
        raise ValueError("text after the JSON")
    return value


def _json_or_text(text: str) -> Any:
    try:
        return _parse_json(text)
    except ValueError:
        return text


def _redact_text(text: str, key: str) -> str:
    if len(key) < _SHORTEST_KEY:
        return text
    text = text.replace(key, "[key]").replace(json.dumps(key)[1:-1], "[key]")
    for size in range(len(key) - 1, _SHORTEST_KEY_PART - 1, -1):
        if text.endswith(key[:size]):  # the text was cut in the middle of the key
            return text[:-size]
    return text


def _redact(value: Any, key: str, depth: int = _MAX_DEPTH) -> Any:
    """A copy of text, JSON, headers or an answer without the key, which servers may echo."""
    if isinstance(value, str):
        return _redact_text(value, key)
    if isinstance(value, list):
        return [_redact(item, key, depth - 1) for item in value if depth]
    if not isinstance(value, (dict, http.client.HTTPMessage)):
        return value
    copy: Any = type(value)()
    for name, item in value.items():  # a header may occur more than once
        if depth:  # deeper JSON could not be pickled
            copy[_redact_text(name, key)] = _redact(item, key, depth - 1)
    if isinstance(value, _Answer):
        copy.headers = _redact(value.headers, key)
    return copy


def _one_line(text: str, limit: int = _MESSAGE_LIMIT) -> str:
    """Printable text on one line, cut to a number of characters."""
    line = "".join(each if each.isprintable() else " " for each in text[:limit])
    return " ".join(line.split())


def _error_details(value: Any, depth: int = 6) -> Json:
    """The reason for an error as {"message": ..., "code": ...}; {} where none is found.

    The shape is not documented. These are the shapes of other gateways, clouds and proxies.
    """
    if isinstance(value, str):
        parsed = _json_or_text(value)  # JSON inside a string
        if parsed != value and depth:
            return _error_details(parsed, depth - 1)
        return {"message": value.strip()} if value.strip() else {}
    if isinstance(value, list) and value:
        return _error_details(value[0], depth - 1) if depth else {}
    value = _dict_or_empty(value)
    names = [*_REASON_FIELDS, "error"]
    if not isinstance(value.get("error"), str):  # a string is often just "Bad Request"
        names.insert(0, "error")
    for name in names:
        details = _error_details(value[name], depth - 1) if name in value and depth else {}
        if details:
            return {**value, **details}
    return {}


def _error_from_body(
    kind: type[LowRouterError], happened: str, body: Any, advice: str = "", **details: Any
) -> LowRouterError:
    """An error with the words of a response body, which is text or JSON that was parsed."""
    found = _error_details(body)
    message = found.get("message", "")
    if isinstance(body, str):
        text = body.strip()
        body = _json_or_text(text)
        if text.startswith("<"):
            title = re.search(r"(?i)<title>([^<]*)", text)
            message = title[1].strip() if title else ""
            advice = f"a proxy answered, not LowRouter; {advice}".rstrip("; ")
        elif body and not message:
            message = text
    code = found.get("code") or found.get("type")
    if not isinstance(code, (str, int)):
        code = None
    return kind(happened, message=message, code=code, body=body, advice=advice, **details)


def _failed_part(answer: Json) -> Json | None:
    """The part of an answer or a chunk that reports an error; None if it did not fail."""
    if answer.get("error") or "error" in (answer.get("object"), answer.get("type")):
        return answer
    if "choices" not in answer and any(_str_or_none(answer.get(n)) for n in _REASON_FIELDS):
        return answer
    for choice in _dicts(answer.get("choices")):
        if choice.get("error") or choice.get("finish_reason") == "error":
            return choice
    return None


def _parse_retry_after(text: str) -> float | None:
    """Seconds from a number or an HTTP date; None when it is neither."""
    try:
        if re.fullmatch(r"\s*[0-9]+(\.[0-9]*)?\s*", text):
            seconds = float(text)
        else:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError, IndexError, OverflowError):  # varies with Python's version
        return None
    return max(0.0, min(seconds, _LONGEST_WAIT))


def _is_retried(status: int, method: str, is_pinned: bool) -> bool:
    """Whether a request that was answered with this status is sent again."""
    if status == 503 and is_pinned:
        return False
    if status in _GATEWAY_TIMEOUTS and method == "POST":
        return False
    return status in (408, 409, 429) or (status >= 500 and status not in (501, 505))


# ---- request: what is sent -----------------------------------------------------------------------
# Pure functions: they touch neither the network nor the environment.

_CLIENT_OPTIONS = (
    "api_key base_url verify_route max_retries on_retry headers ca_file allow_http "
    "cache_dir".split()  # the last one existed in version 1
)
_SDK_OPTIONS = ("extra_body", "extra_headers", "extra_query")
_ROUTE_FIELDS = ("region", "provider", "prefer_low_carbon", "fallback")  # [docs]
_RESERVED_HEADERS = (
    "authorization proxy-authorization host content-type content-length te connection "
    "transfer-encoding accept-encoding expect upgrade".split()
)
_HEADER_NAME = r"(?a)[\w!#$%&'*+.^`|~-]+"
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _json_bytes(body: Any) -> bytes:
    try:
        return _encode_json(body).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the request cannot be written as JSON: {error}") from None


def _check_option_names(options: Json) -> None:
    """Refuse client options and those of the OpenAI SDK: the gateway does not know them."""
    for name in options:
        if name in _CLIENT_OPTIONS:
            raise TypeError(f"{name} is an option of the client: use Client({name}=...)")
        if name in _SDK_OPTIONS:
            raise TypeError(f"{name} is not supported: use keywords, or Client(headers=...)")


def _check_route(route: Any) -> None:
    """Refuse a misspelled field, because the gateway might ignore it and with it a pin."""
    if not isinstance(route, (dict, type(None))):
        raise ConfigError("route must be a dict such as {'region': 'eu-west'}")
    import difflib

    for name in set(map(str, route or {})).difference(_ROUTE_FIELDS):
        similar = difflib.get_close_matches(name.strip().lower(), _ROUTE_FIELDS, cutoff=0.8)
        if similar:
            raise ConfigError(f"route has no field {name!r}: did you mean {similar[0]!r}?")


def _chat_body(messages: Any, streams: bool, defaults: Json, options: Json) -> Json:
    """The JSON body of a chat call. An option that is None counts as not given."""
    _check_option_names(options)
    if options.get("stream") not in (None, streams):
        raise TypeError("do not pass stream=: stream() always streams, and chat() never does")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ConfigError("messages must be a string or a list of dicts")
    body = {**defaults, "messages": messages}
    if streams:
        body.update(stream=True, stream_options={"include_usage": True})
    for name, value in options.items():
        if value is not None or name == "stream_options":  # None removes our default
            body[name] = value
    _check_route(body["route"])
    return {name: value for name, value in body.items() if value is not None}


def _route_pins(body: Any, headers: Json) -> Json:
    """The region and the provider that the answer must come from."""
    route = _dict_or_empty(_dict_or_empty(body).get("route"))
    pins = {"region": route.get("region"), "provider": route.get("provider")}
    if not pins["region"]:
        pins["region"] = headers.get("X-Lowrouter-Region")  # the body counts first [assumption]
    if route.get("fallback") is True:
        del pins["region"]
    return {name: pin for name, pin in pins.items() if pin}


def _checked_headers(headers: Any) -> Json:
    """The caller's headers, with names in Title-Case. A line end would start another header."""
    if not isinstance(headers, dict):
        raise ConfigError("headers must be a dict")
    for name, value in headers.items():
        is_valid = False
        if isinstance(name, str) and isinstance(value, str):
            is_valid = bool(re.fullmatch(_HEADER_NAME, name) and re.fullmatch(r"[\t -~]*", value))
        if not is_valid or name.lower() in _RESERVED_HEADERS:
            hint = "use printable ASCII, and none that the client sets itself"
            raise ConfigError(f"the header {name!r} cannot be used: {hint}")
    return {name.title(): value for name, value in headers.items()}


def _http_head(method: str, target: str, headers: Json) -> bytes:
    """A request line with headers, all of which were checked for line ends before."""
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return f"{method} {target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("ascii")


def _curl_command(url: str, body: Any, headers: Json, flags: list[str], key: str) -> str:
    """A chat call as a command for a POSIX shell, in which `key` is an expression."""
    import shlex

    words = [*flags, url, "-d", _json_bytes(body).decode("utf-8")]
    for name, value in {"Content-Type": "application/json", **headers}.items():
        words += ["-H", f"{name}: {value}" if value else f"{name};"]  # curl drops "name:"
    quoted = " ".join(map(shlex.quote, words))
    return f'curl -H "Authorization: Bearer {key}" {quoted}'


# ---- settings: the key, the base URL, the proxy and the CAs --------------------------------------
# The only section of the library that reads environment variables and files. Its messages show
# no value that may contain a secret.


def _seconds(name: str, value: Any, above: float = -float("inf")) -> float:
    """A finite number of seconds, cut to what the system can wait."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if above < value < float("inf"):
            return float(max(-_LONGEST_WAIT, min(value, _LONGEST_WAIT)))
    hint = "a finite number of seconds"
    if above == 0:
        hint += " that is more than 0"
    raise ConfigError(f"{name} must be {hint}, not {value!r}")


class _Key:
    """The API key. A key file is read again for each call, because secrets are rotated."""

    def __init__(self, api_key: Any) -> None:
        self.source = "api_key"
        self.value = api_key
        self.path = ""
        if not str(self.value or "").strip():
            self.source = "LOWROUTER_API_KEY"
            self.value = os.environ.get(self.source, "").strip()
        if not self.value:
            self.source = "LOWROUTER_API_KEY_FILE"
            self.path = os.environ.get(self.source, "")

    def current(self) -> str:
        """The key; the last good one while its file is empty or missing."""
        key = self.value
        problem = "set LOWROUTER_API_KEY or LOWROUTER_API_KEY_FILE"
        if self.path:
            try:
                with open(self.path, encoding="utf-8", errors="replace") as file:
                    key = file.read(_ERROR_BODY_LIMIT).lstrip("\ufeff").strip() or key
            except OSError as error:  # the path is not shown: it may be a key in the wrong place
                problem = f"the file of LOWROUTER_API_KEY_FILE cannot be read: {error.strerror}"
        if not key:
            raise ConfigError(f"no API key: {problem}")
        problem = "must be a string of printable ASCII without white space"
        if isinstance(key, str):
            key = key.strip()
            if key.startswith(("'", '"')):
                problem = "is wrapped in quotes: remove them"
            elif re.fullmatch("[!-~]+", key):
                self.value = key
                return key
        del key  # a traceback may show local variables
        raise ConfigError(f"the API key from {self.source} {problem}")


def _split_base_url(url: Any) -> urllib.parse.SplitResult:
    """The parts of a base URL. The error does not show it, because it may contain a secret."""
    if isinstance(url, str) and re.fullmatch(r"(?ai)\s*https?://[\w.:/\[\]%~-]+\s*", url):
        try:
            parts = urllib.parse.urlsplit(url.strip())
            if parts.hostname and parts.port != 0:
                parts.hostname.encode("idna")
                return parts
        except ValueError:  # of the port, the brackets or IDNA
            pass
    raise ConfigError(f"the base URL must look like {_BASE_URL}, without user and query")


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    # For IPv6, `is_loopback` depends on the version of Python.
    return str(address) == "::1" or (address.version == 4 and address.is_loopback)


def _is_bypassed(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY exempts a host. People write it in more ways than urllib understands."""
    entries = re.sub(r"[\[\]]", "", no_proxy).replace(",", " ").split()
    cleaned = [re.sub(r"^\*\.", ".", entry).rstrip(".") for entry in entries]
    target = f"{host.rstrip('.')}:{port}"
    proxies = {"no": ",".join(cleaned)}
    bypass: Any = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
    return "*" in entries or bool(bypass(target, proxies))


_PROXY_URL = (
    r"(?ai)(http://)?((?P<login>[^\s#/?@]*)@)?(?P<host>\[[0-9a-f:.]+\]|[\w.-]+)"
    r"(:(?P<port>\d{1,5}))?/?"
)


class _Proxy:
    """The HTTP proxy on the way to a host: it makes a tunnel, and does not see the API key."""

    def __init__(self, match: re.Match[str]) -> None:
        self.host = match["host"].strip("[]")
        self.port = int(match["port"] or 80)
        self.headers = {}
        if match["login"] is not None:
            user, _, password = match["login"].partition(":")
            login = urllib.parse.unquote_to_bytes(f"{user}:{password}")
            self.headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login).decode()


def _find_proxy(host: str, port: int) -> _Proxy | None:
    variables = urllib.request.getproxies_environment()
    url = variables.get("https", "").strip()
    if not url or _is_bypassed(host, port, variables.get("no", "")):
        return None
    match = re.fullmatch(_PROXY_URL, url)
    with contextlib.suppress(UnicodeError):
        if match and url.isascii() and 0 < int(match["port"] or 80) < 65536:
            match["host"].encode("idna")  # the resolver would raise UnicodeError
            return _Proxy(match)
    del variables, url, match  # a traceback may show local variables
    example = "http://user:p%40ss@host:port, where p%40ss is the password p@ss"
    raise ConfigError(f"HTTPS_PROXY must look like {example}")


_CA_SETTINGS = (["SSL_CERT_FILE", "SSL_CERT_DIR"], ["REQUESTS_CA_BUNDLE"], ["CURL_CA_BUNDLE"])


def _find_cas(ca_file: Any) -> tuple[str | None, str | None]:
    """The file and the folder of trusted CAs; both are None for those of the system."""
    settings = {"ca_file": ca_file}
    for names in _CA_SETTINGS:
        if not any(settings.values()):
            settings = {name: os.environ.get(name) for name in names}
    file = None
    folder = None
    for name, path in settings.items():
        path = str(path or "")
        if any(map(os.path.isdir, path.split(os.pathsep))):
            folder = path
        elif os.path.exists(path):
            file = path
        elif path and not (file and name == "SSL_CERT_DIR"):  # OpenSSL would trust no CA at all
            raise ConfigError(f"{name} is {path}, which does not exist")
    if not (file or folder) and "" in map(os.environ.get, _CA_SETTINGS[0]):
        # OpenSSL would use the empty variable as the name of a file.
        folder = ssl.get_default_verify_paths().openssl_capath
    return file, folder


class _Endpoint:
    """Where requests go: the checked base URL, the proxy on the way, and the trusted CAs."""

    def __init__(self, base_url: Any, allow_http: bool, ca_file: Any) -> None:
        parts = _split_base_url(base_url or os.environ.get("LOWROUTER_BASE_URL") or _BASE_URL)
        self.is_tls = parts.scheme == "https"
        self.netloc = parts.netloc
        self.name = parts.netloc  # for messages
        self.host = str(parts.hostname)
        self.port = parts.port or (443 if self.is_tls else 80)
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.proxy: _Proxy | None = None
        self.cas: tuple[str | None, str | None] = (None, None)
        is_loopback = _is_loopback(self.host)
        if self.is_tls:
            self.cas = _find_cas(ca_file)
        elif not is_loopback and not allow_http:
            remedy = "use https, or allow_http=True (--allow-http)"
            raise ConfigError(f"plain http to {self.host} would expose the key: {remedy}")
        if self.is_tls and not is_loopback:
            self.proxy = _find_proxy(self.host, self.port)
        if self.proxy:
            self.name += f" (through the proxy {self.proxy.host}:{self.proxy.port})"


_VARIABLES = (
    "LOWROUTER_API_KEY LOWROUTER_API_KEY_FILE LOWROUTER_BASE_URL HTTPS_PROXY https_proxy NO_PROXY "
    "no_proxy SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE"
).split()


def _environment_hash() -> int:
    """Changes when one of the variables changes. A traceback may show it, but not their values."""
    return hash(tuple(os.environ.get(name) for name in _VARIABLES))


# ---- connections: sockets under the clock of a call, kept for the next call ----------------------
# The only section that touches the network. Exceptions of the network pass through it.

# macOS uses the second name. On a system that has neither, setting option 0 fails harmlessly.
_KEEPALIVE_OPTION = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", 0))


class _Clock:
    """The time limits of one call. A socket's own time-out would start anew with each byte."""

    def __init__(self, timeout: float, deadline: float) -> None:
        self.timeout = timeout
        self.deadline = time.monotonic() + deadline
        self.start("connect")

    def start(self, phase: str, limit: float = _LONGEST_WAIT) -> None:
        """Begin "connect", "send", "response", "idle" or "error body", with a limit of its own."""
        self.phase = phase
        self.limit = limit
        self.phase_end: float | None = None  # begins with the first wait, not in the caller

    def seconds_left(self) -> float:
        """The seconds that the next wait may take. When none are left, it raises a time-out."""
        now = time.monotonic()
        if self.phase_end is None:
            self.phase_end = now + min(self.timeout, self.limit)
        left = min(self.phase_end, self.deadline) - now
        if left <= 0:
            raise socket.timeout("timed out")
        return left

    def has_time_for(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self.deadline


class _Timed(socket.socket):
    """A socket whose waits are bounded by the clock of the present call.

    It has class attributes, because ssl makes its sockets without calling __init__.
    """

    clock: _Clock
    used_at = (0.0, 0.0)
    received_any = False
    eof_ends_body = False  # of a response that has no other sign of its end

    def __del__(self) -> None:
        self.close()  # when the stream or the client that owns it is dropped

    def begin(self, clock: _Clock) -> None:
        """Start to send a request and to receive its response."""
        self.clock = clock
        self.received_any = False

    def apply_timeout(self) -> None:
        self.settimeout(self.clock.seconds_left())

    def upload(self, view: memoryview) -> None:
        """Send all the data, and start the timeout anew after each block."""
        while view:
            self.clock.start("send")
            self.apply_timeout()
            view = view[self.send(view[:_SEND_BLOCK]) :]

    def recv_into(self, *args: Any) -> int:
        """What http.client calls to read."""
        self.apply_timeout()
        size = super().recv_into(*args)
        if size:
            self.received_any = True
        elif self.received_any and not self.eof_ends_body:
            # http.client would take headers that end here for complete ones.
            raise ConnectionError("the connection was closed in the middle of the response")
        return size

    def is_old(self) -> bool:
        """By both clocks: the monotonic one stands still while a Lambda function is frozen."""
        monotonic, wall = self.used_at
        return max(time.monotonic() - monotonic, time.time() - wall) > _IDLE_SECONDS

    def is_silent(self) -> bool:
        """Whether nothing has arrived while it was idle, not even the end."""
        try:
            self.settimeout(0.0)
            # Look at the bytes of the network first: TLS takes ten times as long to find none.
            socket.socket.recv(self, 1, socket.MSG_PEEK)
            self.recv(1)  # also digests the session tickets of TLS 1.3
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False


class _TLSSocket(_Timed, ssl.SSLSocket):
    """What `ssl` makes of a `_Timed`."""

    def is_silent(self) -> bool:
        return self.pending() == 0 and super().is_silent()


def _connect_tcp(host: str, port: int, clock: _Clock) -> _Timed:
    """Try the addresses of a host in turn, each in half of the time left, as one may be dead."""
    clock.start("connect")
    clock.seconds_left()  # a deadline that has passed is reported before a name is looked up
    addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    clock.start("connect", _CONNECT_SECONDS)  # not earlier: nothing bounds the name resolver
    while addresses:
        family, kind, protocol, _, address = addresses.pop(0)
        seconds = clock.seconds_left()
        if addresses:
            seconds /= 2
        try:
            sock = _Timed(family, kind, protocol)
            sock.settimeout(seconds)
            sock.connect(address)
            return sock
        except OSError:
            if not addresses:
                raise
    raise OSError("the host has no address")


def _open_tunnel(sock: _Timed, proxy: _Proxy, host: str, port: int) -> None:
    """Ask a proxy for a tunnel. http.client's set_tunnel cannot be bounded in time."""
    if ":" in host:
        host = f"[{host}]"
    target = f"{host}:{port}"
    sock.apply_timeout()
    sock.sendall(_http_head("CONNECT", target, {"Host": target, **proxy.headers}))
    with http.client.HTTPResponse(sock, method="HEAD") as response:  # like HEAD, without a body
        response.begin()
    status = response.status
    advice = "check that it allows the host of the base URL"
    if status in (401, 407):
        advice = "put a user and a password into HTTPS_PROXY"
        if proxy.headers:
            advice = "check the user and the password in HTTPS_PROXY"
    if not 200 <= status < 300:
        what = f"was refused by the proxy ({status})"
        is_retryable = status >= 500
        raise APIConnectionError(what, advice=advice, phase="connect", retryable=is_retryable)


class _Pool:
    """The idle connections of one process. A connection that is dropped closes itself."""

    def __init__(self) -> None:
        self.idle: list[_Timed] = []
        self.is_closed = False

    def take(self) -> _Timed | None:
        """Drop the old ones, which are at the start of the list, and take the last one."""
        with contextlib.suppress(IndexError):  # none is left, perhaps because of another thread
            while self.idle[0].is_old():
                del self.idle[0]
            sock = self.idle.pop()
            while not sock.is_silent():
                sock = self.idle.pop()
            return sock
        return None

    def give_back(self, sock: _Timed) -> None:
        sock.used_at = (time.monotonic(), time.time())
        if not self.is_closed:
            self.idle.append(sock)

    def close(self) -> None:
        """Close the connections that are idle, and those that are given back later."""
        self.is_closed = True
        self.idle.clear()


class _Response(http.client.HTTPResponse):
    """A response that gives its connection back to the pool at the end of its body."""

    def __init__(self, sock: _Timed, method: str, pool: _Pool) -> None:
        super().__init__(sock, method=method)
        self.owned = [sock]  # whoever pops the socket decides what becomes of it
        self.pool = pool

    def has_known_end(self) -> bool:
        """Whether it ends before the connection does."""
        return self.chunked or self.length is not None

    def read_block(self) -> bytes:
        """Return bytes as soon as some arrive, and b"" at the true end of the body."""
        block = self.read1(_BLOCK)  # read(n) would wait for n bytes
        if self.chunked and (self.chunk_left or 0) < 0:
            raise http.client.IncompleteRead(b"")  # http.client accepts a chunk size such as -5
        if not block:
            # Servers often close the connection after an error response.
            self.release(keep=self.status < 400 and not self.will_close)
        return block

    def release(self, keep: bool = False) -> None:
        """Give the connection back to the pool, or close it. A second call does nothing."""
        self.close()
        with contextlib.suppress(IndexError):
            sock = self.owned.pop()
            if keep:
                self.pool.give_back(sock)
            else:
                sock.close()

    def interrupt(self) -> None:
        """End the wait of the thread that reads this response, which closing would not do."""
        with contextlib.suppress(IndexError, OSError):  # it has ended already
            # SSLSocket.shutdown would take TLS away from the thread that is reading.
            socket.socket.shutdown(self.owned.pop(), socket.SHUT_RDWR)


def _new_tls_context(file: str | None, folder: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=file, capath=folder)
    except OSError as error:
        raise ConfigError(f"cannot load CAs from {file or folder}: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _TLSSocket
    return context


class _Handler(urllib.request.BaseHandler):
    """Opens requests as urllib's own handlers do, but over connections that are kept."""

    def __init__(self, endpoint: _Endpoint) -> None:
        self.endpoint = endpoint
        self.process = 0
        self.begin_in_process()

    def add_parent(self, parent: Any) -> None:
        """Keep no reference: a cycle would keep the connections of a dropped client open."""

    def begin_in_process(self) -> None:
        """Begin anew in a fork, which must not use the connections of its parent.

        Nor may it use the context, because another thread may have held a lock of OpenSSL.
        """
        process = os.getpid()
        if process != self.process:
            self.pool = _Pool()
            if self.endpoint.is_tls:
                self.tls_context: Any = _new_tls_context(*self.endpoint.cas)
            self.process = process  # the last step, because of other threads

    def connect(self, clock: _Clock) -> _Timed:
        """TCP, CONNECT if there is a proxy, and TLS."""
        endpoint = self.endpoint
        peer = endpoint.proxy or endpoint
        sock = _connect_tcp(peer.host, peer.port, clock)
        with contextlib.suppress(OSError):  # options are only hints
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, _KEEPALIVE_OPTION, _KEEPALIVE_SECONDS)
        if not endpoint.is_tls:
            return sock
        sock.begin(clock)
        if endpoint.proxy:
            _open_tunnel(sock, endpoint.proxy, endpoint.host, endpoint.port)
        sock.apply_timeout()  # for the handshake as a whole
        tls: _Timed = self.tls_context.wrap_socket(sock, server_hostname=endpoint.host)
        return tls

    def http_open(self, request: Any) -> _Response:
        """Open a `_Call`, which is a urllib request with a clock."""
        self.begin_in_process()
        sock = self.pool.take()
        if sock:
            try:
                return self.exchange(request, sock)
            except (ConnectionError, ssl.SSLError):
                # The server had closed it: reconnect if that cannot be billed twice.
                if sock.received_any or not request.is_safe_to_repeat():
                    raise
        return self.exchange(request, self.connect(request.clock))

    https_open = http_open

    def exchange(self, request: Any, sock: _Timed) -> _Response:
        """Send a request, and read the head of its response."""
        sock.begin(request.clock)
        response = _Response(sock, request.get_method(), self.pool)
        try:
            # A server that closes the connection may have sent a reason before that, such as 413.
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                sock.upload(memoryview(request.to_bytes()))  # whose repr does not show the key
                request.was_sent = True
                request.clock.start("response")
            response.begin()
            while response.status in (102, 103):  # the real response follows
                response.headers = None  # type: ignore[assignment]  # else begin() does nothing
                response.begin()
        except BaseException:
            response.release()
            raise
        sock.eof_ends_body = not response.has_known_end()
        request.clock.start("idle")
        return response


# ---- calls: a request that is sent again where that is safe --------------------------------------
# Network exceptions become public errors here, and nowhere else.

_NETWORK_ERRORS = (OSError, http.client.HTTPException)
_ENCODINGS = r"(?i)\b(gzip|deflate|br|zstd|compress)\b"
_TIMEOUTS = {  # by phase: what happened, and what to do
    "connect": ("could not be reached in time", _CHECK_NETWORK),
    "send": ("did not accept the request in time", "increase the timeout"),
    "response": ("did not answer in time", "increase the timeout"),
    "idle": ("stopped sending in the middle of its response", "increase the timeout"),
    "deadline": ("had not answered when the deadline passed", "increase the deadline"),
}
_LOST = {  # by phase
    "connect": "cannot be reached",
    "send": "closed the connection before it had the whole request",
    "response": "closed the connection without a response",
    "idle": "dropped the connection mid-response",
}


class _Call(urllib.request.Request):
    """One call of the gateway, from its request to the end of its response."""

    def __init__(
        self, endpoint: _Endpoint, key: str, method: str, path: str, data: bytes, clock: _Clock
    ) -> None:
        super().__init__(endpoint.url + path, data, method=method)
        self.endpoint = endpoint
        self.key = key
        self.clock = clock
        self.was_sent = False  # in full; the connection sets it
        self.pins: Json = {}
        self.verifies_pins = True
        self.choices_requested = 1
        self.response: Any = None  # a `_Response`, once there is one
        self.received = bytearray()  # of a body that is read as a whole

    def to_bytes(self) -> bytes:
        head = _http_head(self.get_method(), self.selector, dict(self.header_items()))
        return head + bytes(self.data)  # type: ignore[arg-type]

    def is_safe_to_repeat(self) -> bool:
        """Whether sending the request once more cannot cause a second charge."""
        return self.get_method() == "GET" or not self.was_sent

    def run(
        self,
        opener: urllib.request.OpenerDirector,
        parse: Callable[[_Call], T],
        max_retries: int,
        on_retry: Callable[[LowRouterError, float], object] | None,
    ) -> T:
        """Send the request until it is answered, and return what `parse` makes of the response."""
        delay = _RETRY_DELAY
        for retries_left in range(max_retries, -1, -1):
            self.response = None
            self.was_sent = False
            self.received.clear()
            try:
                self.response = opener.open(self)
                self._check_response()
                return parse(self)
            except BaseException as cause:
                self.close()
                if not isinstance(cause, (*_NETWORK_ERRORS, LowRouterError)):
                    raise
                error = self.public_error(cause)
            seconds = error.retry_after
            if seconds is None:
                seconds = delay * random.uniform(0.75, 1.0)
            if not retries_left or not error.retryable or not self.clock.has_time_for(seconds):
                break
            delay = min(2 * delay, _LONGEST_RETRY_DELAY)
            if on_retry:
                start = time.monotonic()
                on_retry(error, seconds)
                seconds -= time.monotonic() - start  # it may do the waiting itself
            time.sleep(max(0.0, seconds))
        try:
            raise error
        finally:
            del error  # or the error, its traceback and this frame would hold each other

    def close(self) -> None:
        """Hang up, unless the response was read to its end."""
        if self.response:
            self.response.release()

    def _check_response(self) -> None:
        """Raise unless the status is a success, and the body has a form that can be read."""
        response = self.response
        headers = response.headers
        encoding = headers.get("Content-Encoding", "")
        if response.status >= 400:
            raise self._status_error()
        advice = "a proxy may be the cause"
        hides_headers = headers.defects and not response.has_known_end()
        if not 200 <= response.status < 300:
            location = headers.get("Location", "")
            host = "".join(re.findall(r"^(?:\w+:)?//(?:[^/?#]*@)?([^/?#]+)", location))
            problem = f"answered {response.status}, which leads to {host or 'another path'}"
            advice = "the key is only sent to the gateway itself; check the base URL"
        elif re.search(_ENCODINGS, encoding):
            problem = f"sent an encoded response ({encoding})"
        elif hides_headers or ("Transfer-Encoding" in headers and not response.chunked):
            problem = "sent a response whose end is unclear"
        else:
            return
        raise BadResponseError(problem, advice=advice)

    def _read_body(self, limit: int) -> None:
        for block in iter(self.response.read_block, b""):
            self.received += block
            if len(self.received) > limit:
                raise BadResponseError(f"sent more than {limit >> 20} MiB")
            if self.clock.phase == "idle":
                self.clock.start("idle")  # a byte ends a silence

    def excerpt(self) -> str:
        return self.received[:_ERROR_BODY_LIMIT].decode("utf-8", "replace").lstrip("\ufeff")

    def _status_error(self) -> LowRouterError:
        status = self.response.status
        headers = self.response.headers
        self.clock.start("error body", _ERROR_BODY_SECONDS)
        with contextlib.suppress(*_NETWORK_ERRORS, BadResponseError):  # the status says most
            if not re.search(_ENCODINGS, headers.get("Content-Encoding", "")):
                self._read_body(_ERROR_BODY_LIMIT)
        retry_after = _parse_retry_after(headers.get("Retry-After", ""))
        is_pinned = status == 503 and bool(self.pins)
        is_retryable = _is_retried(status, self.get_method(), is_pinned)
        kind, advice = _STATUS_ERRORS.get(status, (APIStatusError, "change the request"))
        if status == 404:
            advice = self._not_found_advice()
        elif status in _GATEWAY_TIMEOUTS and not is_retryable:
            advice = _NOT_RETRIED
        elif is_retryable and kind is APIStatusError:
            advice = "try again later"
        error = _error_from_body(
            kind,
            f"answered {status}",
            self.excerpt(),
            advice,
            status=status,
            headers=headers,
            request_id=headers.get("X-Request-Id"),
            retry_after=retry_after,
            retryable=is_retryable and (retry_after or 0.0) <= _LONGEST_RETRY_AFTER,
            pinned=is_pinned,
        )
        error.message = error.message or self.response.reason
        return error

    def _not_found_advice(self) -> str:
        if "/generation/" in self.selector:
            return "check the id; a new record may take some seconds to appear"
        if re.search(r"(?i)\bmodel(\b|_)", self.excerpt()):  # not `models`, which is a path
            return "check the name of the model; models() lists the names"
        return "check the path, and that the base URL contains /v1 only once"

    def read_json(self) -> Any:
        """The body as JSON; None for an empty one."""
        self._read_body(_ANSWER_LIMIT)
        if not self.received and self.response.has_known_end():
            return None
        try:
            text = self.received.decode("utf-8")
            del self.received[_ERROR_BODY_LIMIT:]  # so that 50 MB are in memory twice, not 3 times
            data = _parse_json(text)
        except ValueError:
            happened = "sent invalid or truncated JSON"
            raise _error_from_body(BadResponseError, happened, self.excerpt()) from None
        record = _dict_or_empty(data)
        if record.get("error") and "generation_id" not in record:
            raise _error_from_body(BadResponseError, "reported an error", data)
        return data

    def drain(self) -> None:
        """Wait a moment for the end of the body, so that the connection can be kept."""
        self.clock.start("idle", _DRAIN_SECONDS)
        with contextlib.suppress(*_NETWORK_ERRORS):  # the answer is complete
            self.response.read_block()

    def verify_route(self, answer: _Answer, is_complete: bool) -> None:
        """Raise if the answer names another route than the pinned one, or none when complete."""
        for name, pin in self.pins.items():
            actual = getattr(answer, name) or ""
            is_kept = actual.lower() == str(pin).strip().lower()
            if self.verifies_pins and not is_kept and (actual or is_complete):
                what = f"answered from {name} {actual}, but {pin} was pinned"
                if not actual:
                    what = f"named no {name} in its answer, but {pin} was pinned"
                advice = "verify_route=False or --no-verify-route accepts that"
                raise RouteMismatchError(what, completion=answer, advice=advice)

    def public_error(
        self, cause: BaseException, partial: Completion | None = None
    ) -> LowRouterError:
        """The error that leaves this module: one line, all that was received, and the key redacted.

        It is a new error, because the frames and the causes of the old one may hold the key.
        """
        error = cause
        if not isinstance(error, LowRouterError):
            error = self._map_exception(cause, is_stream=partial is not None)
        answer = Completion(partial or error.completion or {})
        if self.response:
            answer.headers = self.response.headers
        details = {
            "body": self.excerpt() or None,
            "generation_id": answer.generation_id,
            **vars(error),
            "completion": answer or None,
        }
        advice = details.pop("advice", "")
        line = f"{self.endpoint.name} {error}"
        if error.message is not None:
            line += ": " + (_one_line(_redact(error.message, self.key)) or "it gave no reason")
        if advice:
            line += f" ({advice})"
        line = _one_line(_redact(line, self.key), 2 * _MESSAGE_LIMIT)
        return type(error)(line, **_redact(details, self.key))

    def _map_exception(self, cause: BaseException, is_stream: bool) -> LowRouterError:
        """The error for an exception of the network, by the phase in which it was raised."""
        if isinstance(cause, ssl.SSLCertVerificationError):
            file, folder = self.endpoint.cas
            trusted = file or folder or "the system"
            happened = f"has a certificate that is not trusted by {trusted}: {cause}"
            advice = "check the base URL and the clock of this machine, or set SSL_CERT_FILE"
            return APIConnectionError(happened, advice=advice, phase="connect")
        phase = self.clock.phase
        is_safe = self.is_safe_to_repeat()
        billed = "" if is_safe else _NOT_RETRIED
        kind: type[LowRouterError] = APIConnectionError
        # With an errno, it was the kernel that gave up.
        if isinstance(cause, socket.timeout) and not cause.errno:
            kind = APITimeoutError
            if not self.clock.has_time_for(0.0):
                phase = "deadline"
            happened, advice = _TIMEOUTS[phase]
            advice = f"{advice}; {billed}".rstrip("; ")
        else:
            happened = f"{_LOST[phase]}: {str(cause) or type(cause).__name__}"
            advice = _CHECK_NETWORK if phase == "connect" else billed
            if phase == "idle":
                kind = StreamError if is_stream else BadResponseError
                return kind(happened, advice=advice, retryable=is_safe)
        phase = phase.replace("send", "response")  # users need not tell these two apart
        return kind(happened, advice=advice, phase=phase, retryable=is_safe)


# ---- server-sent events: blocks -> lines -> events -----------------------------------------------
# By the WHATWG standard, but an unfinished last event counts. Knows neither JSON nor the gateway.


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Split at LF, CR and CRLF. A byte order mark may stand before the first line."""
    unfinished = bytearray()
    is_first = True
    after_cr = False
    # Two line ends at the end of the data finish a last line and a last event.
    for block in itertools.chain(blocks, [b"\n\n"]):
        if after_cr and block.startswith(b"\n"):
            block = block[1:]  # the second half of a CRLF
        after_cr = block.endswith(b"\r")
        unfinished += block
        if b"\n" in block or b"\r" in block:
            lines = bytes(unfinished).splitlines()  # splits bytes at these three line ends only
            unfinished.clear()
            if not block.endswith((b"\n", b"\r")):
                unfinished += lines.pop()
            if is_first and lines[0].startswith(b"\xef\xbb\xbf"):
                lines[0] = lines[0][3:]
            is_first = False
            yield from lines
        if len(unfinished) > _EVENT_LIMIT:
            raise StreamError(f"sent a line longer than {_EVENT_LIMIT >> 20} MiB")


def _events(lines: Iterable[bytes]) -> Iterator[tuple[str | None, str]]:
    """Yield (name, data) of each event that has data.

    Lines that do not belong to an event, such as a proxy's error page in the middle of a stream,
    are yielded as (None, text).
    """
    name = ""
    data: list[str] = []
    other: list[str] = []
    size = 0
    for line in lines:
        if line:
            size += len(line) + _LINE_OVERHEAD
            if size > _EVENT_LIMIT:
                raise StreamError(f"sent an event longer than {_EVENT_LIMIT >> 20} MiB")
            text = line.decode("utf-8", "replace")
            field, _, value = text.partition(":")
            if value[:1] == " ":
                value = value[1:]
            if field == "data":
                data.append(value)
            elif field == "event":
                name = value.strip()
            elif field == "error":  # not in the standard, but llama.cpp sends it
                name = field
                data.append(value)
            elif field not in ("", "id", "retry"):
                other.append(text)
            continue
        if data:
            yield name, "\n".join(data)
        elif other:
            yield None, "\n".join(other)
        name = ""
        data = []
        other = []
        size = 0


# ---- streams: events -> chunks -> completion -----------------------------------------------------
# Chunks are merged as they arrive. The completion is built only when it is requested.

_PARTIAL_FIELDS = ("choices", "usage", "lowrouter")  # of the answer, also in an error event
#: Texts that arrive in pieces. Other strings, such as ids and names, arrive whole.
_TEXT_FIELDS = frozenset(
    "content reasoning reasoning_content thinking refusal arguments input data transcript".split()
)


def _join_surrogates(text: str) -> str:
    """Join the halves of surrogate pairs, which JSON can escape one by one."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _copy(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """A copy of merged data as plain JSON, which does not change any more."""
    if isinstance(value, bytearray):
        return _join_surrogates(value.decode("utf-8", "surrogatepass"))
    if isinstance(value, dict) and depth:
        # list() is atomic, and another thread may be adding a chunk.
        return {name: _copy(item, depth - 1) for name, item in list(value.items())}
    if isinstance(value, list) and depth:
        return [_copy(item, depth - 1) for item in value]
    return value


def _grow(before: Any, value: Any) -> Any:
    """Append a text or a list to what came before. Servers mix texts and lists of parts."""
    if isinstance(value, str):
        value = bytearray(value, "utf-8", "surrogatepass")
        if not isinstance(before, list) or not before:
            return value
        last = _dict_or_empty(before[-1])
        if isinstance(last.get("text"), bytearray):
            last["text"] += value
            return before
        value = [{"type": "text", "text": value}]
    if isinstance(before, bytearray):
        before = [{"type": "text", "text": before}]
    if isinstance(before, list) and before:
        before += value
        return before
    return list(value)  # a new list, because the chunk's is not ours to change


def _is_whole(function: Json) -> bool:
    """Whether the arguments of a tool call are complete: an object, or the JSON of one."""
    arguments = _copy(function.get("arguments"))
    if isinstance(arguments, str):
        arguments = _json_or_text(arguments)
    return isinstance(arguments, dict)


def _find_tool_call(calls: list[Json], piece: Json) -> Json:
    """The tool call to which a piece belongs. Servers differ in how they tell."""
    index = piece.get("index")
    call_id = piece.get("id")
    name = _dict_or_empty(piece.get("function")).get("name")
    for call in reversed(calls):
        function = _dict_or_empty(call.get("function"))
        if index is not None:
            found = call.get("index") == index
            if call_id and name and call.get("id") not in (None, "", call_id):
                found = False  # several servers give all calls the same index
        elif call_id:
            found = call.get("id") == call_id
        else:  # the last call goes on, unless the piece has the name of the next one
            found = not name or (name == function.get("name") and not _is_whole(function))
            if not found:
                break
        if found:
            return call
    calls.append({})
    return calls[-1]


def _merge(target: Json, piece: Json, depth: int = _MAX_DEPTH) -> None:
    """Add a delta: texts, lists and objects grow; for other values, the last one wins."""
    for name, value in piece.items():
        before = target.get(name)
        if not value:
            target.setdefault(name, value)  # an empty value never erases what came before
        elif isinstance(before, bytearray) and isinstance(value, str):
            before += value.encode("utf-8", "surrogatepass")  # a str would be copied each time
        elif isinstance(value, str) and name in _TEXT_FIELDS:
            target[name] = _grow(before, value)
        elif isinstance(value, list) and name == "tool_calls" and depth:
            target[name] = _dicts(before)
            for call in _dicts(value):
                _merge(_find_tool_call(target[name], call), call, depth - 1)
        elif isinstance(value, list):
            target[name] = _grow(before, value)
        elif isinstance(value, dict) and depth and not isinstance(before, (bytearray, list)):
            target[name] = dict(_dict_or_empty(before))
            _merge(target[name], value, depth - 1)
        elif not isinstance(before, (bytearray, list, dict)) or not before:
            target[name] = value


def _unstreamed(message: Json, whole: Json) -> Json:
    """The part of a cumulative message that the deltas before it did not bring."""
    rest = {}
    for name, value in whole.items():
        before = _copy(message.get(name))
        if isinstance(value, str) and isinstance(before, str):
            if value.startswith(before):  # otherwise the deltas count
                rest[name] = value[len(before) :]
        elif not before:
            rest[name] = value
    return rest


def _is_finished(choice: Json) -> bool:
    """Whether a choice has a real finish reason; some servers send a placeholder before it."""
    reason = _str_or_none(choice.get("finish_reason")) or ""
    return reason.lower() not in ("", "null", "none", "error")


def _parse_completion(call: _Call) -> Completion:
    answer = Completion(_dict_or_empty(call.read_json()))
    answer.headers = call.response.headers
    failed = _failed_part(answer)
    if failed or not isinstance(answer.get("choices"), list):
        happened = "reported an error" if failed else "sent no chat completion"
        partial = answer if "choices" in answer else None
        body = failed or call.excerpt()
        raise _error_from_body(BadResponseError, happened, body, completion=partial)
    call.verify_route(answer, is_complete=True)
    return answer


class Stream:
    """The chunks of one answer as they arrive: an iterator and a context manager.

    Iterating raises `StreamError`, `BadResponseError`, `APITimeoutError` or `RouteMismatchError`,
    with the partial answer as `completion`. A stream that is closed early, also by another thread,
    ends without an error.
    """

    def __init__(self, call: _Call) -> None:
        from threading import Lock

        self._call = call
        self._headers = call.response.headers
        self._events = _events(_lines(iter(call.response.read_block, b"")))
        self._fields: Json = {}  # of the answer, but for its choices
        self._choices: dict[int, Json] = {}
        self._is_done = False  # the server said that this was all
        self._is_over = False  # nothing more is read
        self._half_character = ""
        self._other_text = ""  # lines that belong to no event
        self._first: Chunk | None = None
        self._error: LowRouterError | None = None
        self._reading = Lock()
        self._process = os.getpid()
        call.verify_route(self.completion, is_complete=False)  # by the headers
        if self._headers.get_content_type() != "text/event-stream":
            self._first = self._read_chunk()  # an error, most likely

    @property
    def completion(self) -> Completion:
        """What has arrived so far, as `chat()` would return it; {} before the first chunk."""
        answer = Completion(_copy(self._fields))
        answer.headers = self._headers
        answer.pop("error", None)  # it is in the exception
        if not self._choices:
            return answer
        for name in ("generation_id", "provider", "region"):  # they may come from the headers
            if getattr(answer, name):
                answer.setdefault("lowrouter", {})[name] = getattr(answer, name)
        choices = _copy(self._choices)
        answer["object"] = "chat.completion"
        answer["choices"] = [choices[index] for index in sorted(choices)]
        for choice in answer["choices"]:
            for call in _dicts(choice["message"].get("tool_calls")):
                call.pop("index", None)  # strict servers refuse it when the message is sent back
        return answer

    @property
    def generation_id(self) -> str | None:
        """The id that `generation()` looks up; known before the first chunk [docs]."""
        return self.completion.generation_id

    def result(self) -> Completion:
        """Read to the end and return the complete answer.

        It raises what iterating raises, and a `StreamError` if the stream was closed early.
        """
        collections.deque(self, maxlen=0)  # reads to the end, and keeps nothing
        if not self._is_complete():
            error = StreamError("did not send a complete answer: the stream was closed early")
            raise self._call.public_error(error, self.completion)
        return self.completion

    def close(self) -> None:
        """Stop reading. A thread that waits for the next chunk wakes up and ends its loop."""
        if self._process != os.getpid():
            return  # the connection belongs to the parent process
        self._is_over = True
        if self._reading.acquire(blocking=False):
            self._call.close()
            self._reading.release()
        else:
            self._call.response.interrupt()  # the thread that is reading will hang up

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if self._process != os.getpid():
            raise StreamError("a forked process cannot read a stream that its parent opened")
        with self._reading:
            chunk = self._first
            self._first = None
            try:
                if chunk is None and not self._is_over:
                    chunk = self._read_chunk()
            except (*_NETWORK_ERRORS, LowRouterError) as cause:
                if not self._is_over:  # otherwise another thread closed it
                    self._error = self._call.public_error(cause, self.completion)
            finally:
                if chunk is None:
                    self._is_over = True
                    self._call.close()
        if chunk is not None:
            return chunk
        if self._error is None:
            raise StopIteration
        # A new error each time: the traceback of one would grow, and hold all its callers.
        raise type(self._error)(*self._error.args, **vars(self._error))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_chunk(self) -> Chunk | None:
        """Read the next chunk, or None at the end of a complete answer from the pinned route."""
        try:
            for name, data in self._events:
                if name is not None:
                    self._call.clock.start("idle")
                if name in (None, "", "message") and data.strip(' \t"').startswith("[DONE]"):
                    self._is_done = True
                    break
                chunk = self._parse_event(name, data)
                if chunk is not None:
                    return chunk
        except _NETWORK_ERRORS:
            if not self._is_complete():
                raise
            self._call.close()  # only the end was lost, but the connection is in doubt
        if not self._is_complete():
            happened = "ended the stream before the answer was complete"
            raise _error_from_body(StreamError, happened, self._other_text)
        if self._call.pins:
            self._call.verify_route(self.completion, is_complete=True)
        self._call.drain()
        return None

    def _parse_event(self, name: str | None, data: str) -> Chunk | None:
        """The chunk of an event, None if it has none. An error in it is raised."""
        value = _json_or_text(data)
        is_object = isinstance(value, dict) and name != "error"
        failed = None
        if name == "error":
            failed = value
        elif is_object:
            if "error" in data or ("choices" not in value and name in (None, "", "message")):
                failed = _failed_part(value)
        elif name in ("", "message") or (name is None and data.lstrip().startswith(("<", "["))):
            if not self._is_complete():
                failed = value
        if name is None and not failed:
            if "choices" not in _dict_or_empty(value):
                self._other_text = data  # perhaps the reason for an early end
                return None
            self._is_done = True  # JSON instead of a stream is a complete answer
        if failed:
            self._raise_failure(name, value, failed)
        if not is_object:
            return None
        if name not in ("", "message", None) and value.keys().isdisjoint(_PARTIAL_FIELDS):
            return None  # an event of another kind, such as a ping
        chunk = Chunk(value)
        chunk.headers = self._headers
        chunk.added_text = self._add(value)
        if self._call.pins:
            self._call.verify_route(chunk, is_complete=False)
        return chunk

    def _raise_failure(self, name: str | None, value: Any, failed: Any) -> NoReturn:
        """Add what the event says of the answer, and raise its error."""
        part = {n: v for n, v in _dict_or_empty(value).items() if n in _PARTIAL_FIELDS}
        if self._choices or "choices" in part:
            self._add(part)
        kind: type[LowRouterError] = StreamError
        if name is None and not self._choices:
            kind = BadResponseError
        happened = "reported an error in the stream"
        if not isinstance(value, dict) and name != "error":
            happened = "sent an event that is not a JSON object"
        raise _error_from_body(kind, happened, failed, completion=self.completion)

    def _add(self, chunk: Json) -> str:
        """Add a chunk to the answer, and return the text that it adds to choice 0."""
        text = self._half_character
        fields = self._fields
        for name, value in chunk.items():
            if name == "choices":
                for position, choice in enumerate(_list_or_empty(value)):
                    text += self._add_choice(position, choice)
            elif name == "lowrouter":
                _merge(fields.setdefault(name, {}), _dict_or_empty(value))
            elif value or name not in fields:
                fields[name] = value
        if text.isascii():
            return text
        self._half_character = ""
        if "\ud800" <= text[-1:] <= "\udbff":  # half of a character goes with the next chunk
            self._half_character = text[-1]
            text = text[:-1]
        return _join_surrogates(text)

    def _add_choice(self, position: int, choice: Any) -> str:
        """Add what a chunk says of one choice; return the text that it adds to choice 0."""
        if not isinstance(choice, dict):
            return ""
        index = choice.get("index")
        if not isinstance(index, int):
            index = position
        kept = self._choices.get(index)
        if kept is None:
            kept = {"index": index, "message": {"role": "assistant"}}
            self._choices[index] = kept
        message = kept["message"]
        delta = _dict_or_empty(choice.get("delta"))
        _merge(message, delta)
        text = _text_of(delta.get("content"))
        if "message" in choice:
            rest = _unstreamed(message, _dict_or_empty(choice["message"]))
            _merge(message, rest)
            text += _text_of(rest.get("content"))
        for name, value in choice.items():
            if name in ("index", "delta", "message"):
                continue
            if not value:
                kept.setdefault(name, value)
            elif name != "finish_reason" or not _is_finished(kept):
                _merge(kept, {name: value})
        return text if index == 0 else ""

    def _is_complete(self) -> bool:
        """Whether nothing of the answer can be missing, except usage and eco numbers."""
        choices = list(self._choices.values())
        if self._is_done and choices:
            return True
        return len(choices) >= self._call.choices_requested and all(map(_is_finished, choices))


# ---- client: settings, and the connections that they lead to -------------------------------------
# What users call. Everything above is private, except for the answers, the errors and `Stream`.


def _parse_models(call: _Call) -> list[dict[str, Any]]:
    """The models, in an envelope or as a bare list [assumption]."""
    data = call.read_json()
    listed = _dict_or_empty(data).get("data", data)
    models = _dicts(listed)
    if models != listed:
        raise BadResponseError("sent no list of models", body=data)
    return models


def _parse_record(call: _Call) -> dict[str, Any]:
    """A generation record, bare or in an envelope [assumption]."""
    record = _dict_or_empty(call.read_json())
    if "generation_id" not in record:
        record = _dict_or_empty(record.get("data")) or record
    if not record:
        raise BadResponseError("sent no record of this generation")
    return record


def _parse_any(call: _Call) -> Any:
    data = call.read_json()
    answer = Completion(_dict_or_empty(data))
    answer.headers = call.response.headers
    call.verify_route(answer, is_complete=False)
    return data


class Client:
    """A client of one gateway, for any number of threads. A forked process opens new connections.

    api_key: the key, or else LOWROUTER_API_KEY, or else the file LOWROUTER_API_KEY_FILE, which
        is read again for each call.
    base_url: the URL without the path of an endpoint, or else LOWROUTER_BASE_URL.
    model, route: defaults of `chat()` and `stream()`.
    verify_route: whether an answer must name the pinned region and provider.
    timeout: seconds for connecting (10 at most), for the response to begin, and for each silence
        in it; in a stream, between two events.
    deadline: seconds for a whole call with its retries; None for no limit.
    max_retries: how often a failed request is sent again, unless its answer may have been billed
        and lost.
    on_retry: called as on_retry(error, seconds) before each wait. The time that it takes counts
        as part of the wait. What it raises ends the call.
    headers: more headers for every request.
    ca_file: a file or folder of trusted CA certificates, or else those of SSL_CERT_FILE and
        SSL_CERT_DIR, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, or the system.
    allow_http: whether plain http may go to other machines, which exposes the key.

    Settings that cannot be used raise `ConfigError`.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        base_url: str | None = None,
        model: str = _MODEL,
        route: dict[str, Any] | None = None,
        verify_route: bool = True,
        timeout: float = _TIMEOUT,
        deadline: float | None = None,
        max_retries: int = 2,
        on_retry: Callable[[LowRouterError, float], object] | None = None,
        headers: dict[str, str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        allow_http: bool = False,
    ) -> None:
        self._key = _Key(api_key)
        del api_key  # a traceback may show local variables
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ConfigError(f"max_retries must be a non-negative integer, not {max_retries!r}")
        self._endpoint = _Endpoint(base_url, allow_http, ca_file)
        self._key.current()  # raises if there is none
        if route is not None:
            _check_route(route)
        self._defaults = {"model": model, "route": route}
        self._verify_route = verify_route
        self._timeout = _seconds("timeout", timeout, 0)
        self._deadline = _seconds("deadline", _LONGEST_WAIT if deadline is None else deadline)
        self._max_retries = max_retries
        self._on_retry = on_retry
        self._headers = _checked_headers(headers or {})
        self._ca_file = ca_file
        self._handler = _Handler(self._endpoint)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self._handler)
        self._models: dict[int, tuple[float, list[Json]]] = {}  # by key

    def __repr__(self) -> str:
        if not hasattr(self, "_models"):
            return "Client(...)"  # a traceback shows it before __init__ has ended
        key = self._key.value
        shown = "..." + key[-4:] if len(key) > 16 else "..."
        model = self._defaults["model"]
        return f"Client({shown!r}, base_url={self._endpoint.url!r}, model={model!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Client holds connections: make one where it is used, do not pickle it")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections. Open streams stay open."""
        self._handler.pool.close()

    def _new_clock(self, options: Json) -> _Clock:
        """Take the time limits out of the options of a call, and start the clock."""
        timeout = options.pop("timeout", None)
        deadline = options.pop("deadline", None)
        timeout = self._timeout if timeout is None else timeout
        deadline = self._deadline if deadline is None else deadline
        return _Clock(_seconds("timeout", timeout, 0), _seconds("deadline", deadline))

    def _new_call(
        self, method: str, path: str, body: Any = None, clock: _Clock | None = None
    ) -> _Call:
        clock = clock or self._new_clock({})
        data = b"" if body is None else _json_bytes(body)
        call = _Call(self._endpoint, self._key.current(), method, path, data, clock)
        headers = {"Host": self._endpoint.netloc, "Accept-Encoding": "identity"}
        headers["User-Agent"] = "lowrouter/{} Python/{}.{}".format(__version__, *sys.version_info)
        if data:
            headers["Content-Type"] = "application/json"  # [docs]
        if data or method != "GET":
            headers["Content-Length"] = str(len(data))
        call.headers.update(headers, **self._headers)
        # OpenerDirector shows `headers` to audit hooks, but not these.
        call.add_unredirected_header("Authorization", "Bearer " + call.key)  # [docs]
        return call

    def _pin(self, call: _Call, body: Any) -> None:
        call.pins = _route_pins(body, self._headers)
        call.verifies_pins = self._verify_route

    def _run(self, call: _Call, parse: Callable[[_Call], T]) -> T:
        return call.run(self._opener, parse, self._max_retries, self._on_retry)

    def _chat(self, messages: Any, streams: bool, options: Json, parse: Callable[[_Call], T]) -> T:
        clock = self._new_clock(options)
        body = _chat_body(messages, streams, self._defaults, options)
        call = self._new_call("POST", "/chat/completions", body, clock)  # [docs]
        self._pin(call, body)
        if isinstance(body.get("n"), int):
            call.choices_requested = max(1, body["n"])
        return self._run(call, parse)

    def chat(self, /, messages: str | list[dict[str, Any]], **options: Any) -> Completion:
        """Send messages and return the complete answer. The function `chat` has the details."""
        return self._chat(messages, False, options, _parse_completion)

    def stream(self, /, messages: str | list[dict[str, Any]], **options: Any) -> Stream:
        """Send messages and return a `Stream`. The function `stream` has the details."""
        return self._chat(messages, True, options, Stream)

    def curl(
        self, /, messages: str | list[dict[str, Any]], stream: bool = False, **options: Any
    ) -> str:
        """Return the curl command that sends what `chat()` or `stream()` would send.

        The command takes the key from the environment; while it runs, the list of processes shows
        the key. Raises `ConfigError` for what cannot be sent.
        """
        self._new_clock(options)  # raises for limits that `chat()` would refuse
        body = _chat_body(messages, stream, self._defaults, options)
        flags = []
        if stream:
            flags.append("-N")
        if self._ca_file:
            option = "--capath" if os.path.isdir(self._ca_file) else "--cacert"
            flags += [option, str(self._ca_file)]
        key = "$LOWROUTER_API_KEY"
        if self._key.path:
            key = '$(cat "$LOWROUTER_API_KEY_FILE")'
        url = self._endpoint.url + "/chat/completions"
        return _curl_command(url, body, self._headers, flags, key)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Send any other request: a method, a path below the base URL, and a body as JSON.

        Returns the JSON of the response, None for an empty one. Raises as `chat()` does.
        """
        if not isinstance(path, str):
            raise ConfigError(f"the path must be a string such as '/providers', not {path!r}")
        if not isinstance(method, str) or not re.fullmatch("[A-Za-z]+", method):
            raise ConfigError(f"the method must be a word such as 'GET', not {method!r}")
        safe = "/?%:@!$&'()*+,;=~"  # what may stand in a path and a query
        path = "/" + urllib.parse.quote(path.lstrip("/"), safe=safe, errors="surrogatepass")
        call = self._new_call(method.upper(), path, body)
        self._pin(call, body)
        return self._run(call, _parse_any)

    def models(self, refresh: bool = False) -> list[dict[str, Any]]:
        """Return the routable models [docs], kept for an hour; only the field `id` is guaranteed.

        When the gateway cannot be reached, an older list is returned with a warning. Raises as
        `chat()` does.
        """
        return self._list_models(refresh)

    def _list_models(self, refresh: bool) -> list[dict[str, Any]]:
        key = hash(self._key.current())  # a traceback may show local variables
        saved_at, listed = self._models.get(key, (0.0, []))
        age = time.time() - saved_at
        if saved_at and not refresh and 0 <= age < _MODELS_SECONDS:
            return list(_copy(listed))
        try:
            listed = self._run(self._new_call("GET", "/models"), _parse_models)  # [docs]
        except APIConnectionError as error:
            if not saved_at:
                raise
            message = f"using the list of models from {age / 60:.0f} minutes ago: {error}"
            warnings.warn(message, stacklevel=3)  # in the code that called models()
        else:
            self._models[key] = (time.time(), listed)
        return list(_copy(listed))

    def generation(self, generation_id: str, wait: float = 0.0) -> dict[str, Any]:
        """Return the record of an answer: tokens, cost, eco numbers and routing trace [docs].

        A record that is not written yet is requested again for `wait` seconds. Then it raises
        `NotFoundError`; otherwise it raises as `chat()` does.
        """
        if not isinstance(generation_id, str) or generation_id in ("", ".", ".."):
            raise ConfigError(f"an id is a string such as gen_01J9, not {generation_id!r}")
        segment = urllib.parse.quote(generation_id, safe="", errors="surrogatepass")
        call = self._new_call("GET", "/generation/" + segment)  # [docs]
        end = time.monotonic() + _seconds("wait", wait)
        while True:
            try:
                return self._run(call, _parse_record)
            except NotFoundError:
                pause = min(_POLL_SECONDS, end - time.monotonic())
                if pause <= 0 or not call.clock.has_time_for(pause):
                    raise
            time.sleep(pause)


# ---- functions: one client for the whole program -------------------------------------------------
# It is made at the first call, and again when one of its environment variables has changed.

_shared: tuple[int, Client] | None = None


def _shared_client() -> Client:
    global _shared
    environment = _environment_hash()
    if _shared is None or _shared[0] != environment:
        _shared = (environment, Client())
    return _shared[1]


def chat(messages: str | list[dict[str, Any]], **options: Any) -> Completion:
    """Send messages and return the complete answer.

    messages: the text of one user message, or a list of OpenAI's message dicts.
    model: such as "openai/gpt-4o-mini"; "lowrouter/auto" by default.
    route: such as {"region": "eu-west", "provider": "openai"}, which are pins; also `fallback`
        and `prefer_low_carbon` [docs].
    timeout: seconds for connecting (10 at most), the response, and each silence in it; 600.
    deadline: seconds for the whole call with its retries; None for no limit.
    Every other keyword is a field of the JSON body, such as temperature, max_tokens or tools.

    Raises `ConfigError` before anything is sent; `APIConnectionError` and `APITimeoutError` for
    the network; `APIStatusError` and its subclasses by status; `BadResponseError`; and
    `RouteMismatchError` if a pin was not kept. All of them are `LowRouterError`s.
    """
    _check_option_names(options)
    return _shared_client().chat(messages, **options)


def stream(messages: str | list[dict[str, Any]], **options: Any) -> Stream:
    """Send messages and return a `Stream`: iterate over it, best in a `with` block.

    It takes the options of `chat()`, and raises the same errors before the first chunk. Usage is
    requested too, unless `stream_options` says otherwise; None leaves that field out.
    """
    _check_option_names(options)
    return _shared_client().stream(messages, **options)


def curl(messages: str | list[dict[str, Any]], stream: bool = False, **options: Any) -> str:
    """Return the curl command of a call, for a POSIX shell; it does not contain the key.

    It takes the options of `chat()`, and raises `ConfigError` for those that cannot be sent.
    """
    _check_option_names(options)
    return _shared_client().curl(messages, stream, **options)


def request(method: str, path: str, body: Any = None) -> Any:
    """Send any other request, such as request("GET", "/providers"), and return its JSON.

    An empty response is None. It raises as `chat()` does.
    """
    return _shared_client().request(method, path, body)


def models(refresh: bool = False) -> list[dict[str, Any]]:
    """Return the routable models as dicts, of which only `id` is guaranteed; kept for an hour.

    refresh: request the list again. It raises as `chat()` does.
    """
    return _shared_client()._list_models(refresh)


def generation(generation_id: str, wait: float = 0.0) -> dict[str, Any]:
    """Return the record of an answer: tokens, cost, eco numbers and routing trace.

    wait: seconds for which a record that is not written yet is requested again. Raises
    `NotFoundError` after that, and otherwise as `chat()` does.
    """
    return _shared_client().generation(generation_id, wait)


# ---- command line: the functions as commands -----------------------------------------------------
# The only section that prints and writes files. It uses public names of the library only.

__all__ += ["main"]

_STDIN_NOTICE_SECONDS = 2.0  # by then, a pipe that has data would have begun to send it
_SHUTDOWN_SECONDS = 4.0  # grace period for the requests that are under way at Ctrl-C
_RESUME = "run the same command again to resume"
_CUT_OFF = "cut off by their token limit"


def _write(text: str, stream: Any = None) -> None:
    """Write text at once, to standard output by default; a terminal shows control characters."""
    stream = stream or sys.stdout
    if stream.isatty():
        control = "[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # characters that could steer the terminal
        text = re.sub(control, lambda match: f"\\u{ord(match[0]):04x}", text)
    stream.write(text)
    stream.flush()


def _note(line: str) -> None:
    """Write a line to standard error. If that fails, the answer must not be lost."""
    with contextlib.suppress(OSError):
        _write(f"{line}\n", sys.stderr)


def _write_json(value: Any) -> None:
    """Write indented JSON, for people and programs."""
    _write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _read_stdin(deadline: Any) -> Any:
    """Read standard input in a thread, because it may be silent for ever."""
    from concurrent.futures import ThreadPoolExecutor, wait
    from threading import Timer

    reading = ThreadPoolExecutor(1).submit(sys.stdin.buffer.read)
    text = "lowrouter: waiting for the end of standard input; close it with </dev/null"
    notice = Timer(_STDIN_NOTICE_SECONDS, _note, [text])
    notice.start()
    wait([reading], deadline)
    notice.cancel()
    if not reading.done():
        raise APITimeoutError("standard input did not end before the deadline")
    with contextlib.suppress(OSError):
        return reading.result()
    return b""  # under nohup it cannot be read


def _read(path: str, deadline: Any = None) -> str:
    """The text of a file, or of standard input if the path is "-"."""
    if path == "-":
        path = "standard input"
        data = _read_stdin(deadline)
    else:
        with open(path, "rb") as file:
            data = file.read()
    if re.search(rb"\A(\xff\xfe|\xfe\xff)|\0", data):
        raise ConfigError(f"{path}: this is not UTF-8 text (perhaps UTF-16); convert it to UTF-8")
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError:
        _note(f"lowrouter: {path}: bytes that are not UTF-8 were replaced")
        return str(data, "utf-8-sig", "replace")


def _utf8(argument: str) -> str:
    """An argument as UTF-8, whatever the locale made of it."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _text_or_file(argument: str) -> str:
    """The value of an argument, or the text of the file for @FILE."""
    if argument.startswith("@"):
        return _read(argument[1:])
    return _utf8(argument)


def _json_or_string(text: str) -> Any:
    """What JSON says; any other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _numbers(answer: Completion) -> Json:
    """The numbers that the gateway gave with an answer, by unit."""
    facts = {**(answer.usage or {}), **(answer.eco or {})}
    units = {"total_tokens": "tokens", "energy_wh": "Wh", "carbon_g": "g CO2e"}
    numbers = {}
    for name, unit in units.items():
        number = facts.get(name)
        if isinstance(number, (int, float)) and abs(number) < 1e15:  # neither infinite nor NaN
            numbers[unit] = number
    return numbers


def _amounts(numbers: Json) -> str:
    """Format as ", 12 tokens, 0.5 Wh" in plain decimals, without zero amounts."""
    from decimal import Decimal

    text = ""
    for unit, number in numbers.items():
        if number or unit == "answers":
            rounded = Decimal(f"{number:.12g}")  # sums of binary fractions have odd last digits
            text += f", {rounded:,f} {unit}"
    return text


def _exit_status(error: BaseException) -> int:
    """The exit status for an error; the main help lists them."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, ConfigError) or getattr(error, "filename", None) is not None:
        return 2  # also a file that cannot be opened
    if not isinstance(error, LowRouterError):
        return 1
    if isinstance(error, RouteMismatchError) or error.pinned:
        return 6
    if error.status in (401, 403):
        return 3
    if error.status in (408, 409, 429, *range(500, 1000)):
        return 5
    if error.status:
        return 4
    if error.completion and error.completion.text:
        return 8
    if isinstance(error, (APIConnectionError, StreamError)) and not error.message:
        return 7
    return 1


def _new_client(args: Any, **settings: Any) -> Client:
    """A client with the options that all commands have."""
    return Client(
        timeout=args.timeout,
        deadline=args.deadline,
        allow_http=args.allow_http,
        verify_route=not args.no_verify_route,
        **settings,
    )


# chat


def _chat_fields(args: Any) -> Any:
    """The fields of the request: --body, overridden by -p, and both by the other options."""
    body: Any = {}
    if args.body:
        body = _json_or_string(_read(args.body, args.deadline))
    if not isinstance(body, dict):
        raise ConfigError(f"--body {args.body} does not contain a JSON object")
    for field in args.param:
        name, equals, value = field.partition("=")
        if not name or not equals:
            raise ConfigError(f"-p takes KEY=VALUE, and {field!r} is not one")
        body[_utf8(name)] = _json_or_string(_text_or_file(value))
    body["stream"] = (body.get("stream") is not False and not args.no_stream) or None
    if args.model:
        body["model"] = _utf8(args.model)
    for name in ("region", "provider"):
        pin = getattr(args, name)
        route = body.get("route") or {}
        if pin and isinstance(route, dict):
            body["route"] = {**route, name: _utf8(pin)}
    system = args.system and _text_or_file(args.system)  # before the prompt: it may be @-
    prompt = _utf8(args.PROMPT or "")
    if prompt == "-" or not sys.stdin.isatty():
        piped = _read("-", args.deadline).rstrip("\r\n")
        prompt = "\n\n".join(part for part in (prompt, piped) if part not in ("", "-"))
    messages = prompt or body.get("messages")
    if not messages:
        raise ConfigError("no prompt: give it as an argument, through a pipe or with --body")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system and isinstance(messages, list):
        messages.insert(0, {"role": "system", "content": system})
    body["messages"] = messages
    return body


def _curl(client: Client, body: Json) -> str:
    """The curl command of a request. A body that cannot be sent is a ConfigError."""
    try:
        return client.curl(**body)
    except TypeError as error:  # it has an option of the client as a field
        raise ConfigError(str(error)) from None


def _send_chat(client: Client, body: Json, as_json: bool) -> Any:
    """Print the text as it arrives, also what arrived before an error, and return the answer."""
    printed = 0
    answer: Any = None
    try:
        if not body["stream"]:
            answer = client.chat(**body)
            return answer
        chunks = client.stream(**body)
        for chunk in chunks:
            if not as_json:
                _write(chunk.text)
                printed += len(chunk.text)
        answer = chunks.result()
        return answer
    except LowRouterError as error:
        if printed or _exit_status(error) == 8:
            answer = error.completion
        raise
    finally:
        if answer and as_json:
            _write_json(answer)
        elif answer:
            _write(answer.text[printed:])
            if not answer.text.endswith("\n"):
                _write("\n")
        elif printed:
            _write("\n")  # Ctrl-C: the next line is not a part of the answer


def _summary(answer: Completion) -> str:
    """The route, the numbers and the id of an answer, as far as the gateway gave them."""
    text = answer.model or "answered"
    if answer.provider:
        text += f" via {answer.provider}"
    if answer.region:
        text += f" in {answer.region}"
    text += _amounts(_numbers(answer))
    accuracy = (answer.eco or {}).get("accuracy")
    if accuracy:
        text += f" ({accuracy})"
    if answer.generation_id:
        text += f", {answer.generation_id}"
    return text


def _chat(args: Any) -> int:
    """Send a prompt, and print the answer or the curl command."""
    retries = itertools.count(1)

    def on_retry(error: LowRouterError, seconds: float) -> None:
        if args.verbose:
            _note(f"lowrouter: retry {next(retries)} of 2 in {seconds:.1f} s: {error}")

    client = _new_client(args, on_retry=on_retry)
    body = _chat_fields(args)
    command = _curl(client, body)
    if args.curl:
        _write(f"{command}\n")
        return 0
    answer = _send_chat(client, body, args.json)
    if answer.finish_reason == "length":
        _note("lowrouter: the answer was cut off by its token limit (finish_reason: length)")
    if args.verbose or sys.stderr.isatty():
        _note(f"lowrouter: {_summary(answer)}")
    return 0


# models, generation, get


def _cells(model: Json) -> Json:
    """The fields of a model as text; an object in it has a cell for each of its fields."""
    cells = {}
    for name, value in model.items():
        if not isinstance(value, dict):
            value = {"": value}
        for field, text in value.items():
            if not isinstance(text, str):
                text = re.sub(r'[][{}"]', "", json.dumps(text, ensure_ascii=False))
            cells[f"{name}.{field}".strip(".")] = " ".join(text.split())
    return cells


def _write_table(rows: list[Json]) -> None:
    """Write the columns that fit the terminal; a pipe gets all of them."""
    from shutil import get_terminal_size

    names = dict.fromkeys(name for row in rows for name in row)
    first = "^id$|context|pric|region|cost"  # what users choose by
    width = get_terminal_size((10_000, 24)).columns
    lines = [""] * (len(rows) + 1)
    left_out = 0
    for name in sorted(names, key=lambda name: not re.search(first, name)):
        column = [name, *(row.get(name, "") for row in rows)]
        size = max(map(len, column))
        if lines[0] and len(lines[0]) + size > width:
            left_out += 1
        else:
            lines = [line + cell.ljust(size + 2) for line, cell in zip(lines, column)]
    for line in [lines[0], *sorted(lines[1:])]:
        _write(line.rstrip() + "\n")
    if left_out:
        _note(f"lowrouter: {left_out} columns do not fit; --json shows all")


def _models(args: Any) -> None:
    """Print the models that have the filter in one of their fields."""
    word = _utf8(args.FILTER or "").lower()
    models = []
    for model in _new_client(args).models():
        if word in " ".join(_cells(model).values()).lower():
            models.append(model)
    if not models:
        raise LowRouterError("no model matches")
    if args.json:
        _write_json(models)
    else:
        _write_table(list(map(_cells, models)))


def _generation(args: Any) -> None:
    _write_json(_new_client(args).generation(args.ID, args.wait))


def _get(args: Any) -> None:
    _write_json(_new_client(args).request("GET", args.PATH))


# batch: OUT holds answers only, and only grows


def _jobs(source: Any, client: Client) -> Iterator[Any]:
    """The id and the body of each request; a bad line raises ConfigError."""
    lines: Json = {}
    source.seek(0)
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        try:
            job = json.loads(line)
            if not isinstance(job, dict):
                raise ConfigError("it must be a JSON object")
            custom_id = job.pop("custom_id", f"line-{number}")
            body = job.get("body", job)
            if not isinstance(body, dict) or not isinstance(custom_id, str):
                raise ConfigError("body must be a JSON object, and custom_id a string")
            if custom_id in lines:
                raise ConfigError(f"it has the same custom_id as line {lines[custom_id]}")
            body = {"messages": None, **body, "stream": None, "stream_options": None}
            _curl(client, body)
        except (ValueError, RecursionError) as error:  # ConfigError is a ValueError too
            problem = str(error)
            if isinstance(error, json.JSONDecodeError):
                problem = f"this is not JSON: {error.msg} at column {error.colno}"
            raise ConfigError(f"line {number} of {source.name}: {problem}") from None
        lines[custom_id] = number
        yield custom_id, body


def _count(answer: Completion, totals: Json) -> None:
    """Add an answer to the totals of a batch."""
    totals["answers"] += 1
    totals[_CUT_OFF] += answer.finish_reason == "length"
    for unit, number in _numbers(answer).items():
        totals[unit] += number


def _read_answers(file: Any, totals: Json) -> Any:
    """Count the answers of earlier runs.

    Returns their ids, and the size and the last byte of the file without a torn last line.
    """
    ids = set()
    size = 0
    end = b""
    for line in file:
        result = _json_or_string(line.decode("utf-8", "replace"))
        try:
            custom_id = result["custom_id"]
            answer = result["error"] or result["response"]["body"]
            is_result = isinstance(custom_id, str) and isinstance(answer, dict)
        except (KeyError, TypeError):
            is_result = False
        if is_result:
            size += len(line)
            end = line[-1:]
            if not result["error"]:
                ids.add(custom_id)
                _count(Completion(answer), totals)
        elif line.endswith(b"\n") or not line.startswith(b'{"custom_id"'[: len(line)]):
            raise ConfigError(f"{file.name} has a line that batch did not write")
    return ids, size, end


def _append(file: Any, result: Json) -> None:
    """Write a result as a line, or nothing of it."""
    line = json.dumps(result, ensure_ascii=False) + "\n"
    data = line.encode("utf-8", "backslashreplace")
    size = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[os.write(file.fileno(), data) :]
    except OSError as error:
        file.truncate(size)
        raise OSError(f"{file.name} cannot be written ({error.strerror}); {_RESUME}") from None


def _lock(file: Any) -> None:
    """Lock a file from its start. Closing any other handle of the file would unlock it."""
    file.seek(0)
    try:
        os.lockf(file.fileno(), os.F_TLOCK, 0)
    except BlockingIOError:
        raise ConfigError(f"{file.name} is in use by another batch") from None
    except (AttributeError, OSError):
        pass  # Windows, or a file system without locks


def _stops_batch(error: LowRouterError) -> bool:
    """Whether every other request would fail as well."""
    if isinstance(error, RouteMismatchError):  # a gateway that names no route
        answer = error.completion or Completion()
        return not answer.region and not answer.provider
    if error.status in (401, 402, 429, 503):  # the last two if they ask for a long wait
        return not error.retryable and not error.pinned
    return error.phase == "connect" or (error.phase == "deadline" and error.retryable)


def _show_progress(totals: Json, size: int) -> None:
    """Write a line with a bar, which the next one overwrites."""
    from shutil import get_terminal_size

    if os.environ.get("TERM") == "dumb":
        return
    done = size - totals["not sent"]
    bar = "#" * (10 * done // size)
    text = f"[{bar:<10}] {done} of {size}, {totals['failed']} failed"
    width = get_terminal_size().columns - 1
    end = "\r" if done < size else "\n"
    with contextlib.suppress(OSError):  # the terminal was closed; the batch goes on
        sys.stderr.write(f"{text:{width}.{width}}{end}")
        sys.stderr.flush()


class _Batch:
    """What the workers of a batch share."""

    def __init__(self, args: Any) -> None:
        from threading import Event, Lock

        self.args = args
        self.client = _new_client(args, max_retries=5, on_retry=self.on_retry)
        self.stopped = Event()
        self.lock = Lock()
        self.resume_at = 0.0  # no worker sends before that, because of a 429
        self.first_error = ""
        names = ["answers", "tokens", "Wh", "g CO2e", _CUT_OFF, "failed"]
        self.totals: Json = dict.fromkeys(names, 0)

    def wait(self, until: float) -> None:
        """Wait until then and until the end of a 429, unless the batch is stopped."""
        while time.monotonic() < max(until, self.resume_at) and not self.stopped.is_set():
            time.sleep(0.05)

    def on_retry(self, error: LowRouterError, seconds: float) -> None:
        """Wait instead of the library, so that a stop can end the wait and with it the call."""
        until = time.monotonic() + seconds
        if isinstance(error, RateLimitError):
            self.resume_at = max(self.resume_at, until)
        self.wait(until)
        if self.stopped.is_set():
            raise error

    def send(self, custom_id: str, body: Json) -> Json:
        """Send a request and return its result, in the format of OpenAI's batches."""
        error = None
        status: Any = 200
        try:
            outcome: Any = self.client.chat(**body)
            answer = outcome
        except LowRouterError as failure:
            outcome = failure
            answer = failure.completion or failure.body
            status = failure.status
            error = {"code": failure.code or type(failure).__name__, "message": str(failure)}
            if _stops_batch(failure):
                self.stopped.set()
        request_id = (outcome.headers or {}).get("X-Request-Id")
        response: Any = {"status_code": status, "request_id": request_id, "body": answer}
        if error and not outcome.status and not outcome.completion:
            response = None
        return {"custom_id": custom_id, "response": response, "error": error}

    def save(self, result: Json, out: Any) -> None:
        """Write a result and count it."""
        self.totals["not sent"] -= 1
        if result["error"]:
            with open(self.args.OUT + ".errors", "ab") as errors:
                _append(errors, result)
            self.totals["failed"] += 1
            self.first_error = self.first_error or result["error"]["message"]
        else:
            _append(out, result)
            _count(result["response"]["body"], self.totals)

    def work(self, jobs: Iterator[Any], out: Any, size: int) -> None:
        """Send one request after the other until none is left or the batch is stopped."""
        while True:
            self.wait(0.0)
            with self.lock:
                job = next(jobs, None)
            if not job or self.stopped.is_set():
                return
            result = self.send(*job)
            with self.lock:
                self.save(result, out)
                if not self.args.quiet and sys.stderr.isatty():
                    _show_progress(self.totals, size)

    def run(self, *work: Any) -> None:
        """Start the workers and wait. Ctrl-C leaves some seconds to requests under way."""
        from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

        pool = ThreadPoolExecutor(self.args.workers)
        tasks: list[Any] = []
        try:
            for _ in range(self.args.workers):
                tasks.append(pool.submit(self.work, *work))
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            self.stopped.set()
            wait(tasks, _SHUTDOWN_SECONDS)
        for task in tasks:
            if task.done():
                task.result()  # raises what ended a worker


def _check_files(*paths: str) -> None:
    """Refuse devices, and two names of one file."""
    seen = []
    for path in filter(os.path.exists, paths):
        identity = os.stat(path)[1:3]
        if identity in seen or not os.path.isfile(path):
            raise ConfigError(f"{path}: IN, OUT and OUT.errors must be three regular files")
        seen.append(identity)


def _batch(args: Any) -> int:
    """Send the requests of IN that have no answer in OUT yet."""
    shard = re.fullmatch("([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", args.shard)
    if not shard or int(shard[1]) > int(shard[2]):
        raise ConfigError(f"--shard takes I/N with I from 1 to N, not {args.shard!r}")
    if not 1 <= args.workers <= 1000:
        raise ConfigError(f"--workers takes a number from 1 to 1000, not {args.workers}")
    failures = args.OUT + ".errors"
    _check_files(args.IN, args.OUT, failures)
    batch = _Batch(args)
    totals = batch.totals
    with open(args.IN, "rb") as source, contextlib.ExitStack() as stack:
        ids = [custom_id for custom_id, _ in _jobs(source, batch.client)]
        ids = ids[int(shard[1]) - 1 :: int(shard[2])]
        with contextlib.suppress(FileNotFoundError), open(failures, "rb") as errors:
            if _read_answers(errors, totals)[0]:
                raise ConfigError(f"{failures} has answers: choose another OUT")
        out = stack.enter_context(open(args.OUT, "a+b"))
        _lock(out)
        answered, size, end = _read_answers(out, totals)
        out.truncate(size)
        if end not in (b"", b"\n"):  # the last line lacks only its newline
            os.write(out.fileno(), b"\n")
        with contextlib.suppress(FileNotFoundError):
            os.remove(failures)
        todo = set(ids) - answered
        totals["skipped"] = len(ids) - len(todo)
        totals["not sent"] = len(todo)
        totals["ids of OUT not in IN"] = len(answered - set(ids))
        jobs = (job for job in _jobs(source, batch.client) if job[0] in todo)
        batch.run(jobs, out, len(todo))
    text = f"lowrouter: {args.OUT}: {_amounts(totals)[2:]}"
    if batch.first_error:
        text += f"; see {failures}; first error: {batch.first_error}; {_RESUME}"
    _note(text)
    return 9 if batch.first_error else 0


# the program


_HELP = """\
Send prompts to the LowRouter LLM gateway.

first command:  lowrouter chat "In one sentence, what is a vector database?"
the key:        LOWROUTER_API_KEY, or the file LOWROUTER_API_KEY_FILE; it begins
                with lr-sk-

commands:
  chat          send a prompt and print the answer as it arrives
  models        list the models that the gateway offers
  generation    show the record of an answer: tokens, cost, energy, routing
  batch         send the requests of a file; resume when it is run again
  get           print the JSON of any other endpoint

"lowrouter COMMAND --help" shows the options of a command, and
"lowrouter --version" the versions of lowrouter and Python.

exit statuses:
  0 done                        5 try again later (408, 409, 429, 5xx)
  1 another error               6 the pinned route was not available or not kept
  2 usage or configuration      7 network, TLS or time
  3 key refused (401, 403)      8 the answer was cut; its text is on stdout
  4 request refused             9 some requests of a batch failed
                              130 interrupted by Ctrl-C
"""
_COMMON_HELP = """\
      --json               print JSON, also for errors (on stderr)
      --timeout SECONDS    for connecting (10 at most), for the answer to begin,
                           and for each silence in it (default 600)
      --deadline SECONDS   for a whole call with its retries (default: no limit)
      --allow-http         allow plain http to other machines
"""
_CHAT_HELP = f"""\
usage: lowrouter chat [PROMPT] [options]

Send a prompt and print the answer as it arrives. Text piped to stdin is
appended to the prompt, or used as the prompt.

  -m, --model NAME         the model (default lowrouter/auto)
  -s, --system TEXT        a system message, or @FILE
  -p, --param KEY=VALUE    a field of the request as JSON or text, or KEY=@FILE;
                           may be repeated
      --body FILE          a JSON file with the whole request (- for stdin);
                           the other options override it
      --region NAME        use only this region; fail if it is not available
      --provider NAME      use only this provider; fail if it is not available
      --no-verify-route    accept an answer that does not confirm these two
      --no-stream          print the answer when it is complete
      --curl               print the curl command instead of sending anything
  -v, --verbose            show route, tokens, energy and retries on stderr
{_COMMON_HELP}
examples:
  lowrouter chat -m openai/gpt-4o-mini -p temperature=0 "Say hello"
  git diff | lowrouter chat --region eu-west -s @review.md "Review this change."
"""
_MODELS_HELP = f"""\
usage: lowrouter models [FILTER] [options]

List the models that the gateway offers, or those with FILTER in any field.

{_COMMON_HELP}
examples:
  lowrouter models anthropic
  lowrouter models --json > models.json
"""
_GENERATION_HELP = f"""\
usage: lowrouter generation ID [options]

Show the record of the answer with this generation id.

      --wait SECONDS       for a record that is not written yet (default 0)
{_COMMON_HELP}
examples:
  lowrouter generation gen_01J9
  lowrouter generation --wait 10 "$id"
"""
_BATCH_HELP = f"""\
usage: lowrouter batch IN OUT [options]

Send the requests of IN and append the answers to OUT, in the format of OpenAI's
batches. Run the same command again to resume: ids that have an answer in OUT
are skipped, and what failed is sent again. Failures are in OUT.errors.

Each line of IN is {{"custom_id": "...", "body": {{...}}}}, or just the body.

      --workers N          number of parallel requests (default 8);
                           after a kill, up to N requests may be sent twice
      --shard I/N          send only every Nth request, from request I on
      --no-verify-route    accept answers that do not confirm a pinned route
  -q, --quiet              show no progress
{_COMMON_HELP}
examples:
  lowrouter batch in.jsonl out.jsonl --workers 16
  lowrouter batch in.jsonl "out-$I.jsonl" --shard "$I/4"
"""
_GET_HELP = f"""\
usage: lowrouter get PATH [options]

Print the JSON of any other endpoint.

{_COMMON_HELP}
examples:
  lowrouter get /providers
  lowrouter get /credits
"""
_COMMANDS = {
    "chat": (_chat, _CHAT_HELP),
    "models": (_models, _MODELS_HELP),
    "generation": (_generation, _GENERATION_HELP),
    "batch": (_batch, _BATCH_HELP),
    "get": (_get, _GET_HELP),
}
_VALUES: Json = {  # how argparse parses the values that the help texts name; others are text
    "": {"action": "store_true"},  # no value
    "KEY=VALUE": {"action": "append", "default": []},
    "SECONDS": {"type": float},
    "N": {"type": int},
    "[": {"nargs": "?"},
}


def _parse(text: str, words: list[str]) -> Any:
    """Parse the words after a command by its help text, which is also the list of its options."""
    import difflib
    from argparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(message)

        def print_help(self, file: Any = None) -> None:
            _write(text)

    parser = Parser(allow_abbrev=False)
    parser.set_defaults(timeout=600.0, wait=0.0, workers=8, shard="1/1", no_verify_route=False)
    # The first line of the help has the arguments, as in "usage: lowrouter models [FILTER]".
    for name in re.findall(r"\[?[A-Z]+\]?", text.split("\n")[0]):
        parser.add_argument(name.strip("[]"), **_VALUES.get(name[0], {}))
    # A line such as "  -m, --model NAME    the model" has the names of an option and its value.
    for names, value in re.findall("(?m)^ +(-.*?) ?([A-Z/=]*)  ", text):
        parser.add_argument(*names.split(", "), **_VALUES.get(value, {}))
    args, unknown = parser.parse_known_args(words)
    for name, value in vars(args).items():
        if value == "":
            option = name if name.isupper() else f"--{name}"
            raise ConfigError(f"{option} is empty: is a variable of the shell not set?")
    for word in unknown:
        hint = "--help shows what the command takes"
        if "PROMPT" in args:
            hint = "put the prompt in quotes, after -- if it begins with a dash"
        known = re.findall("--[a-z-]+", text)
        for similar in difflib.get_close_matches(word.split("=")[0], known, 1):
            hint = f"did you mean {similar}?"
        raise ConfigError(f"unexpected argument {word!r}: {hint}")
    return args


def _run(words: list[str]) -> int:
    """Run a command and return its exit status."""
    name = "".join(words[:1])
    if name in ("", "-h", "--help"):
        _write(_HELP)
        return 0 if name else 2
    if name == "--version":
        _write(f"lowrouter {__version__} (Python {sys.version.split()[0]})\n")
        return 0
    if name not in _COMMANDS:
        raise ConfigError(f"there is no command {name!r}: see lowrouter --help")
    command, text = _COMMANDS[name]
    return command(_parse(text, words[1:])) or 0


def _describe(error: BaseException, status: int, as_json: bool) -> str:
    """An error as a line, as JSON, or as the traceback of a bug."""
    text = " ".join(str(error).split())
    if status == 130:
        text = "interrupted; a batch resumes when the same command is run again"
    elif status == 1 and not isinstance(error, (LowRouterError, OSError)):
        import traceback

        text = traceback.format_exc()
    if not as_json:
        return f"lowrouter: {text}"
    names = ("status", "code", "generation_id", "request_id", "retry_after")
    details = {name: getattr(error, name, None) for name in names}
    details.update(type=type(error).__name__, message=text, exit=status)
    return json.dumps({"error": details})


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; without `argv`, end the program with it."""
    from io import BytesIO, TextIOWrapper

    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or TextIOWrapper(BytesIO())  # None if it is closed
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    words = sys.argv[1:] if argv is None else argv
    try:
        status = _run(words)
    except (SystemExit, BrokenPipeError):  # after --help; or the reader has seen enough
        status = 0
    except (Exception, KeyboardInterrupt) as error:
        status = _exit_status(error)
        _note(_describe(error, status, "--json" in words))
    if argv is None:
        os._exit(status)  # the interpreter would wait for threads, and flush to a closed pipe
    return status


if __name__ == "__main__":
    main()


# The MIT License
#
# Copyright (c) 2026 The lowrouter authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software
# and associated documentation files (the "Software"), to deal in the Software without
# restriction, including without limitation the rights to use, copy, modify, merge, publish,
# distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
# Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
# BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
# OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
