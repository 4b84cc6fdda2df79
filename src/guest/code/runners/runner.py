"""Warren's runner for Python (docs/code.md): runs what comes on descriptor 3 in one namespace, and says on descriptor 4
what it came to. Standard library only; nothing here trusts or protects against the code, which has this process."""

import ast
import base64
import builtins
import errno
import io
import json
import linecache
import os
import signal
import socket
import sys
import traceback

TEXT_MAX = 1024 * 1024
FORM_MAX = 16 * 1024 * 1024
FORMS = (
    ("text/html", "_repr_html_"),
    ("text/markdown", "_repr_markdown_"),
    ("text/latex", "_repr_latex_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
    ("application/json", "_repr_json_"),
)


def cut(text, most=TEXT_MAX):
    return text if len(text) <= most else text[:most] + "…"


def forms_of(value):
    """Every form that an object offers, by media type. A broken method loses its form only."""
    try:
        forms = {"text/plain": cut(repr(value))}
    except Exception as error:
        forms = {"text/plain": cut("<%s: repr failed: %s>" % (type(value).__name__, type(error).__name__))}
    if isinstance(value, type):
        return forms
    try:
        bundle = getattr(value, "_repr_mimebundle_", None)
        found = dict(bundle()[0] if isinstance(bundle(), tuple) else bundle()) if callable(bundle) else {}
    except Exception:
        found = {}
    for media, method in FORMS:
        try:
            offered = getattr(value, method, None)
            if media not in found and callable(offered):
                found[media] = offered()
        except Exception:
            continue
    for media, content in found.items():
        if isinstance(content, tuple):
            content = content[0] if content else None
        if isinstance(content, (bytes, bytearray)):
            content = base64.b64encode(content).decode()
        elif media.endswith("json") and content is not None:
            try:
                content = json.dumps(content)
            except (TypeError, ValueError):
                continue
        if isinstance(media, str) and isinstance(content, str) and len(content) <= FORM_MAX:
            forms[media] = content
    return forms


class Runner:
    def __init__(self):
        self.control = socket.socket(fileno=3)
        self.results = os.fdopen(4, "wb", buffering=0, closefd=False)
        for descriptor in (3, 4):
            os.set_inheritable(descriptor, False)
        self.names = {"__name__": "__main__", "__builtins__": builtins, "__doc__": None}
        # Pickled and imported by its name, as in a program.
        self.main = type(sys)("__main__")
        self.main.__dict__.update(self.names)
        self.names = self.main.__dict__
        sys.modules["__main__"] = self.main
        sys.path[0] = ""
        sys.argv[:] = [""]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        # What is not the code's own is not to be among its files.
        sys.dont_write_bytecode = True
        os.environ.setdefault("MPLBACKEND", "Agg")
        os.environ.setdefault("MPLCONFIGDIR", "/tmp/matplotlib")
        builtins.display = self.display
        self.count = 0

    def say(self, kind, **more):
        octets = json.dumps({"type": kind, **more}).encode() + b"\n"
        try:
            while octets:
                octets = octets[self.results.write(octets):]
        except (OSError, ValueError):
            pass

    def display(self, *values):
        for value in values:
            self.say("display", forms=forms_of(value))

    def figures(self):
        """Figures that the code drew and did not close."""
        plots = sys.modules.get("matplotlib.pyplot")
        if plots is None:
            return
        for number in plots.get_fignums():
            figure, content = plots.figure(number), io.BytesIO()
            figure.savefig(content, format="png", bbox_inches="tight")
            forms = {"text/plain": repr(figure), "image/png": base64.b64encode(content.getvalue()).decode()}
            self.say("display", forms=forms)
        plots.close("all")

    def evaluate(self, source):
        self.count += 1
        name = "<run %d>" % self.count
        # So that tracebacks show the lines.
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        tree = compile(source, name, "exec", ast.PyCF_ONLY_AST)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, name, "exec"), self.names)
        if last is not None:
            value = eval(compile(last, name, "eval"), self.names)
            if value is not None:
                self.names["_"] = value
                self.say("value", forms=forms_of(value))
        self.figures()

    def run(self, source):
        """Gives the exit code."""
        try:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self.evaluate(source)
                return 0
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        except SystemExit as end:
            if end.code is None:
                return 0
            if isinstance(end.code, int):
                return end.code & 0xFF
            print(end.code, file=sys.stderr)
            return 1
        except BaseException as error:
            self.fail(error)
            return 130 if isinstance(error, KeyboardInterrupt) else 1
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except Exception:
                    pass

    def fail(self, error):
        try:
            # The first two frames are this file's.
            frames = error.__traceback__
            while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
                frames = frames.tb_next
            lines = traceback.format_exception(type(error), error, frames)
            text = "".join(lines)
        except Exception:
            text = type(error).__name__ + "\n"
        try:
            value = str(error)
        except Exception:
            value = ""
        self.say("error", name=type(error).__name__, value=cut(value), traceback=cut(text))

    def receive(self, length):
        octets = bytearray()
        while len(octets) < length:
            chunk = self.control.recv(min(65536, length - len(octets)))
            if not chunk:
                raise EOFError
            octets += chunk
        return bytes(octets)

    def line(self):
        octets = bytearray()
        while not octets.endswith(b"\n"):
            octets += self.receive(1)
        return octets.decode().split()

    def serve(self):
        while True:
            try:
                word, number, length, mode = self.line()
                source = self.receive(int(length)).decode()
            except (EOFError, OSError, ValueError):
                return 0
            code = self.run(source)
            try:
                self.control.sendall(b"done %s %d\n" % (number.encode(), code))
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.EBADF, errno.ENOTSOCK):
                    return code
            if mode != "keep":
                return code


signal.signal(signal.SIGINT, signal.SIG_IGN)
status = Runner().serve()
# At once: threads and handlers of the code need not agree.
os._exit(status)
