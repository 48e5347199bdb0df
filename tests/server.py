"""A server for the tests of endpoints: OpenAI-compatible, on this machine, and as good or as bad as a test wants it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


def completion(*texts, reason="stop", usage=(7, 2)):
    """The body of a chat completion, as a server writes it."""
    choices = [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": t}} for t in texts]
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return {"id": "x", "object": "chat.completion", "choices": choices, "usage": counts}


class Server:
    """An OpenAI-compatible server whose answers a test writes: answer(request) -> body, or what `misbehave` takes.

    A body is a dict (JSON), text or bytes. (status, headers, body) is an answer with another status; "close" breaks the
    connection off; "stall" answers only when the test is over.
    """

    def __init__(self, answer):
        self.asked, self.keys, self.most, self.now = [], [], 0, 0
        lock, self.over = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    server.asked.append(request)
                    server.keys.append(self.headers["authorization"])
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    self.send(answer(request))
                except OSError:
                    pass  # the client has gone
                finally:
                    with lock:
                        server.now -= 1

            def send(self, said):
                if said == "close":
                    self.close_connection = True
                    return
                if said == "stall":
                    server.over.wait(20)
                    return
                status, headers, body = said if isinstance(said, tuple) else (200, {}, said)
                body = json.dumps(body) if isinstance(body, dict) else body
                body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
                self.send_response(status)
                for name, value in {"content-type": "application/json", "content-length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda request, address: None  # a client that has gone is no news
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
