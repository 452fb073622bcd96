"""A judge of answers behind an OpenAI-compatible address: chat completions over HTTP, every reply kept on disk.

A hosted model and a local server (vLLM, llama.cpp, SGLang, ollama) are asked alike. The key, where one is needed, comes
from the environment and is neither printed nor written.
"""

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from encoder.errors import DataError
from eval.predictions import write_whole

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
WAITS = (1, 4, 15, 60)  # seconds before another try, where the server is busy or away


def read_judged(folder: Path) -> dict | None:
    """`judged.json` of an evaluation folder, None where its answers have not been judged."""
    path = Path(folder) / "judged.json"
    if not path.exists():
        return None
    try:
        judged = json.loads(path.read_text())
        judged["marks"], judged["mean_marks"]["reference"], judged["judge"], judged["rule_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not whole ({error!r}); remove it and judge again") from None
    return judged


class Judge:
    """One model at one address.

    url: up to and with the version, `http://localhost:8000/v1`; model: as the server calls it
    cache: folder of replies, one file each, called by the hash of all that was sent
    key_name: environment variable that holds the key
    """

    def __init__(self, url: str, model: str, cache: Path, temperature: float, max_tokens: int, key_name: str = "OPENAI_API_KEY"):
        self.url, self.model, self.cache, self.key_name = url.rstrip("/"), model, Path(cache), key_name
        self.options = {"temperature": temperature, "max_tokens": max_tokens}
        self.asked = 0
        self.waits = WAITS

    @property
    def record(self) -> dict:
        """What tells this judge from another."""
        return {"model": self.model, "url": self.url, **self.options}

    def reply(self, content: str) -> str:
        """The judge's words to `content`: from the cache, or asked for and then kept. DataError where none can be had."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, **self.options}
        digest = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        path = self.cache / f"{digest}.json"
        if path.exists():
            try:
                return json.loads(path.read_text())["reply"]
            except (ValueError, KeyError) as error:
                raise DataError(f"{path}: not a kept reply ({error!r}); remove that file") from None
        text = self._ask(body)
        self.cache.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"model": self.model, "content": content, "reply": text, "time": time.time()}) + "\n")
        self.asked += 1
        return text

    def _ask(self, body: dict) -> str:
        address = f"{self.url}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise DataError(f"--judge-url {self.url} is no address of a server; write it with http:// or https:// and up to /v1")
        for wait in (*self.waits, None):
            request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
            if os.environ.get(self.key_name):  # a redirection to another server does not take it along
                request.add_unredirected_header("Authorization", f"Bearer {os.environ[self.key_name]}")
            try:
                with urllib.request.urlopen(request, timeout=600) as response:
                    text = json.loads(response.read())["choices"][0]["message"]["content"]
                if not isinstance(text, str):  # a judge that spent all its tokens on thinking says null
                    raise TypeError(f"content is {json.dumps(text)}")
                return text
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(300).decode(errors="replace").split())
                reason = f"{error.code} {error.reason}" + (f": {said}" if said and not said.startswith("<") else "")
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise DataError(f"{address} refuses the judge '{self.model}' ({reason}); check --judge and the key") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = str(error)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError(f"{address} does not answer as chat completions do ({error!r}); check --judge-url") from None
            if wait is not None:
                time.sleep(wait)
        raise DataError(f"{address} cannot be reached ({reason}); replies so far are kept, run the command again to go on")
