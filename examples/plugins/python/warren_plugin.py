"""A native plugin for the sentinel in Python: subclass Plugin, call run(). See docs/plugins.md."""

import json
import re
import sys
import threading

_BARE = re.compile(r'^[^\x00-\x20"\\=\x7f]+$')


class PluginError(Exception):
    """Fails one request. The code is upper case, the sentence says what is wrong and holds no secret."""

    def __init__(self, message, code="FAILED"):
        super().__init__(message)
        self.code = code


class Cancelled(PluginError):
    """The run met its deadline; nobody waits for it any more."""

    def __init__(self):
        super().__init__("cancelled", "CANCELLED")


def _quote(text):
    text = str(text)
    if _BARE.match(text):
        return text
    out = []
    for char in text:
        if char in '"\\':
            out.append("\\" + char)
        elif char == "\n":
            out.append("\\n")
        elif ord(char) < 0x20 or ord(char) == 0x7F:
            out.append("\\x%02x" % ord(char))
        else:
            out.append(char)
    return '"' + "".join(out) + '"'


def _words(line):
    """The words of a line: bare, or in double quotes after the equals sign."""
    words, word, quoted, at = [], "", False, 0
    while at < len(line):
        char = line[at]
        if quoted and char == "\\":
            escape = line[at + 1]
            if escape == "x":
                word += chr(int(line[at + 2 : at + 4], 16))
                at += 2
            else:
                word += "\n" if escape == "n" else escape
            at += 1
        elif char == '"':
            quoted = not quoted
        elif char == " " and not quoted:
            words.append(word)
            word = ""
        else:
            word += char
        at += 1
    return words + [word]


class Run:
    """One collection: add what was measured, look at `cancelled` in long loops."""

    def __init__(self, plugin, tag, arguments):
        self._plugin, self._tag = plugin, tag
        self.task = arguments.get("task", "")
        self.timeout_ms = int(arguments.get("timeout_ms", 0))
        self.device, self.config = {}, {}
        for key, value in arguments.items():
            for section, values in (("device.", self.device), ("config.", self.config)):
                if key.startswith(section):
                    values[key[len(section) :]] = value
        self.cancelled = threading.Event()

    def json(self, section, name, default=None):
        """A list or a table of a field."""
        text = getattr(self, section).get(name)
        return default if text is None else json.loads(text)

    def add(self, name, value, kind=None, labels=None, time_ms=None):
        """One sample."""
        if self.cancelled.is_set():
            raise Cancelled()
        words = [self._tag, "item", "name=" + _quote(name), "value=" + repr(float(value))]
        if kind:
            words.append("type=" + kind)
        if time_ms is not None:
            words.append("time=%d" % time_ms)
        words += ["l.%s=%s" % (label, _quote(text)) for label, text in (labels or {}).items() if str(text)]
        self._plugin._say(" ".join(words))


class Plugin:
    """Override collect(), and validate() and test() where the manifest's rules are not enough."""

    name = ""
    version = "0"

    def validate(self, run):
        """Raise PluginError where the values cannot be used."""

    def test(self, run):
        """Raise PluginError where the device cannot be reached."""

    def collect(self, run):
        """Measure: run.add(...)"""
        raise NotImplementedError

    def close(self):
        """The sentinel is done with the plugin."""

    def run(self):
        """Serves until standard input ends or `close` comes."""
        self._lock = threading.Lock()
        # What is printed by chance must not get between the messages.
        self._out, sys.stdout = sys.stdout.buffer, sys.stderr
        runs = {}
        for raw in sys.stdin.buffer:
            words = _words(raw.decode("utf-8", "replace").rstrip("\r\n"))
            if len(words) < 2:
                continue
            tag, verb = words[:2]
            arguments = dict(word.split("=", 1) for word in words[2:] if "=" in word)
            if verb == "cancel":
                if tag in runs:
                    runs[tag].cancelled.set()
            elif verb == "hello":
                self._say("%s ok protocol=1 name=%s version=%s" % (tag, self.name, _quote(self.version)))
            elif verb == "close":
                self.close()
                self._say(tag + " ok")
                return
            elif verb in ("validate", "test", "collect"):
                # Finished runs are forgotten here: no other thread changes the table.
                for old in [old for old, run in runs.items() if run.done]:
                    del runs[old]
                run = runs[tag] = Run(self, tag, arguments)
                run.done = False
                threading.Thread(target=self._serve, args=(tag, getattr(self, verb), run), daemon=True).start()
            else:
                self._say('%s err UNKNOWN_VERB "%s is not known"' % (tag, verb))

    def _serve(self, tag, method, run):
        try:
            method(run)
            self._say(tag + " ok")
        except PluginError as error:
            self._say("%s err %s %s" % (tag, error.code, '"' + _quote(str(error) + " ")[1:-2] + '"'))
        except Exception as error:  # a fault of one run is not the plugin's end
            self._say('%s err FAILED "%s"' % (tag, type(error).__name__))
            print("E! %s: %r" % (run.task, error), file=sys.stderr, flush=True)
        finally:
            run.done = True

    def _say(self, line):
        with self._lock:
            self._out.write(line.encode() + b"\n")
            self._out.flush()
