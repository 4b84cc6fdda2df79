"""Shows where it runs, and leaves a file behind. Arguments are greeted one by one."""

import os
import platform
import sys

print(f"Hello from Python {platform.python_version()} inside a microVM")
print(f"kernel {platform.release()}, {os.cpu_count()} CPU(s), user id {os.getuid()}")
for name in sys.argv[1:]:
    print(f"hello, {name}")

with open("hello.txt", "w") as out:
    out.write("written in the sandbox\n")
print(f"wrote {os.path.abspath('hello.txt')} ({os.path.getsize('hello.txt')} bytes)")
print("this line goes to standard error", file=sys.stderr)
