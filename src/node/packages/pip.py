"""Warren's installer for Python packages (docs/code.md): `install` runs in a builder, `unpack` in the sandbox of a run.

    pip.py WHEEL install INDEX NAME...   has the pip in WHEEL install; what it says goes to standard error, the files to
                                         standard output, as a tar archive. A line of standard input is USER:PASSWORD
                                         of the index, percent-encoded; without one it has none
    pip.py WHEEL unpack DIRECTORY        makes the directory of such an archive on standard input, whole or not at all

Nothing of a package runs here: wheels are unpacked, sources are not taken."""

import base64
import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from urllib.parse import quote, unquote

WORK = "/var/tmp/warren-packages"


def plain(member):
    """Files and directories that anybody may read and nobody but root may change."""
    if not (member.isreg() or member.isdir()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def refusal(index, login, name):
    """What an index says that gives no page of a package: to pip that is as if there were none of that name."""
    page = re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]*", name).group()).lower()
    request = urllib.request.Request("%s/%s/" % (index.rstrip("/"), page))
    if login:
        # Not for whoever the index may send us to.
        value = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", "Basic " + value)
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        return None if error.code == 404 else "the index answers %d %s" % (error.code, error.reason)
    except OSError:
        pass
    return None


def install(wheel, index, names):
    target, temporary = WORK + "/target", WORK + "/tmp"
    for directory in (target, temporary):
        os.makedirs(directory)
    command = [sys.executable, "-I", wheel + "/pip", "install", "--isolated", "--no-input", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--root-user-action", "ignore", "--no-color", "--progress-bar", "off"]
    command += ["--only-binary", ":all:", "--target", target]
    login = sys.stdin.readline().strip()
    if login:
        # Not in an argument, which others could see, and pip says; what pip says of it is without the password.
        scheme, rest = index.split("://", 1)
        login = ":".join(quote(unquote(part), safe="") for part in login.split(":", 1))
        settings = temporary + "/index"
        with open(os.open(settings, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("--index-url %s://%s@%s\n" % (scheme, login, rest))
        command += ["--requirement", settings]
    else:
        command += ["--index-url", index]
    if index.startswith("http://"):
        command += ["--trusted-host", index[len("http://"):].split("/")[0]]
    environment = dict(os.environ, TMPDIR=temporary, HOME=WORK)
    command += ["--"] + names
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    full = False
    with subprocess.Popen(command, env=environment, **streams) as pip:
        for line in pip.stdout:
            # pip has given the room back when it ends.
            full = full or b"[Errno %d]" % errno.ENOSPC in line
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    status = pip.returncode
    if status != 0 and full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if status != 0:
        said = refusal(index, login, names[0])
        if said:
            print(said, file=sys.stderr)
        return status if status > 0 else 128 - status
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(os.listdir(target)):
            archive.add(os.path.join(target, name), name, filter=plain)
    return 0


def unpack(directory):
    os.umask(0o022)
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    # Of runs that ask for the same at once, one unpacks.
    with open(directory + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = directory + ".new"
        shutil.rmtree(new, ignore_errors=True)
        os.mkdir(new)
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            for member in archive:
                if plain(member) is None or member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError("%r is no file of a package" % member.name)
                archive.extract(member, new)
        # Who sends it ends this program, and not the input, where it finds the archive damaged.
        while sys.stdin.buffer.read(65536):
            pass
        if os.path.isdir(directory):
            shutil.rmtree(new)
        else:
            os.rename(new, directory)
    return 0


def main(wheel, verb, *arguments):
    try:
        if verb == "install":
            return install(wheel, arguments[0], list(arguments[1:]))
        return unpack(*arguments)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("NO_CAPACITY: the sandbox's disk is full", file=sys.stderr)
        return 1


sys.exit(main(*sys.argv[1:]))
